"use strict";
// The form, the request and its pictures. canvas.js, which is read before, has the image that is
// begun with.

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
    const megabytes = Math.floor(release.most_bytes / 2 ** 20);
    if (body.length > release.most_bytes) {
      throw new Error(`The request has more than ${megabytes} MB; take a smaller image.`);
    }
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

element("form").addEventListener("submit", generate);
element("cancel").addEventListener("click", () => running?.abort());
element("copy").addEventListener("click", copyCommand);
element("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  element("form").requestSubmit();
});
start();
