// The embedding view: points of a plane; each shows the region of a picture and the sentence it stands for.
// `data` holds columns of bytes (see medvis.widgets.embedding); texts only ever enter the page as text.

const NEAR = 14; // pixels from the pointer within which a point is found

function array(view, Type) {
  return new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

function unpack(data) {
  const n = data.texts.length;
  return {
    n, texts: data.texts,
    x: array(data.x, Float32Array), y: array(data.y, Float32Array),
    picture: array(data.picture, Int32Array), box: array(data.box, Float32Array),
    jpeg: data.jpeg, ends: array(data.ends, Int32Array),
    columns: data.columns.map((column) => ({ ...column, of: array(column.of, column.names ? Int32Array : Float32Array) })),
  };
}

function make(tag, parent, properties = {}, attributes = {}) {
  const node = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent?.append(node);
  return node;
}

// Points by cells of a square grid, so that the ones near a place are found without asking all.
class Cells {
  constructor({ n, x, y }) {
    this.low = [bounds(x)[0], bounds(y)[0]];
    this.side = Math.max(1, Math.min(256, Math.round(Math.sqrt(n / 2))));
    this.pitch = Math.max(span(x), span(y), 1e-9) / this.side;
    this.members = new Map();
    for (let i = 0; i < n; i++) {
      const key = this.key(this.column(x[i], 0), this.column(y[i], 1));
      if (!this.members.has(key)) this.members.set(key, []);
      this.members.get(key).push(i);
    }
  }
  column(value, axis) { return Math.min(this.side - 1, Math.max(0, Math.floor((value - this.low[axis]) / this.pitch))); }
  key(column, row) { return row * this.side + column; }
  * within(x, y, reach) {
    for (let row = this.column(y - reach, 1); row <= this.column(y + reach, 1); row++) {
      for (let column = this.column(x - reach, 0); column <= this.column(x + reach, 0); column++) {
        yield* this.members.get(this.key(column, row)) ?? [];
      }
    }
  }
}

function bounds(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  return low <= high ? [low, high] : [0, 0];
}

function span(values) { const [low, high] = bounds(values); return high - low; }

function inside(polygon, x, y) {
  let within = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [ax, ay] = polygon[i], [bx, by] = polygon[j];
    if ((ay > y) !== (by > y) && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) within = !within;
  }
  return within;
}

