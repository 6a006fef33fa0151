"use strict";

const SMALL = 128; // pixels per side up to which a picture is shown with its pixels
const element = (id) => document.getElementById(id);
const canvas = element("canvas");
let release = null; // what /api/release says
let upload = null; // {bitmap, data}: the image that is begun with
let painted = null; // one boolean per cell of the grid, row by row
let cursor = 0; // the cell that the keyboard is at
let stroke = null; // {x, y, paint}: where the pointer was last, and what it leaves
let running = null; // AbortController of the request under way

// ---- the form

async function start() {
  try {
    release = await (await fetch("api/release")).json();
  } catch {
    return fail("The server does not answer.");
  }
  const size = `${release.image_size} x ${release.image_size} pixels`;
  element("release").textContent = `${release.name}, ${size}`;
  element("prompt").maxLength = release.most_prompt;
  element("n").max = release.most_images;
  element("seed").max = release.most_seed;
  element("rows").max = release.grid - 1;
  element("rows").value = Math.ceil(release.grid / 2);
  element("brush").max = Math.max(2, Math.round(release.grid / 4));
  element("sampling").append(...release.sampling.map(settingField));
}

function settingField(setting) {
  const id = `sampling-${setting.name}`;
  const box = document.createElement("div");
  const label = document.createElement("label");
  label.htmlFor = id;
  const words = setting.name.replaceAll("_", " ");
  label.textContent = words[0].toUpperCase() + words.slice(1);
  const field = setting.choices.length ? choiceField(setting) : numberField(setting);
  field.id = id;
  field.title = setting.meaning;
  const meaning = document.createElement("small");
  meaning.textContent = `the release's: ${setting.default}`;
  meaning.id = `${id}-default`;
  field.setAttribute("aria-describedby", meaning.id);
  box.append(label, field, meaning);
  return box;
}

function choiceField(setting) {
  const field = document.createElement("select");
  for (const choice of setting.choices) {
    field.add(new Option(choice, choice, false, choice === setting.default));
  }
  return field;
}

function numberField(setting) {
  const field = document.createElement("input");
  field.type = "number";
  field.step = setting.whole ? "1" : "any";
  if (setting.least !== null) field.min = setting.least;
  if (setting.most !== null) field.max = setting.most;
  field.value = setting.default;
  return field;
}

function numberOf(id, name) {
  const text = element(id).value.trim();
  if (text === "") throw new Error(`${name}: is not a number`);
  return Number(text);
}

function askedFor() {
  const prompt = element("prompt").value.trim();
  if (!prompt) throw new Error("The prompt is empty; say what to generate.");
  const asked = { prompt, n: numberOf("n", "images"), seed: numberOf("seed", "seed") };
  for (const setting of release.sampling) {
    const id = `sampling-${setting.name}`;
    asked[setting.name] = setting.choices.length ? element(id).value : numberOf(id, setting.name);
  }
  if (!upload) return asked;
  asked.image = upload.data;
  if (paints()) asked.mask = maskUrl().split(",")[1];
  else asked.rows = Number(element("rows").value);
  return asked;
}

// ---- the request

async function generate(event) {
  event.preventDefault();
  if (running || !release) return;
  clearResults();
  let asked, body;
  try {
    asked = askedFor();
    body = JSON.stringify(asked);
    if (body.length > release.most_bytes) throw new Error("The image's file is too large.");
  } catch (error) {
    return fail(error.message);
  }
  running = new AbortController();
  setBusy(true);
  element("results").scrollIntoView({ block: "nearest" });
  try {
    await follow(asked, body, running.signal);
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else fail(error instanceof TypeError ? "The server does not answer." : error.message);
  } finally {
    running = null;
    setBusy(false);
  }
}

async function follow(asked, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await fetch("api/images", { method: "POST", headers, body, signal });
  if (!answer.ok) throw new Error(await sentenceOf(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line) ended = take(JSON.parse(line), asked) || ended;
    }
  }
  if (!ended) throw new Error("The server has gone.");
}

async function sentenceOf(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return `The server refuses this: ${answer.status} ${answer.statusText}`;
  }
}

