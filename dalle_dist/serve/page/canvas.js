"use strict";
// The image that is begun with, and what of it is kept. page.js has the rest of the page.

const SMALL = 128; // pixels per side up to which a picture is shown with its pixels
const element = (id) => document.getElementById(id);
const canvas = element("canvas");
let release = null; // what /api/release says
let upload = null; // {bitmap, data}: the image that is begun with
let painted = null; // one boolean per cell of the grid, row by row
let cursor = 0; // the cell that the keyboard is at
let stroke = null; // {x, y, paint}: where the pointer was last, and what it leaves

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

element("file").addEventListener("change", chooseFile);
element("remove").addEventListener("click", removeFile);
element("clear").addEventListener("click", () => (painted.fill(false), draw()));
element("rows").addEventListener("input", draw);
document.querySelectorAll('input[name="part"]').forEach((choice) => {
  choice.addEventListener("change", draw);
});
canvas.addEventListener("pointerdown", beginStroke);
canvas.addEventListener("pointermove", goOnWithStroke);
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => (stroke = null));
}
canvas.addEventListener("keydown", paintByKey);
canvas.addEventListener("focus", draw);
canvas.addEventListener("blur", draw);