function shuffled(n) { // always the same, so that no colour lies on top of all others
  const order = Uint32Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1, state = 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = state % (i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

const TOOLS = [["pan", "Move"], ["box", "Box"], ["lasso", "Lasso"]];
const KEYS = [
  ["Hover, or arrow keys", "go from point to point"], ["Click, Enter", "select a point, or take it back"],
  ["Shift + drag", "add a box to the selection"], ["Escape", "forget the selection"], ["Drag, Shift + arrows", "move the plane"],
  ["Wheel (after a click), Ctrl + wheel, + and −", "zoom"], ["0", "show all"], ["Double click in the legend", "show one kind alone"],
];

function skeleton(el) {
  // the attribute keeps JupyterLab's own keys away
  const root = make("div", el, { className: "medvis embedding" }, { "data-lm-suppress-shortcuts": "true" });
  const tools = make("div", root, { className: "row tools" });
  const label = make("label", tools, { textContent: "Colour " });
  const parts = { root, colour: make("select", label) };
  const modes = make("span", tools, { className: "segments" }, { role: "group", "aria-label": "What dragging does" });
  parts.modes = TOOLS.map(([mode, name]) => make("button", modes, { textContent: name, type: "button" }, { "data-mode": mode }));
  const zooms = make("span", tools, { className: "segments" }, { role: "group", "aria-label": "Zoom" });
  parts.zooms = [["−", "Zoom out", 0.7], ["+", "Zoom in", 1.4], ["All", "Show all points", 0]].map(([text, name, factor]) =>
    [make("button", zooms, { textContent: text, type: "button" }, { "aria-label": name, title: name }), factor]);
  parts.status = make("span", tools, { className: "soft status" });
  const stage = make("div", root, { className: "stage" });
  parts.plot = make("div", stage, { className: "plot" });
  parts.points = make("canvas", parts.plot, {}, { "aria-hidden": "true" });
  parts.over = make("canvas", parts.plot, { tabIndex: 0 }, { role: "application", "aria-roledescription": "scatter plot" });
  parts.card = make("div", stage, { className: "card" });
  parts.legend = make("div", root, { className: "row legend" }, { role: "group", "aria-label": "Kinds of points" });
  parts.chosen = make("div", root, { className: "chosen" }, { role: "group", "aria-label": "Selected points" });
  const keys = make("details", root, { className: "keys soft" });
  make("summary", keys, { textContent: "Keys and mouse" });
  const list = make("dl", keys);
  for (const [key, does] of KEYS) { make("dt", list, { textContent: key }); make("dd", list, { textContent: does }); }
  parts.live = make("div", root, { className: "unseen" }, { "aria-live": "polite" });
  return parts;
}

// Pictures are decoded when they are first looked at; the last hundred are kept.
function pictureBook(points) {
  const kept = new Map();
  return (k) => {
    const existing = kept.get(k);
    kept.delete(k);
    const start = k ? points.ends[k - 1] : 0, view = points.jpeg;
    const bytes = () => new Blob([new Uint8Array(view.buffer, view.byteOffset + start, points.ends[k] - start)], { type: "image/jpeg" });
    kept.set(k, existing ?? createImageBitmap(bytes()));
    if (kept.size > 100) kept.delete(kept.keys().next().value);
    return kept.get(k);
  };
}

// Draw a picture, whole or the surroundings of a box, with the box outlined.
function drawRegion(canvas, bitmap, [x0, y0, x1, y1], close, colour, line = canvas.width / 80) {
  const side = canvas.width, { width, height } = bitmap, context = canvas.getContext("2d");
  const wide = close ? Math.min(1, Math.max(0.3, 2 * (x1 - x0), (2 * (y1 - y0) * height) / width)) : 1;
  const tall = close ? Math.min(1, (wide * width) / height) : 1;
  const left = Math.min(1 - wide, Math.max(0, (x0 + x1 - wide) / 2)), top = Math.min(1 - tall, Math.max(0, (y0 + y1 - tall) / 2));
  canvas.height = Math.round((side * tall * height) / (wide * width));
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, left * width, top * height, wide * width, tall * height, 0, 0, side, canvas.height);
  if (x1 - x0 > 0.999 && y1 - y0 > 0.999) return;
  const at = (x, y) => [((x - left) / wide) * side, ((y - top) / tall) * canvas.height];
  for (const [width, stroke] of [[1.8 * line, "#000"], [line, colour]]) {
    const [a, b] = at(x0, y0), [c, d] = at(x1, y1);
    Object.assign(context, { lineWidth: width, strokeStyle: stroke });
    context.strokeRect(a, b, c - a, d - b);
  }
}

class View {
  constructor(model, el) {
    Object.assign(this, { model, el, parts: skeleton(el), emphasis: null, theme: {}, size: null });
    this.load();
    this.listen();
    this.observe();
  }

  // ---- what is shown
  load() {
    this.points = unpack(this.model.get("data"));
    this.cells = new Cells(this.points);
    this.order = shuffled(this.points.n);
    this.book = pictureBook(this.points);
    this.parts.colour.replaceChildren(...this.points.columns.filter((c) => c.offered).map((c) => make("option", null, { value: c.name, textContent: c.name })));
    this.parts.colour.parentElement.hidden = !this.parts.colour.options.length;
    this.parts.over.setAttribute("aria-label", `Plane of ${this.points.n} points. Arrow keys go from point to point, Enter selects.`);
    this.recolour();
    this.showCard();
  }

  recolour() {
    this.column = this.points.columns.find((c) => c.name === this.model.get("colour") && c.offered);
    this.parts.colour.value = this.column?.name ?? "";
    this.buildLegend();
    this.rehide();
  }

  rehide() {
    const hidden = new Set(this.model.get("hidden"));
    this.shown = (i) => !(this.column?.names && hidden.has(this.column.names[this.column.of[i]]));
    for (const button of this.parts.legend.querySelectorAll("[data-kind]")) button.setAttribute("aria-pressed", !hidden.has(button.dataset.kind));
    this.reselect();
  }

  reselect() {
    this.selected = new Set(this.model.get("selection"));
    const visible = this.shown ? this.order.reduce((sum, i) => sum + this.shown(i), 0) : this.points.n;
    const many = (n) => n.toLocaleString("en");
    this.parts.status.textContent = `${many(visible)} points` + (this.selected.size ? `, ${many(this.selected.size)} selected` : "");
    this.buildChosen();
    this.draw();
  }

  colourOf(i) {
    const { column } = this;
    if (!column) return this.theme.accent;
    if (column.names) return column.colours[column.of[i]];
    const share = (column.of[i] - column.low) / (column.high - column.low || 1);
    return Number.isNaN(share) ? this.theme.soft : column.colours[Math.round(Math.min(1, Math.max(0, share)) * (column.colours.length - 1))];
  }

  // ---- drawing
  resolve() { // the theme's colours as the browser mixes them
    const probe = make("i", this.parts.root);
    const colour = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
    this.theme = Object.fromEntries(["ground", "ink", "soft", "line", "accent"].map((name) => [name, colour(name)]));
    probe.remove();
    this.sprites = new Map();
  }

  fit() {
    const [width, height] = this.size, { x, y } = this.points;
    this.centre = [bounds(x), bounds(y)].map(([low, high]) => (low + high) / 2);
    this.whole = this.zoom = 0.92 * Math.min(width / (span(x) || 1), height / (span(y) || 1));
    this.draw();
  }

  toScreen(i) {
    return [(this.points.x[i] - this.centre[0]) * this.zoom + this.size[0] / 2, this.size[1] / 2 - (this.points.y[i] - this.centre[1]) * this.zoom];
  }

  toPlane(left, top) {
    return [(left - this.size[0] / 2) / this.zoom + this.centre[0], (this.size[1] / 2 - top) / this.zoom + this.centre[1]];
  }

  get radius() {
    const base = Math.min(5.5, Math.max(1.7, 8 - 1.45 * Math.log10(this.points.n + 1)));
    return base * Math.min(2, (this.zoom / this.whole) ** 0.3);
  }

  sprite(colour, radius) {
    const key = `${colour} ${radius}`;
    if (!this.sprites.has(key)) {
      const side = Math.ceil(2 * radius + 3), canvas = make("canvas", null, { width: side * this.dpr, height: side * this.dpr });
      const context = canvas.getContext("2d");
      context.scale(this.dpr, this.dpr);
      context.arc(side / 2, side / 2, radius, 0, 7);
      Object.assign(context, { fillStyle: colour, strokeStyle: this.theme.ground, lineWidth: 0.7 });
      context.fill();
      context.stroke();
      this.sprites.set(key, canvas);
    }
    return this.sprites.get(key);
  }

  draw() {
    if (this.size) this.waiting ??= requestAnimationFrame(() => { this.waiting = null; this.drawPoints(); this.drawOver(); });
  }

  drawPoints() {
    const context = this.parts.points.getContext("2d"), [width, height] = this.size, radius = Math.round(this.radius * 4) / 4;
    const bright = this.emphasis ?? (this.selected.size ? (i) => this.selected.has(i) : () => true);
    context.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    context.clearRect(0, 0, width, height);
    const layers = [[], [], []]; // faint, grey, coloured
    for (const i of this.order) {
      if (this.shown(i)) layers[bright(i) ? (this.column?.names && this.column.of[i] >= this.column.quiet ? 1 : 2) : 0].push(i);
    }
    for (const [pass, layer] of layers.entries()) {
      context.globalAlpha = pass ? 0.88 : 0.14;
      for (const i of layer) {
        const [left, top] = this.toScreen(i);
        if (left < -9 || top < -9 || left > width + 9 || top > height + 9) continue;
        const sprite = this.sprite(this.colourOf(i), radius), half = sprite.width / this.dpr / 2;
        context.drawImage(sprite, left - half, top - half, 2 * half, 2 * half);
      }
    }
  }

  drawOver() {
    if (!this.size) return;
    const context = this.parts.over.getContext("2d"), focus = this.model.get("focus");
    context.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    context.clearRect(0, 0, ...this.size);
    if (focus >= 0 && focus < this.points.n && this.shown(focus)) {
      const [left, top] = this.toScreen(focus);
      for (const [line, colour] of [[5, this.theme.ground], [2.2, this.theme.ink]]) {
        context.beginPath();
        context.arc(left, top, this.radius + 4, 0, 7);
        Object.assign(context, { lineWidth: line, strokeStyle: colour });
        context.stroke();
      }
    }
    if (!this.fence) return;
    context.beginPath();
    for (const corner of this.fence) context.lineTo(...corner);
    context.closePath();
    Object.assign(context, { lineWidth: 1.5, strokeStyle: this.theme.accent, fillStyle: this.theme.accent, globalAlpha: 0.12 });
    context.fill();
    context.globalAlpha = 1;
    context.stroke();
  }

  // ---- one point
  showCard() {
    const { card } = this.parts, { points } = this, i = this.model.get("focus");
    card.replaceChildren();
    if (i < 0 || i >= points.n) return void make("p", card, { className: "soft", textContent: "Point at a point to see what it stands for." });
    if (points.picture[i] >= 0) this.showPictures(make("div", card, { className: "films" }), i);
    if (points.texts[i]) make("p", card, { className: "report", textContent: points.texts[i] });
    const list = make("dl", card);
    for (const column of points.columns) {
      const value = column.names ? column.names[column.of[i]] : Number.isNaN(column.of[i]) ? "–" : Number(column.of[i].toPrecision(4)).toString();
      make("dt", list, { textContent: column.name });
      make("dd", list, { textContent: value, className: column === this.column ? "now" : "" }).style.setProperty("--c", column === this.column ? this.colourOf(i) : "transparent");
    }
  }

  showPictures(films, i) {
    const box = this.points.box.subarray(4 * i, 4 * i + 4), close = box[2] - box[0] < 0.999 || box[3] - box[1] < 0.999;
    const canvases = [["whole picture, the region outlined", false], ...(close ? [["region, enlarged", true]] : [])].map(([name, near]) =>
      [make("canvas", films, { width: 320, height: 320 }, { role: "img", "aria-label": name }), near]);
    this.book(this.points.picture[i]).then((bitmap) => {
      for (const [canvas, near] of canvases) drawRegion(canvas, bitmap, box, near, this.colourOf(i));
      films.dataset.drawn = i;
    });
  }

  visit(i, { speak = false } = {}) {
    if (i === this.model.get("focus")) return;
    this.model.set("focus", i);
    clearTimeout(this.saving);
    this.saving = setTimeout(() => this.model.save_changes(), 120); // the kernel need not follow every twitch
    if (speak && i >= 0) {
      const kind = this.column?.names ? `${this.column.names[this.column.of[i]]}. ` : "";
      this.parts.live.textContent = `Point ${i + 1} of ${this.points.n}. ${kind}${this.points.texts[i]}${this.selected.has(i) ? " Selected." : ""}`;
    }
  }

  nearest(left, top) {
    const [x, y] = this.toPlane(left, top);
    let best = -1, least = NEAR ** 2;
    for (const i of this.cells.within(x, y, NEAR / this.zoom)) {
      if (!this.shown(i)) continue;
      const [a, b] = this.toScreen(i), far = (a - left) ** 2 + (b - top) ** 2;
      if (far < least) [best, least] = [i, far];
    }
    return best;
  }

  neighbour(dx, dy) { // the next point in a direction
    const from = this.model.get("focus");
    if (from < 0 || !this.shown(from)) return this.order.find((i) => this.shown(i)) ?? -1;
    const [x, y] = this.toScreen(from);
    let best = from, least = Infinity;
    for (const i of this.order) {
      if (i === from || !this.shown(i)) continue;
      const [a, b] = this.toScreen(i), along = (a - x) * dx + (b - y) * dy, aside = Math.abs((a - x) * dy - (b - y) * dx);
      if (along > 1e-3 && along >= aside && along + 2 * aside < least) [best, least] = [i, along + 2 * aside];
    }
    return best;
  }

  // ---- many points
  select(indices) {
    this.model.set("selection", Array.from(indices).sort((a, b) => a - b));
    this.model.save_changes();
  }

  toggle(i) {
    const next = new Set(this.selected);
    if (!next.delete(i)) next.add(i);
    this.select(next);
  }

  enclose(add) {
    const next = new Set(add ? this.selected : []);
    for (let i = 0; i < this.points.n; i++) if (this.shown(i) && inside(this.fence, ...this.toScreen(i))) next.add(i);
    this.select(next);
  }

  buildChosen() {
    const { chosen } = this.parts, first = [...this.selected].slice(0, 24);
    chosen.replaceChildren();
    for (const i of first) {
      if (!(i < this.points.n)) continue;
      const name = this.points.texts[i] || `point ${i + 1}`;
      const button = make("button", chosen, { type: "button", title: name }, { "aria-label": name });
      button.addEventListener("pointerenter", () => this.visit(i));
      button.addEventListener("focus", () => this.visit(i));
      button.addEventListener("click", () => { this.centre = [this.points.x[i], this.points.y[i]]; this.draw(); });
      if (this.points.picture[i] < 0) { button.textContent = i + 1; continue; }
      const canvas = make("canvas", button, { width: 128, height: 128 }, { "aria-hidden": "true" });
      const box = this.points.box.subarray(4 * i, 4 * i + 4), close = box[2] - box[0] < 0.999 || box[3] - box[1] < 0.999;
      this.book(this.points.picture[i]).then((bitmap) => drawRegion(canvas, bitmap, box, close, this.colourOf(i), 5));
    }
    if (this.selected.size > first.length) make("span", chosen, { className: "soft", textContent: `and ${this.selected.size - first.length} more` });
    if (this.selected.size) make("button", chosen, { type: "button", textContent: "Forget", className: "plain" }).addEventListener("click", () => this.select([]));
  }

  // ---- legend
  buildLegend() {
    const { legend } = this.parts, { column } = this;
    legend.replaceChildren();
    if (!column) return;
    if (!column.names) {
      make("span", legend, { textContent: column.low.toPrecision(3) });
      make("span", legend, { className: "bar" }, { role: "img", "aria-label": "colours from low to high" }).style.background =
        `linear-gradient(90deg, ${column.colours.join(",")})`;
      make("span", legend, { textContent: column.high.toPrecision(3) });
      return;
    }
    const counts = new Int32Array(column.names.length);
    for (const code of column.of) counts[code]++;
    column.names.forEach((name, code) => {
      const button = make("button", legend, { type: "button", className: "kind" }, { "aria-pressed": "true", "data-kind": name });
      make("i", button).style.background = column.colours[code];
      make("span", button, { textContent: name });
      make("small", button, { textContent: counts[code].toLocaleString("en"), className: "soft" });
      const light = (on) => { this.emphasis = on ? (i) => column.of[i] === code : null; this.draw(); };
      for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => light(true));
      for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => light(false));
      button.addEventListener("click", () => this.hide((hidden) => (hidden.includes(name) ? hidden.filter((one) => one !== name) : [...hidden, name])));
      button.addEventListener("dblclick", () => this.hide(() => column.names.filter((one) => one !== name)));
    });
    const all = make("button", legend, { type: "button", textContent: "All", className: "plain" }, { "aria-label": "Show all kinds" });
    all.addEventListener("click", () => this.hide(() => []));
    const none = make("button", legend, { type: "button", textContent: "None", className: "plain" }, { "aria-label": "Hide all kinds" });
    none.addEventListener("click", () => this.hide(() => [...column.names]));
  }

  hide(change) {
    this.model.set("hidden", change(this.model.get("hidden")));
    this.model.save_changes();
  }

  // ---- mouse, keys, model
  zoomBy(factor, left = this.size[0] / 2, top = this.size[1] / 2) {
    if (!factor) return this.fit();
    const [x, y] = this.toPlane(left, top);
    this.zoom = Math.min(200 * this.whole, Math.max(0.3 * this.whole, this.zoom * factor));
    const [nx, ny] = this.toPlane(left, top);
    this.centre = [this.centre[0] + x - nx, this.centre[1] + y - ny];
    this.draw();
  }

  panBy(dx, dy) { this.centre = [this.centre[0] - dx / this.zoom, this.centre[1] + dy / this.zoom]; this.draw(); }

  place(event) {
    const frame = this.parts.over.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  }

  pressed(event) {
    if (event.button) return;
    const start = this.place(event), tool = event.shiftKey && this.model.get("mode") === "pan" ? "box" : this.model.get("mode");
    this.drag = { start, last: start, tool, moved: false };
    this.parts.over.setPointerCapture(event.pointerId);
  }

  moved(event) {
    const here = this.place(event), { drag } = this;
    if (!drag) return this.visit(this.nearest(...here));
    drag.moved ||= Math.hypot(here[0] - drag.start[0], here[1] - drag.start[1]) > 4;
    if (drag.tool === "pan") this.panBy(here[0] - drag.last[0], here[1] - drag.last[1]);
    else if (drag.moved) {
      const [[a, b], [c, d]] = [drag.start, here];
      this.fence = drag.tool === "box" ? [[a, b], [c, b], [c, d], [a, d]] : [...(this.fence ?? [drag.start]), here];
      this.draw();
    }
    drag.last = here;
  }

  released(event) {
    const { drag } = this;
    this.drag = null;
    if (!drag) return;
    if (this.fence) this.enclose(event.shiftKey);
    else if (!drag.moved) { const i = this.nearest(...drag.start); if (i >= 0) this.toggle(i); }
    this.fence = null;
    this.draw();
  }

  key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (step && event.shiftKey) this.panBy(-60 * step[0], -60 * step[1]);
    else if (step) { this.visit(this.neighbour(...step), { speak: true }); this.keepInSight(); }
    else if (event.key === "Enter" || event.key === " ") { if (this.model.get("focus") >= 0) this.toggle(this.model.get("focus")); }
    else if (event.key === "Escape") { this.fence = this.drag = null; this.select([]); }
    else if (event.key === "+" || event.key === "=") this.zoomBy(1.4);
    else if (event.key === "-") this.zoomBy(0.7);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  keepInSight() {
    const i = this.model.get("focus");
    if (i < 0) return;
    const [left, top] = this.toScreen(i), [width, height] = this.size;
    if (left < 12 || top < 12 || left > width - 12 || top > height - 12) { this.centre = [this.points.x[i], this.points.y[i]]; this.draw(); }
  }

  listen() {
    const { over, colour, modes, zooms } = this.parts, { model } = this;
    over.addEventListener("pointerdown", (event) => this.pressed(event));
    over.addEventListener("pointermove", (event) => this.moved(event));
    over.addEventListener("pointerup", (event) => this.released(event));
    over.addEventListener("pointercancel", () => { this.drag = this.fence = null; this.draw(); });
    over.addEventListener("keydown", (event) => this.key(event));
    over.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && document.activeElement !== over && this.el.getRootNode().activeElement !== over) return;
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY * 0.0016), ...this.place(event));
    }, { passive: false });
    colour.addEventListener("change", () => { model.set("hidden", []); model.set("colour", colour.value); model.save_changes(); });
    for (const button of modes) button.addEventListener("click", () => { model.set("mode", button.dataset.mode); model.save_changes(); });
    for (const [button, factor] of zooms) button.addEventListener("click", () => this.zoomBy(factor));
    const follow = {
      data: () => { this.load(); this.fit(); }, colour: () => { this.recolour(); this.showCard(); }, hidden: () => this.rehide(),
      selection: () => this.reselect(), focus: () => { this.showCard(); this.drawOver(); }, mode: () => this.showMode(),
    };
    this.following = Object.entries(follow).map(([name, act]) => [`change:${name}`, act]);
    for (const [event, act] of this.following) model.on(event, act);
    this.showMode();
  }

  showMode() {
    const mode = this.model.get("mode");
    for (const button of this.parts.modes) button.setAttribute("aria-pressed", button.dataset.mode === mode);
    this.parts.over.dataset.mode = mode;
  }

  observe() {
    const measure = () => {
      const { width, height } = this.parts.plot.getBoundingClientRect(), first = !this.size;
      if (!width) return;
      [this.size, this.dpr] = [[width, height], window.devicePixelRatio || 1];
      for (const canvas of [this.parts.points, this.parts.over]) Object.assign(canvas, { width: width * this.dpr, height: height * this.dpr });
      this.resolve();
      first ? this.fit() : this.draw();
      this.el.dataset.ready = "1";
    };
    const dress = () => { this.resolve(); this.showCard(); this.draw(); };
    this.watchers = [new ResizeObserver(measure), new MutationObserver(dress)];
    this.watchers[0].observe(this.parts.plot);
    this.watchers[1].observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.scheme.addEventListener("change", (this.dress = dress));
  }

  close() {
    for (const watcher of this.watchers) watcher.disconnect();
    this.scheme.removeEventListener("change", this.dress);
    for (const [event, act] of this.following) this.model.off(event, act);
    cancelAnimationFrame(this.waiting);
  }
}

function render({ model, el }) {
  const view = new View(model, el);
  return () => view.close();
}

export default { render };