// Whether it is the last event.
function take(event, asked) {
  if (event.error) throw new Error(event.error);
  if (event.command) showCommand(event.command, asked);
  if (event.before !== undefined) {
    const requests = event.before === 1 ? "1 request" : `${event.before} requests`;
    say(event.before ? `Waiting: ${requests} before yours.` : "Waiting: yours is next.");
  }
  if (event.working) {
    say(`0 of ${asked.n} pictures`);
    element("notices").append(...event.notices.map(notice));
  }
  if (event.png) {
    element("pictures").append(picture(event, asked.prompt));
    const made = element("pictures").childElementCount;
    say(`${made} of ${asked.n} pictures`);
    element("progress").value = made / asked.n;
  }
  return Boolean(event.done);
}

function notice(text) {
  const item = document.createElement("li");
  item.textContent = text;
  return item;
}

function picture({ index, seed, png }, prompt) {
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  image.alt = `${prompt}, picture ${index}`;
  image.classList.toggle("small", release.image_size <= SMALL);
  const link = document.createElement("a");
  link.href = image.src;
  link.download = `picture-${index}-seed-${seed}.png`;
  link.textContent = "PNG";
  link.setAttribute("aria-label", `Download picture ${index}`);
  const caption = document.createElement("figcaption");
  caption.append(`index ${index}, seed ${seed}`, link);
  const figure = document.createElement("figure");
  figure.append(image, caption);
  const item = document.createElement("li");
  item.append(figure);
  return item;
}

function clearResults() {
  element("pictures").replaceChildren();
  element("notices").replaceChildren();
  element("error").hidden = element("again").hidden = true;
  element("progress").value = 0;
  say("");
}

function showCommand(command, asked) {
  element("command").textContent = command;
  element("again").hidden = false;
  element("again-files").hidden = !asked.mask;
}

function setBusy(busy) {
  element("generate").disabled = busy;
  element("cancel").hidden = element("progress").hidden = !busy;
}

function say(text) {
  element("status").textContent = text;
}

function fail(text) {
  say("");
  element("error").textContent = text[0].toUpperCase() + text.slice(1);
  element("error").hidden = false;
}

async function copyCommand() {
  try {
    await navigator.clipboard.writeText(element("command").textContent);
  } catch {
    // Browsers give the clipboard to local and encrypted pages alone.
    getSelection().selectAllChildren(element("command"));
    return;
  }
  element("copy").textContent = "Copied";
  setTimeout(() => (element("copy").textContent = "Copy"), 1500);
}

// ---- the image that is begun with

async function chooseFile() {
  const file = element("file").files[0];
  element("error").hidden = true;
  if (!file) return removeFile();
  try {
    const bitmap = await createImageBitmap(file);
    upload = { bitmap, data: (await dataUrl(file)).split(",")[1] };
  } catch {
    removeFile();
    return fail("This file is not an image that can be read.");
  }
  painted = new Array(release.grid ** 2).fill(false);
  cursor = 0;
  element("editor").hidden = false;
  draw();
}

function removeFile() {
  upload = painted = null;
  element("file").value = "";
  element("editor").hidden = true;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function paints() {
  return document.querySelector('input[name="part"]:checked').value === "mask";
}

function isNew(cell) {
  if (paints()) return painted[cell];
  return Math.floor(cell / release.grid) >= Number(element("rows").value);
}

function draw() {
  if (!upload) return;
  const context = canvas.getContext("2d");
  const { bitmap } = upload;
  const side = Math.min(bitmap.width, bitmap.height);
  const [left, top] = [(bitmap.width - side) / 2, (bitmap.height - side) / 2];
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = side > SMALL;
  context.drawImage(bitmap, left, top, side, side, 0, 0, canvas.width, canvas.height);
  const cell = canvas.width / release.grid;
  for (let i = 0; i < painted.length; i++) {
    const [x, y] = [(i % release.grid) * cell, Math.floor(i / release.grid) * cell];
    if (isNew(i)) {
      context.fillStyle = "rgba(36, 86, 201, 0.72)";
      context.fillRect(x, y, cell, cell);
    }
    context.strokeStyle = "rgba(128, 128, 128, 0.35)";
    context.strokeRect(x, y, cell, cell);
  }
  drawCursor(context, cell);
  showPart();
}

function drawCursor(context, cell) {
  if (document.activeElement !== canvas || !paints()) return;
  context.lineWidth = 3;
  context.strokeStyle = "#e0461b";
  const [x, y] = [cursor % release.grid, Math.floor(cursor / release.grid)];
  context.strokeRect(x * cell + 1.5, y * cell + 1.5, cell - 3, cell - 3);
  context.lineWidth = 1;
}

function showPart() {
  element("paint-tools").hidden = !paints();
  element("row-tools").hidden = paints();
  element("rows-shown").textContent = `${element("rows").value} of ${release.grid}`;
  if (paints()) element("mask").href = maskUrl();
}

// White where the image is kept; of its proportions, at the size that the model sees.
function maskUrl() {
  const { bitmap } = upload;
  const side = Math.min(bitmap.width, bitmap.height);
  const mask = document.createElement("canvas");
  mask.width = Math.round((bitmap.width * release.image_size) / side);
  mask.height = Math.round((bitmap.height * release.image_size) / side);
  const left = Math.floor((mask.width - release.image_size + 1) / 2);
  const top = Math.floor((mask.height - release.image_size + 1) / 2);
  const context = mask.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, mask.width, mask.height);
  context.fillStyle = "#000";
  const cell = release.image_size / release.grid;
  painted.forEach((isPainted, i) => {
    const [x, y] = [i % release.grid, Math.floor(i / release.grid)];
    if (isPainted) context.fillRect(left + x * cell, top + y * cell, cell, cell);
  });
  return mask.toDataURL("image/png");
}

// Where the pointer is, in cells.
function place(event) {
  const box = canvas.getBoundingClientRect();
  const at = (where, start, length) => ((where - start) / length) * release.grid;
  return [at(event.clientX, box.left, box.width), at(event.clientY, box.top, box.height)];
}

function beginStroke(event) {
  if (!upload || !paints() || event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  const [x, y] = place(event);
  stroke = { x, y, paint: !painted[Math.floor(y) * release.grid + Math.floor(x)] };
  goOnWithStroke(event);
}

// A quick pointer is told of at places far apart.
function goOnWithStroke(event) {
  if (!stroke || !upload) return;
  const [x, y] = place(event);
  const steps = Math.ceil(2 * Math.hypot(x - stroke.x, y - stroke.y)) || 1;
  for (let i = 1; i <= steps; i++) {
    dab(stroke.x + ((x - stroke.x) * i) / steps, stroke.y + ((y - stroke.y) * i) / steps);
  }
  [stroke.x, stroke.y] = [x, y];
  draw();
}

function dab(x, y) {
  const radius = Number(element("brush").value) / 2;
  painted.forEach((_, i) => {
    const across = (i % release.grid) + 0.5 - x;
    const down = Math.floor(i / release.grid) + 0.5 - y;
    const inside = Math.abs(across) <= 0.5 && Math.abs(down) <= 0.5;
    if (inside || Math.hypot(across, down) < radius) painted[i] = stroke.paint;
  });
}

function paintByKey(event) {
  if (!upload || !paints()) return;
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const step = steps[event.key];
  if (!step && event.key !== " ") return;
  event.preventDefault();
  if (step) {
    const inside = (value) => Math.min(Math.max(value, 0), release.grid - 1);
    const x = inside((cursor % release.grid) + step[0]);
    const y = inside(Math.floor(cursor / release.grid) + step[1]);
    cursor = y * release.grid + x;
  } else {
    painted[cursor] = !painted[cursor];
  }
  draw();
}

element("form").addEventListener("submit", generate);
element("cancel").addEventListener("click", () => running?.abort());
element("copy").addEventListener("click", copyCommand);
element("file").addEventListener("change", chooseFile);
element("remove").addEventListener("click", removeFile);
element("clear").addEventListener("click", () => (painted.fill(false), draw()));
element("rows").addEventListener("input", draw);
document.querySelectorAll('input[name="part"]').forEach((choice) => {
  choice.addEventListener("change", draw);
});
element("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  element("form").requestSubmit();
});
canvas.addEventListener("pointerdown", beginStroke);
canvas.addEventListener("pointermove", goOnWithStroke);
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => (stroke = null));
}
canvas.addEventListener("keydown", paintByKey);
canvas.addEventListener("focus", draw);
canvas.addEventListener("blur", draw);
start();
