// Which words go with which regions: the radiograph once for every run, beside its report, and a browser of studies around them.
// The kernel sends a study when it is asked for it; from then on all scores are here, and nothing that moves waits for the kernel.
//
//   app    one view: its model, study, hover, zoom, and the elements that change
//   study  picture, pieces of text, outlines, and for every run its scores, item after item, and its targets (see `decode`)
//   picks  { words, sentences, prototypes }, lists of items that are shown together
//   box    [x0, y0, x1, y1] in shares of the picture; a hovered region is a box too, so that runs of any grid can answer

const GRAINS = ["words", "sentences", "prototypes"];
const NO_PICKS = { words: [], sentences: [], prototypes: [] };
const OUTLINE = "#35d6ed", SAID = "#d9a8ff", BOX = "#ffd54a"; // drawn by somebody; the place that the report names
const HEAT_SIDE = 160; // pixels of a smooth map
const KEPT_STUDIES = 24;
const STOPS = {
  inferno: "000004 110a30 320a5e 57106e 781c6d 9a2865 bc3754 d84c3e ed6925 f98e09 fbb61a f4df53 fcffa4",
  magma: "000004 100b2d 2c115f 51127c 721f81 932b80 b73779 d8456c f1605d fc8961 feb078 fed799 fcfdbf",
  viridis: "440154 481f70 443983 3b528b 31688e 287c8e 21918c 20a486 35b779 5ec962 90d743 c8e020 fde725",
  cividis: "00224e 003170 2a3f6d 434e6c 575d6d 6a6c71 7d7c78 918b78 a59c74 bcae6c d2c060 e9d34e fee838",
};
const TOOLS = { select: "Select", window: "Window", pan: "Pan" };
const JUDGED = { // what a hit is, in the whole data set
  drawn: "Hits are counted against what is drawn.",
  said: "Hits are counted against the places that the reports name: nothing is drawn in this data set.",
  nothing: "No hits are counted: nothing is drawn in this data set, and there are no reports.",
};
const TEXTS = { report: "", label: "Phrases from labels (there are no reports)", absent: "Phrases that labels say this image does not show", typed: "Your phrases" };
const ORDERS = { data: "As in the data", alignment: "Worst alignment first", misses: "Most misses first" };
const KEYS = [
  ["Tab", "from control to control, to the pictures, into the report"],
  ["← → ↑ ↓", "picture: region by region (Shift: a larger box); report: word by word, sentence by sentence"],
  ["Enter, Space", "pin or unpin; pinned items combine"], ["Esc", "unpin all"],
  ["n, p", "next, previous study"], ["+ − 0", "picture: zoom in, out, all of it; Alt and arrows pan"],
  ["w, W, l, L", "picture: narrower or wider window, lower or higher level"],
  ["Mouse", "drag a box; right button: window and level; middle button: pan; Ctrl and wheel: zoom; double click: all of it"],
];

/* ------------------------------------------------------------------ elements */

// An element with attributes, listeners and children. Text is only ever set as text.
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (typeof value === "boolean" || name === "value") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const button = (text, label, click, more = {}) => h("button", { type: "button", "aria-label": label, title: label, click, ...more }, text);
const labelled = (text, control) => h("label", { class: "control" }, h("span", {}, text), control);
const press = (element, on) => element.setAttribute("aria-pressed", String(on));

/* ------------------------------------------------------------------ numbers */

function decode(head, buffers) {
  const bytes = buffers.map((view) => view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  const study = { ...head, picture: new Uint8Array(bytes.shift()) };
  study.runs = head.runs.map((run) => {
    const scores = {};
    for (const grain of run.grains) scores[grain] = new Float32Array(bytes.shift());
    return { ...run, scores, count: run.grid[0] * run.grid[1], range: {}, cells: run.cells.map((cells) => new Set(cells)), targets: new Set(run.targets) };
  });
  return study;
}

// Lowest and highest of the numbers that are numbers.
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 0];
}

const share = (value, [low, high]) => (high > low ? Math.min(Math.max((value - low) / (high - low), 0), 1) : 0);
const rise = (t) => t * t * (3 - 2 * t); // how much of a share is seen
const items = (run, grain) => (run.scores[grain] ? run.scores[grain].length / run.count : 0);
const mapOf = (run, grain, item) => run.scores[grain].subarray(item * run.count, (item + 1) * run.count);
const rangeOf = (run, grain) => (run.range[grain] ??= extent(run.scores[grain]));

// The mean map of the picked items that the run knows; null when it knows none.
function combine(run, picks) {
  const maps = GRAINS.flatMap((grain) => picks[grain].filter((i) => i < items(run, grain)).map((i) => mapOf(run, grain, i)))
    .filter((map) => !Number.isNaN(map[0]));
  if (!maps.length) return null;
  const mean = new Float32Array(run.count);
  for (const map of maps) for (let i = 0; i < run.count; i++) mean[i] += map[i] / maps.length;
  return mean;
}

function peakOf(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

// The box of a region, by row and column.
function boxOf(run, row, column) {
  const [h, w] = run.grid, [x0, y0, x1, y1] = run.frame;
  const across = (c) => x0 + (c / w) * (x1 - x0), down = (r) => y0 + (r / h) * (y1 - y0);
  return [across(column), down(row), across(column + 1), down(row + 1)];
}

// Row and column of the region at a point; null outside of what the run sees.
function regionAt(run, [x, y]) {
  const [h, w] = run.grid, [x0, y0, x1, y1] = run.frame;
  const row = Math.floor(((y - y0) / (y1 - y0)) * h), column = Math.floor(((x - x0) / (x1 - x0)) * w);
  return row >= 0 && row < h && column >= 0 && column < w ? [row, column] : null;
}

// The regions whose centres lie in one of the boxes; for a box without any, the one at its middle.
function regionsIn(run, boxes) {
  const found = new Set();
  for (const [x0, y0, x1, y1] of boxes) {
    const before = found.size;
    for (let i = 0; i < run.count; i++) {
      const [a, b, c, d] = boxOf(run, Math.floor(i / run.grid[1]), i % run.grid[1]);
      const x = (a + c) / 2, y = (b + d) / 2;
      if (x >= x0 && x < x1 && y >= y0 && y < y1) found.add(i);
    }
    const middle = found.size === before && regionAt(run, [(x0 + x1) / 2, (y0 + y1) / 2]);
    if (middle) found.add(middle[0] * run.grid[1] + middle[1]);
  }
  return [...found];
}

// The mean score of some regions with each item of a grain.
function profile(run, grain, regions) {
  const scores = new Float32Array(items(run, grain));
  for (let item = 0; item < scores.length; item++) {
    const map = mapOf(run, grain, item);
    for (const region of regions) scores[item] += map[region] / regions.length;
  }
  return scores;
}

// 256 colours as pixels, from the lowest score to the highest; what is low is transparent, what is under the threshold too.
function palette(name, opacity, threshold) {
  const stops = STOPS[name].split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const colours = new Uint8ClampedArray(4 * 256);
  for (let i = 0; i < 256; i++) {
    const t = i / 255, at = t * (stops.length - 1), left = Math.min(Math.floor(at), stops.length - 2);
    stops[left].forEach((value, k) => (colours[4 * i + k] = value + (at - left) * (stops[left + 1][k] - value)));
    colours[4 * i + 3] = t < threshold ? 0 : 255 * opacity * rise(t);
  }
  return new Uint32Array(colours.buffer);
}

/* ------------------------------------------------------------------ what is shown */

const get = (app, name) => app.model.get(name);

function put(app, values) {
  for (const [name, value] of Object.entries(values)) app.model.set(name, value);
  app.model.save_changes();
}

const pinned = (app) => ({ ...NO_PICKS, boxes: [], ...get(app, "selection") });
const shownPicks = (app) => app.hover.picks ?? pinned(app);
const shownBoxes = (app) => (app.hover.box ? [app.hover.box] : pinned(app).boxes);
const shownRuns = (app) => app.study.runs.map((run, k) => k).filter((k) => get(app, "shown").includes(get(app, "runs")[k]));

// Low and high end of the colours for a map: from chance, its mean, to where a region weighs as much as all others together; its own; or those of all maps of its grains.
function scaleOf(app, run, values, grains) {
  const scale = get(app, "scale");
  if (scale === "raw") return extent(grains.flatMap((grain) => rangeOf(run, grain)));
  if (scale === "normalised") return extent(values);
  const read = [...values].filter((value) => !Number.isNaN(value)), mean = read.reduce((sum, value) => sum + value, 0) / (read.length || 1);
  return [mean, mean + (run.temperature ?? 1) * Math.log(Math.max(run.count, 2))];
}

// The outlines, each with its number; a masked report keeps the places that it names. Those of hidden classes are judged, and not drawn.
const hiddenKinds = (app) => get(app, "hidden") ?? [];
const judgedOutlines = (app) => app.study.outlines.map((outline, n) => ({ ...outline, n })).filter((outline) => !(outline.said && get(app, "masked")));
const shownOutlines = (app) => judgedOutlines(app).filter((outline) => !hiddenKinds(app).includes(outline.kind));

// What one run says of what is hovered or pinned: map, its scale, peak, and whether it hits the targets that the text speaks of, or that nobody knows it.
function answer(app, k) {
  const run = app.study.runs[k], picks = shownPicks(app), map = combine(run, picks);
  if (!map) return { run, map };
  const peak = peakOf(map), about = (o) => o.words.some((w) => picks.words.includes(w)) || o.sentences.some((s) => picks.sentences.includes(s));
  const linked = judgedOutlines(app).filter(about), targets = linked.filter((outline) => run.targets.has(outline.n));
  const unsure = linked.filter((outline) => !outline.fits), judged = targets.length ? targets : unsure;
  const grains = GRAINS.filter((grain) => picks[grain].length && run.scores[grain]);
  const verdict = targets.length ? (targets.some((outline) => run.cells[outline.n].has(peak)) ? "hit" : "miss") : unsure.length ? "unknown fit" : "";
  return { run, map, peak, linked, judged, scale: scaleOf(app, run, map, grains), verdict };
}

/* ------------------------------------------------------------------ pictures */

// The radiograph through its window, as a canvas of its own pixels.
function drawGrey(app) {
  const { picture, side } = app.study, [level, width] = get(app, "window"), low = level - width / 2;
  const shade = Uint8ClampedArray.from({ length: 256 }, (_, value) => Math.min(Math.max(((value - low) / width) * 255, 0), 255));
  const pixels = new ImageData(side, side), out = new Uint32Array(pixels.data.buffer);
  for (let i = 0; i < picture.length; i++) out[i] = 0xff000000 + 0x010101 * shade[picture[i]];
  app.grey.width = app.grey.height = side;
  app.grey.getContext("2d").putImageData(pixels, 0, 0);
  app.drawn = null;
}

// The same at the size of the panels, where zoom and pan have put it: hovering only copies it.
function background(app, size) {
  const { scale, x, y } = app.zoom, key = [size, scale, x, y].join();
  if (app.drawn === key) return app.back;
  app.back.width = app.back.height = size;
  const context = app.back.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(app.grey, -x * size * scale, -y * size * scale, size * scale, size * scale);
  app.drawn = key;
  return app.back;
}

// Bilinear between the centres of regions: k pixels a region.
function enlarge(map, [h, w], k) {
  const out = new Float32Array(h * k * w * k);
  const place = (i, n) => { const at = Math.min(Math.max((i + 0.5) / k - 0.5, 0), n - 1), low = Math.min(Math.floor(at), Math.max(n - 2, 0)); return [low, at - low]; };
  const columns = Array.from({ length: w * k }, (_, i) => place(i, w));
  for (let y = 0; y < h * k; y++) {
    const [row, down] = place(y, h), top = row * w, bottom = Math.min(row + 1, h - 1) * w;
    for (let x = 0; x < w * k; x++) {
      const [left, along] = columns[x], right = Math.min(left + 1, w - 1);
      const upper = map[top + left] + along * (map[top + right] - map[top + left]);
      out[y * w * k + x] = upper + down * (map[bottom + left] + along * (map[bottom + right] - map[bottom + left]) - upper);
    }
  }
  return out;
}

// A map in colours, a pixel a region or smooth.
function drawHeat(app, canvas, { run, map, scale: [low, high] }) {
  const k = get(app, "smooth") ? Math.max(1, Math.floor(HEAT_SIDE / Math.max(...run.grid))) : 1;
  const values = k > 1 ? enlarge(map, run.grid, k) : map, [height, width] = run.grid.map((n) => n * k);
  const colours = palette(get(app, "colours"), get(app, "opacity"), get(app, "threshold"));
  const pixels = new ImageData(width, height), out = new Uint32Array(pixels.data.buffer), unit = high > low ? 255 / (high - low) : 0;
  for (let i = 0; i < values.length; i++) out[i] = colours[Math.min(Math.max(Math.round((values[i] - low) * unit), 0), 255)];
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function strokeTwice(context, pixel, colour, width, draw) {
  for (const [style, line] of [["rgba(0,0,0,.65)", width + 2], [colour, width]]) {
    context.strokeStyle = style;
    context.lineWidth = line * pixel;
    context.beginPath();
    draw();
    context.stroke();
  }
}

// A model of another fit, or with a centre crop, sees a part of the picture alone.
const isPart = ({ frame: [x0, y0, x1, y1] }) => Math.min(1 - x0, 1 - y0, x1, y1) < 0.995;

function drawFrame(context, pixel, [x0, y0, x1, y1]) {
  context.setLineDash([2 * pixel, 4 * pixel]);
  context.strokeStyle = "rgba(255,255,255,.75)";
  context.lineWidth = 1.2 * pixel;
  context.strokeRect(x0, y0, x1 - x0, y1 - y0);
  context.setLineDash([]);
}

function drawOutlines(app, context, pixel, linked) {
  const names = new Set((linked ?? []).map((outline) => outline.name));
  for (const { name, said, paths } of shownOutlines(app)) {
    context.setLineDash(said ? [6 * pixel, 4 * pixel] : []);
    strokeTwice(context, pixel, said ? SAID : OUTLINE, names.has(name) ? 2.2 : 1.2, () => {
      for (const path of paths) {
        path.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
        context.closePath();
      }
    });
  }
  context.setLineDash([]);
}

// The names of outlines, at their upper left corners; one that would lie on another goes below it.
function drawNames(app, context, size) {
  const { scale, x, y } = app.zoom, unit = devicePixelRatio;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.font = `600 ${11 * unit}px system-ui, sans-serif`;
  context.lineJoin = "round";
  context.lineWidth = 3 * unit;
  context.strokeStyle = "rgba(0,0,0,.7)";
  const taken = [];
  for (const { name: of, said, fits, paths } of shownOutlines(app)) {
    const name = fits ? of : `${of} ?`; // it may lie elsewhere
    context.fillStyle = said ? SAID : OUTLINE;
    const points = paths.flat();
    if (!points.length) continue;
    const at = (i, from) => (Math.min(...points.map((point) => point[i])) - from) * size * scale, wide = Math.min(context.measureText(name).width, size - 6 * unit);
    const place = [Math.min(Math.max(at(0, x), 2 * unit), size - wide - 4 * unit), Math.max(at(1, y) - 4 * unit, 12 * unit), wide];
    const meets = ([a, b, w]) => Math.abs(b - place[1]) < 12 * unit && a < place[0] + wide && place[0] < a + w;
    while (taken.some(meets)) place[1] += 12 * unit;
    taken.push(place);
    context.strokeText(name, ...place);
    context.fillText(name, ...place);
  }
}

function drawBoxes(app, context, pixel) {
  for (const [x0, y0, x1, y1] of [...pinned(app).boxes, ...(app.hover.box ? [app.hover.box] : [])]) {
    strokeTwice(context, pixel, BOX, 1.6, () => context.rect(x0, y0, x1 - x0, y1 - y0));
  }
}

function drawPanel(app, panel) {
  const context = panel.canvas.getContext("2d"), size = panel.canvas.width, { scale, x, y } = app.zoom, result = answer(app, panel.k);
  const pixel = devicePixelRatio / (size * scale), [fx, fy, gx, gy] = app.study.runs[panel.k].frame;
  panel.result = result;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.drawImage(background(app, size), 0, 0);
  context.setTransform(size * scale, 0, 0, size * scale, -x * size * scale, -y * size * scale);
  if (result.map) {
    drawHeat(app, panel.heat, result);
    context.imageSmoothingEnabled = get(app, "smooth");
    context.drawImage(panel.heat, fx, fy, gx - fx, gy - fy);
  }
  if (isPart(app.study.runs[panel.k])) drawFrame(context, pixel, app.study.runs[panel.k].frame);
  if (get(app, "outlines")) drawOutlines(app, context, pixel, result.linked);
  drawBoxes(app, context, pixel);
  if (result.map) {
    const [a, b, c, d] = boxOf(result.run, Math.floor(result.peak / result.run.grid[1]), result.peak % result.run.grid[1]);
    strokeTwice(context, pixel, "#fff", 1.8, () => context.arc((a + c) / 2, (b + d) / 2, 6 * pixel, 0, 7));
  }
  if (get(app, "outlines")) drawNames(app, context, size);
  tellPanel(app, panel, result);
}

// Decimals with which the largest of some numbers has two digits, and at least two.
function decimals(numbers) {
  const most = Math.max(...numbers.map(Math.abs));
  return most > 0 ? Math.max(2, 1 - Math.floor(Math.log10(most))) : 2;
}

const SIGNS = { hit: "✓", miss: "✗", "unknown fit": "?" };

// Colour bar, badge and the panel's name for those who do not see it.
function tellPanel(app, panel, { run, map, scale, judged, verdict, peak }) {
  panel.bar.style.visibility = map ? "visible" : "hidden";
  panel.badge.hidden = !verdict;
  if (map) {
    const threshold = get(app, "threshold");
    [panel.low.textContent, panel.high.textContent] = scale.map((end) => end.toFixed(decimals(scale)));
    panel.tick.hidden = !threshold;
    panel.tick.style.left = `${100 * threshold}%`;
  }
  if (verdict) {
    panel.badge.dataset.hit = verdict === "unknown fit" ? "unknown" : String(verdict === "hit");
    panel.badge.textContent = `${SIGNS[verdict]} ${verdict} · ${[...new Set(judged.map((outline) => outline.name))].join(", ")}`;
    panel.badge.title = verdict === "unknown fit" ? "It is not known how this picture was made square: the outline may lie elsewhere" : `${panel.badge.textContent}. ${JUDGED[app.study.judged]}`;
  }
  const place = map ? `highest in row ${Math.floor(peak / run.grid[1]) + 1}, column ${(peak % run.grid[1]) + 1}` : "no map";
  panel.canvas.setAttribute("aria-label", `Radiograph with the map of ${get(app, "runs")[panel.k]}: ${place}. Arrow keys move over regions.`);
}

/* ------------------------------------------------------------------ report */

const kindOf = (app, s) => app.study.kinds?.[s] ?? "report";
const hides = (app, s) => get(app, "masked") && kindOf(app, s) === "report"; // labels and what was typed are not the report's
const masked = (app, s, text) => (hides(app, s) ? text.replace(/[\p{L}\p{N}\p{M}]+/gu, "•••") : text);

function itemElement(app, grain, item, tag, attributes, ...children) {
  const element = h(tag, {
    role: "button", tabindex: "-1", "data-grain": grain, "data-item": item, ...attributes,
    pointerenter: () => hoverItem(app, grain, item), pointerleave: () => setHover(app, { picks: null }),
    focus: () => focusItem(app, grain, item), blur: () => setHover(app, { picks: null }),
    click: () => togglePin(app, grain, item),
  }, ...children);
  app.items[grain][item] = element;
  return element;
}

// The shown runs that did not read a word, and that in words.
const unreadBy = (app, word) => shownRuns(app).filter((k) => word < items(app.study.runs[k], "words") && Number.isNaN(mapOf(app.study.runs[k], "words", word)[0]));

function beyond(app, unread) {
  const limits = [...new Set(unread.map((k) => app.study.runs[k].tokens).filter(Boolean))].join(" or ");
  const who = unread.length === shownRuns(app).length ? "the model" : unread.map((k) => get(app, "runs")[k]).join(", ");
  return `beyond the ${limits ? `${limits} ` : ""}tokens that ${who} reads`;
}

function sentenceElement(app, pieces, s) {
  const parts = pieces.map(([text, word]) => {
    if (word < 0) return masked(app, s, text);
    const unread = unreadBy(app, word);
    return itemElement(app, "words", word, "span", unread.length ? { class: "word unread", title: beyond(app, unread) } : { class: "word" }, masked(app, s, text));
  });
  const number = itemElement(app, "sentences", s, "span", { class: "number", "aria-label": `Sentence ${s + 1}` }, String(s + 1));
  const enter = () => get(app, "grain") === "sentences" && hoverItem(app, "sentences", s);
  const leave = () => get(app, "grain") === "sentences" && setHover(app, { picks: null });
  const pin = () => get(app, "grain") === "sentences" && togglePin(app, "sentences", s);
  const line = h("div", { class: "sentence", "data-kind": kindOf(app, s) }, number,
    h("p", { dir: "auto", "data-sentence": s, pointerenter: enter, pointerleave: leave, click: pin }, ...parts));
  if (kindOf(app, s) === "typed" && !isPage(app)) line.append(button("×", "Leave this phrase out", () => leaveOut(app, pieces.map(([text]) => text).join(""))));
  return line;
}

// The texts of a study, with a heading where they are not those of a report.
function textElements(app) {
  const { study } = app, heading = (s) => TEXTS[kindOf(app, s)] && (s === 0 || kindOf(app, s) !== kindOf(app, s - 1)) ? [h("p", { class: "legend" }, TEXTS[kindOf(app, s)])] : [];
  const lines = study.sentences.flatMap((pieces, s) => [...heading(s), sentenceElement(app, pieces, s)]);
  const how = isPage(app) ? "In a notebook phrases can be typed: CorrespondenceWidget(run, pack)." : "Type a phrase below.";
  return lines.length ? lines : [h("p", { class: "legend" }, `This image has neither a report nor phrases from labels. ${how}`)];
}

/* Phrases of the reader's own: the kernel asks them of every study. A page has no kernel. */

const isPage = (app) => Boolean(get(app, "held")?.studies);
const typed = (app) => get(app, "typed") ?? [];

// Whether there is a word as `find_words` of data.reports has it: the blanks ___ and XXXX are none.
const hasWord = (text) => (text.match(/[\p{L}\p{N}_][\p{L}\p{N}_\p{M}\p{Cf}]*/gu) ?? []).some((word) => !/^(_+|X{4,})\p{Cf}*$/u.test(word));

function askPhrase(app, input) {
  const phrase = input.value.split(/\s+/).filter(Boolean).join(" ");
  if (!hasWord(phrase)) return note(app, "A phrase has at least one word; XXXX and ___ are blanks.");
  input.value = "";
  app.wanted = phrase; // is pinned when its map is here
  note(app, `Asking for “${phrase}” …`);
  if (typed(app).includes(phrase)) return showStudy(app);
  app.unread.add(phrase);
  put(app, { typed: [...typed(app), phrase] });
}

function leaveOut(app, phrase) {
  put(app, { typed: typed(app).filter((one) => one !== phrase), selection: { ...NO_PICKS, boxes: [], study: app.study.id } });
}

// A phrase that could not be answered: with it nothing else would be.
function dropPhrase(app, phrase) {
  app.unread.delete(phrase);
  if (app.wanted === phrase) app.wanted = null;
  put(app, { typed: typed(app).filter((one) => one !== phrase) });
}

function pinWanted(app) {
  const s = app.study.sentences.findLastIndex((pieces, at) => kindOf(app, at) === "typed" && pieces.map(([text]) => text).join("") === app.wanted);
  if (s < 0) return;
  app.wanted = null;
  note(app, "");
  select(app, { ...NO_PICKS, boxes: [], sentences: [s] });
}

function buildReport(app) {
  const { study, parts } = app;
  app.items = { words: [], sentences: [], prototypes: [] };
  parts.report.replaceChildren(...textElements(app));
  const cut = [...new Set(app.items.words.flatMap((_, word) => unreadBy(app, word)))];
  if (cut.length) parts.report.append(h("p", { class: "legend" }, `Dimmed: ${beyond(app, cut)}.`));
  const derived = shownRuns(app).filter((k) => study.runs[k].derived?.length).map((k) => `${study.runs[k].derived.join(" and ")} (${get(app, "runs")[k]})`);
  if (derived.length) parts.report.append(h("p", { class: "legend derived" }, `Derived maps, which no training compared with regions: ${derived.join("; ")}.`));
  const means = new Map();
  for (const k of shownRuns(app).filter((k) => study.runs[k].how?.length)) {
    const how = study.runs[k].how.join("; ");
    means.set(how, [...(means.get(how) ?? []), get(app, "runs")[k]]);
  }
  for (const [how, runs] of means) parts.report.append(h("p", { class: "legend how" }, `${runs.join(", ")} – ${how}.`));
  const parted = shownRuns(app).filter((k) => isPart(study.runs[k])).map((k) => get(app, "runs")[k]);
  if (parted.length) parts.report.append(h("p", { class: "legend frames" }, `Dotted frame: the part of the picture that a model sees (${parted.join(", ")}).`));
  const numbers = study.runs[app.active]?.prototypes ?? [];
  parts.prototypes.replaceChildren(...numbers.map((number, k) =>
    itemElement(app, "prototypes", k, "span", { class: "prototype" }, `prototype ${number}`)));
  const labels = Object.entries(study.labels).filter(([, value]) => value === 1 || value === -1);
  parts.findings.replaceChildren(...labels.map(([name, value]) =>
    h("span", { class: "finding", title: value === 1 ? "present" : "uncertain" }, value === 1 ? name : `${name} ?`)));
  setGrain(app);
}

// A toggle for every class that is outlined in this study.
function buildTargets(app) {
  const kinds = [...new Map(app.study.outlines.map((outline) => [outline.kind, outline.said])).entries()].filter(([, said]) => !(said && get(app, "masked")));
  const flip = (kind) => put(app, { hidden: hiddenKinds(app).includes(kind) ? hiddenKinds(app).filter((one) => one !== kind) : [...hiddenKinds(app), kind] });
  const had = document.activeElement?.dataset?.kind;
  app.parts.targets.replaceChildren(...kinds.map(([kind, said]) =>
    button(kind, `Outline of ${kind}`, () => flip(kind), { "data-kind": kind, "data-said": String(said), "aria-pressed": String(!hiddenKinds(app).includes(kind)) })));
  app.parts.targets.hidden = !kinds.length;
  app.parts.judged.textContent = JUDGED[app.study.judged] + (app.study.outlines.some((outline) => !outline.fits) ? " Unknown fit: it is not known how this picture was made square, and its outlines may lie elsewhere." : "");
  if (had) [...app.parts.targets.children].find((one) => one.dataset.kind === had)?.focus();
}

// One item of the current grain can be reached with Tab; arrows go on from there.
function setGrain(app) {
  const grain = get(app, "grain");
  app.parts.report.dataset.grain = grain;
  app.parts.prototypes.hidden = grain !== "prototypes";
  for (const one of GRAINS) app.items[one].forEach((element) => element?.setAttribute("tabindex", "-1"));
  app.items[grain].find(Boolean)?.setAttribute("tabindex", "0");
}

// A state of an item, written only when it changes.
function mark(element, state, on) {
  if (element[state] === on) return;
  element[state] = on;
  element.classList.toggle(state, on);
  if (state === "pinned") press(element, on);
}

function lightText(app) {
  const boxes = shownBoxes(app), run = app.study.runs[app.active], picks = shownPicks(app), pins = pinned(app);
  const regions = boxes.length ? regionsIn(run, boxes) : [], threshold = get(app, "threshold");
  for (const grain of GRAINS) {
    const scores = regions.length && run.scores[grain] ? profile(run, grain, regions) : null;
    const scale = scores && scaleOf(app, run, scores, [grain]);
    app.items[grain].forEach((element, item) => {
      const t = scores && !Number.isNaN(scores[item]) ? share(scores[item], scale) : 0, lit = t < threshold ? 0 : rise(t);
      if (element.lit !== lit) element.style.setProperty("--lit", (element.lit = lit).toFixed(3));
      mark(element, "shown", picks[grain].includes(item));
      mark(element, "pinned", pins[grain].includes(item));
    });
  }
}

function nameOf(app, grain, item) {
  const line = app.items[grain][item].closest(".sentence"), s = Number(line?.querySelector("p").dataset.sentence);
  if (line && kindOf(app, s) !== "report") return `“${(grain === "words" ? app.items.words[item] : line.querySelector("p")).textContent}”`;
  return grain === "words" && !get(app, "masked") ? `“${app.items.words[item].textContent}”` : `${grain.slice(0, -1)} ${item + 1}`;
}

// One line on what is hovered; screen readers hear it.
function tell(app) {
  const { picks, box } = app.hover, names = get(app, "runs");
  let text = "";
  if (picks) {
    const [grain] = GRAINS.filter((one) => picks[one].length);
    text = `${nameOf(app, grain, picks[grain][0])}: ` + app.panels.map(({ k, result: { map, peak, verdict, scale } }) =>
      `${names[k]} ${map ? map[peak].toFixed(decimals(scale)) + (verdict && `, ${verdict}`) : "does not read it"}`).join(" · ");
  } else if (box) {
    const run = app.study.runs[app.active], grain = items(run, get(app, "grain")) ? get(app, "grain") : "words";
    const scores = profile(run, grain, regionsIn(run, [box])), read = [...scores.keys()].filter((i) => !Number.isNaN(scores[i]));
    const best = read.sort((a, b) => scores[b] - scores[a]).slice(0, 3).map((i) => `${nameOf(app, grain, i)} ${scores[i].toFixed(decimals([scores[read[0]]]))}`);
    text = `${names[app.active]}: ${best.join(", ")}`;
  }
  app.parts.status.textContent = text || app.note;
}

function refresh(app) {
  if (!app.study) return;
  for (const panel of app.panels) drawPanel(app, panel);
  lightText(app);
  tell(app);
}

/* ------------------------------------------------------------------ pointing and pinning */

function setHover(app, change) {
  app.hover = { ...app.hover, ...change };
  refresh(app);
}

const hoverItem = (app, grain, item) => setHover(app, { picks: { ...NO_PICKS, [grain]: [item] } });

function focusItem(app, grain, item) {
  for (const element of app.items[grain]) element?.setAttribute("tabindex", element === app.items[grain][item] ? "0" : "-1");
  hoverItem(app, grain, item);
}

function select(app, change) {
  put(app, { selection: { ...pinned(app), study: app.study.id, ...change } });
}

function togglePin(app, grain, item) {
  const now = pinned(app)[grain];
  select(app, { [grain]: now.includes(item) ? now.filter((one) => one !== item) : [...now, item].sort((a, b) => a - b) });
}

function toggleBox(app, box) {
  const now = pinned(app).boxes, same = (one) => one.every((value, i) => Math.abs(value - box[i]) < 1e-6);
  select(app, { boxes: now.some(same) ? now.filter((one) => !same(one)) : [...now, box] });
}

function point(app, panel, event) {
  const { left, top, width, height } = panel.canvas.getBoundingClientRect(), { scale, x, y } = app.zoom;
  return [(event.clientX - left) / width / scale + x, (event.clientY - top) / height / scale + y];
}

// Words are lit by the scores of the run whose picture was touched last.
function activate(app, panel) {
  if (app.active === panel.k) return;
  app.active = panel.k;
  for (const one of app.panels) one.element.classList.toggle("active", one === panel);
}

function hoverRegion(app, panel, row, column) {
  activate(app, panel);
  panel.cursor = [row, column];
  setHover(app, { box: boxOf(app.study.runs[panel.k], row, column) });
}

function moveOver(app, panel, event) {
  const found = regionAt(app.study.runs[panel.k], point(app, panel, event));
  if (!found) return app.hover.box && setHover(app, { box: null });
  const [row, column] = found;
  if (!app.hover.box || panel.k !== app.active || row !== panel.cursor[0] || column !== panel.cursor[1]) hoverRegion(app, panel, row, column);
}

const around = ([a, b], [c, d]) => [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)];
const clip = (box) => box.map((value) => Math.min(Math.max(value, 0), 1));

function zoomBy(app, factor, [x, y] = [app.zoom.x + 0.5 / app.zoom.scale, app.zoom.y + 0.5 / app.zoom.scale]) {
  const scale = Math.min(Math.max(app.zoom.scale * factor, 1), 12), keep = app.zoom.scale / scale;
  panTo(app, x - (x - app.zoom.x) * keep, y - (y - app.zoom.y) * keep, scale);
}

function panTo(app, x, y, scale = app.zoom.scale) {
  const most = 1 - 1 / scale;
  app.zoom = { scale, x: Math.min(Math.max(x, 0), most), y: Math.min(Math.max(y, 0), most) };
  refresh(app);
}

function setWindow(app, level, width) {
  put(app, { window: [Math.round(Math.min(Math.max(level, 0), 255)), Math.round(Math.min(Math.max(width, 2), 510))] });
}

// What a drag does: { move, end }, by mouse button and tool.
function drag(app, panel, event) {
  const start = point(app, panel, event), [x, y] = [event.clientX, event.clientY], zoom = app.zoom, [level, width] = get(app, "window");
  const tool = ["", "pan", "window"][event.button] || app.tool, size = panel.canvas.clientWidth;
  const moved = (e) => Math.abs(e.clientX - x) + Math.abs(e.clientY - y) > 4;
  if (tool === "pan") return { move: (e) => panTo(app, zoom.x - (e.clientX - x) / size / zoom.scale, zoom.y - (e.clientY - y) / size / zoom.scale) };
  if (tool === "window") return { move: (e) => setWindow(app, level + ((e.clientY - y) / size) * 255, width + ((e.clientX - x) / size) * 510) };
  return {
    move: (e) => moved(e) && setHover(app, { box: clip(around(start, point(app, panel, e))) }),
    end: (e) => app.hover.box && toggleBox(app, moved(e) ? clip(around(start, point(app, panel, e))) : app.hover.box),
  };
}

function listenToPanel(app, panel) {
  const { canvas } = panel;
  let dragging = null;
  const on = (name, act, options) => canvas.addEventListener(name, (event) => app.study && act(event), options);
  on("pointermove", (event) => (dragging ? dragging.move(event) : moveOver(app, panel, event)));
  on("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    moveOver(app, panel, event);
    dragging = drag(app, panel, event);
    if (event.button === 1) event.preventDefault();
  });
  on("pointerup", (event) => {
    dragging?.end?.(event);
    dragging = null;
  });
  on("pointercancel", () => (dragging = null));
  on("pointerleave", () => dragging || setHover(app, { box: null }));
  on("blur", () => setHover(app, { box: null }));
  on("contextmenu", (event) => event.preventDefault());
  on("dblclick", () => zoomBy(app, 0));
  on("keydown", (event) => panelKey(app, panel, event));
  on("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoomBy(app, Math.exp(-event.deltaY / 300), point(app, panel, event));
  }, { passive: false });
}

/* ------------------------------------------------------------------ keys */

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function moveCursor(app, panel, [right, down], grow) {
  const run = app.study.runs[panel.k], [h, w] = run.grid, limit = (value, n) => Math.min(Math.max(value, 0), n - 1);
  const [row, column] = panel.cursor, box = app.hover.box;
  const next = box ? [limit(row + down, h), limit(column + right, w)] : [row, column];
  hoverRegion(app, panel, ...next);
  if (grow && box) setHover(app, { box: app.hover.box.map((value, i) => (i < 2 ? Math.min(value, box[i]) : Math.max(value, box[i]))) });
}

function panelKey(app, panel, event) {
  const [level, width] = get(app, "window"), arrow = ARROWS[event.key], { x, y, scale } = app.zoom;
  const act = {
    "+": () => zoomBy(app, 1.25), "=": () => zoomBy(app, 1.25), "-": () => zoomBy(app, 0.8), 0: () => zoomBy(app, 0),
    w: () => setWindow(app, level, width * 0.9), W: () => setWindow(app, level, width / 0.9),
    l: () => setWindow(app, level - 8, width), L: () => setWindow(app, level + 8, width),
    Enter: () => app.hover.box && toggleBox(app, app.hover.box), " ": () => app.hover.box && toggleBox(app, app.hover.box),
  }[event.key] ?? (arrow && (() => (event.altKey ? panTo(app, x + (arrow[0] * 0.1) / scale, y + (arrow[1] * 0.1) / scale) : moveCursor(app, panel, arrow, event.shiftKey))));
  if (!act) return;
  event.preventDefault();
  act();
}

// Arrows in the report: sideways to the neighbour, up and down to the sentence above or below.
function itemKey(app, element, event) {
  const { grain, item } = element.dataset, all = app.items[grain], at = Number(item), arrow = ARROWS[event.key];
  if (event.key === "Enter" || event.key === " ") togglePin(app, grain, at);
  else if (arrow) {
    const line = (one) => one.closest(".sentence"), step = arrow[0] || arrow[1];
    let next = at + step;
    while (arrow[1] && grain === "words" && all[next] && line(all[next]) === line(element)) next += step;
    all[next]?.focus();
  } else return;
  event.preventDefault();
}

// Keys without Ctrl or Meta end here: to JupyterLab a lone b, x or arrow is a command for the cell.
function rootKey(app, event) {
  const element = event.target;
  if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  if (element.dataset.grain && element.dataset.item) itemKey(app, element, event);
  if (event.key === "Escape") select(app, { ...NO_PICKS, boxes: [] });
  else if (["INPUT", "SELECT"].includes(element.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "n" || event.key === "p") step(app, event.key === "n" ? 1 : -1);
}

/* ------------------------------------------------------------------ studies */

function ask(app, message) {
  const held = get(app, "held");
  if (held?.studies) setTimeout(() => receive(app, ...answerHere(held, message)));
  else app.model.send(message);
}

// In an exported page: what the kernel would answer, from the studies that the page holds.
function answerHere({ studies }, { ask: what, position, query, finding, order, run }) {
  if (what === "study") return [{ answer: "study", study: studies[position].head }, studies[position].buffers];
  const texts = studies.map(({ head }) => `${head.id} ${head.sentences.flat().map(([text]) => text).join("")}`.toLowerCase());
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const positions = [...studies.keys()].filter((i) => words.every((word) => texts[i].includes(word)) && (!finding || studies[i].head.labels[finding] === 1));
  if (order !== "data") positions.sort((a, b) => studies[a].head[order][run] - studies[b].head[order][run]); // misses have a minus, as in `Studies.find`
  return [{ answer: "list", positions, left: 0, query, finding, order }, []];
}

function receive(app, message, buffers) {
  if (message.answer === "study") {
    app.waiting = false;
    const stale = message.study.masked !== get(app, "masked") || String(message.study.typed ?? []) !== String(typed(app));
    if (!isPage(app) && stale) return setTimeout(() => showStudy(app), 50); // asked before the switch was saved, or before the last phrase
    const study = decode(message.study, buffers);
    typed(app).forEach((phrase) => app.unread.delete(phrase));
    app.studies.set(study.position, study);
    if (app.studies.size > KEPT_STUDIES) app.studies.delete(app.studies.keys().next().value);
    showStudy(app);
  } else if (message.answer === "error") {
    app.waiting = false;
    const last = message.typed?.at(-1);
    if (app.unread.has(last)) dropPhrase(app, last);
    note(app, message.reason);
  } else if (["query", "finding", "order"].every((name) => message[name] === get(app, name))) showList(app, message);
}

function note(app, text) {
  app.note = text;
  app.parts.status.textContent = text;
}

function askList(app) {
  const run = Math.max(get(app, "runs").indexOf(get(app, "shown")[0]), 0);
  ask(app, { ask: "list", run, query: get(app, "query"), finding: get(app, "finding"), order: get(app, "order") });
}

function showList(app, { positions, left }) {
  if (left) {
    note(app, `Measuring alignment: ${left} studies to go …`);
    return askList(app);
  }
  note(app, positions.length ? "" : "No study fits this search.");
  const first = app.list === null;
  app.list = positions;
  const ordered = get(app, "order") !== app.order;
  app.order = get(app, "order");
  if (positions.length && !first && (ordered || !positions.includes(get(app, "position")))) put(app, { position: positions[0] });
  showPlace(app);
}

function showPlace(app) {
  const { slider, place } = app.parts, list = app.list ?? [], at = list.indexOf(get(app, "position"));
  slider.max = Math.max(list.length - 1, 0);
  slider.value = Math.max(at, 0);
  slider.disabled = !list.length;
  const id = app.study?.position === get(app, "position") ? app.study.id : "…";
  place.textContent = list.length ? `${id} · ${at + 1} of ${list.length}` : "no study";
  slider.setAttribute("aria-valuetext", place.textContent);
}

function step(app, by) {
  const list = app.list ?? [], at = list.indexOf(get(app, "position")) + by;
  if (at >= 0 && at < list.length) put(app, { position: list[at] });
}

// Show the study of `position`; when it is not here, ask for it, one request at a time.
function showStudy(app) {
  const position = get(app, "position"), study = app.studies.get(position);
  app.root.setAttribute("aria-busy", String(!study));
  if (!study && !app.waiting) {
    app.waiting = true;
    ask(app, { ask: "study", position, masked: get(app, "masked"), typed: typed(app) });
  }
  if (!study) return;
  app.study = study;
  app.hover = { picks: null, box: null };
  const reading = app.parts.report.contains(document.activeElement);
  if (get(app, "selection").study !== study.id) select(app, { ...NO_PICKS, boxes: [] });
  if (app.wanted) pinWanted(app);
  showPlace(app);
  drawGrey(app);
  buildPanels(app);
  buildReport(app);
  buildTargets(app);
  refresh(app);
  if (reading) app.items[get(app, "grain")].find(Boolean)?.focus();
  app.el.dataset.ready = study.id;
}

/* ------------------------------------------------------------------ layout */

function panelElement(app, k) {
  const name = get(app, "runs")[k], canvas = h("canvas", { tabindex: "0", role: "application", "data-run": name });
  const low = h("span", {}), high = h("span", {}), tick = h("i", {}), badge = h("span", { class: "badge", hidden: true });
  const bar = h("div", { class: "bar", "aria-hidden": "true" }, low, h("div", { class: "colours" }, tick), high);
  const element = h("figure", { class: "panel" }, h("figcaption", {}, h("b", { title: name }, name), badge), canvas, bar);
  const panel = { k, element, canvas, low, high, tick, bar, badge, heat: document.createElement("canvas"), cursor: [0, 0] };
  panel.cursor = app.study.runs[k].grid.map((n) => Math.floor(n / 2));
  listenToPanel(app, panel);
  return panel;
}

// The panels stay from study to study: a picture that has the focus keeps it.
function buildPanels(app) {
  const wanted = shownRuns(app);
  if (String(wanted) !== String(app.panels.map((panel) => panel.k))) {
    app.panels.forEach((panel) => app.sizes.unobserve(panel.canvas));
    app.panels = wanted.map((k) => panelElement(app, k));
    app.parts.panels.replaceChildren(...app.panels.map((panel) => panel.element));
    app.panels.forEach((panel) => app.sizes.observe(panel.canvas));
    if (!wanted.includes(app.active)) app.active = wanted[0] ?? 0;
    app.panels.forEach((panel) => panel.element.classList.toggle("active", panel.k === app.active && wanted.length > 1));
  }
  setColours(app);
  app.panels.forEach(fit);
}

function fit(panel) {
  const size = Math.round((panel.canvas.clientWidth || 320) * devicePixelRatio);
  if (panel.canvas.width !== size || panel.canvas.height !== size) panel.canvas.width = panel.canvas.height = size;
}

function setColours(app) {
  const stops = STOPS[get(app, "colours")].split(" ").map((hex) => `#${hex}`);
  for (const panel of app.panels) panel.bar.children[1].style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
}

// Controls that follow a trait, and set it.
function slider(app, name, text, [min, max, by], read = (value) => value, write = (value) => value) {
  const input = h("input", { type: "range", min, max, step: by, "aria-label": text, input: () => put(app, { [name]: write(Number(input.value)) }) });
  app.follow(name, () => (input.value = read(get(app, name))));
  return labelled(text, input);
}

function choice(app, name, text, options) {
  const input = h("select", { "aria-label": text, change: () => put(app, { [name]: input.value }) },
    ...options.map(([value, shown]) => h("option", { value }, shown)));
  app.follow(name, () => (input.value = get(app, name)));
  return labelled(text, input);
}

function toggle(app, name, text, label) {
  const element = button(text, label, () => put(app, { [name]: !get(app, name) }));
  app.follow(name, () => press(element, get(app, name)));
  return element;
}

function segments(app, label, options, read, write) {
  const buttons = Object.entries(options).map(([value, text]) => button(text, `${label}: ${text}`, () => write(value), { "data-value": value }));
  const show = () => buttons.forEach((one) => press(one, one.dataset.value === read()));
  return [h("div", { class: "segments", role: "group", "aria-label": label }, ...buttons), show];
}

function traitSegments(app, name, label, options) {
  const [element, show] = segments(app, label, options, () => get(app, name), (value) => put(app, { [name]: value }));
  app.follow(name, show);
  return element;
}

function toolSegments(app) {
  const [element, show] = segments(app, "Drag", TOOLS, () => app.tool, (value) => {
    app.tool = value;
    app.root.dataset.tool = value;
    show();
  });
  show();
  return element;
}

function runButtons(app) {
  const names = get(app, "runs");
  if (names.length < 2) return [];
  const flip = (name) => {
    const shown = names.filter((one) => (one === name) !== get(app, "shown").includes(one));
    if (shown.length) put(app, { shown });
  };
  const buttons = names.map((name) => button(name, `Show ${name}`, () => flip(name)));
  app.follow("shown", () => buttons.forEach((one, k) => press(one, get(app, "shown").includes(names[k]))));
  return [h("div", { class: "segments", role: "group", "aria-label": "Runs" }, ...buttons)];
}

function browserRow(app) {
  const { parts } = app;
  parts.slider = h("input", { type: "range", min: 0, step: 1, "aria-label": "Study", input: () => app.list?.length && put(app, { position: app.list[Number(parts.slider.value)] }) });
  parts.place = h("output", { class: "place" });
  const search = h("input", { type: "search", placeholder: "Search ids and words", "aria-label": "Search ids and words", title: "Search ids and words", input: () => put(app, { query: search.value }) });
  app.follow("query", () => search.value !== get(app, "query") && (search.value = get(app, "query")));
  const findings = [["", "All findings"], ...get(app, "findings").map(([name, count]) => [name, `${name} (${count})`])];
  return h("div", { class: "row browser" }, button("‹", "Previous study", () => step(app, -1)), parts.slider, button("›", "Next study", () => step(app, 1)),
    parts.place, search, choice(app, "finding", "Finding", findings), choice(app, "order", "Order", Object.entries(ORDERS)));
}

function controlRow(app) {
  const grains = Object.fromEntries(get(app, "grains").map((grain) => [grain, grain[0].toUpperCase() + grain.slice(1)]));
  const [level, width] = [0, 1].map((i) => [(value) => value[i], (value) => (i ? [get(app, "window")[0], value] : [value, get(app, "window")[1]])]);
  return h("div", { class: "row controls", role: "toolbar", "aria-label": "Display" },
    traitSegments(app, "grain", "Grain", grains), toolSegments(app), ...runButtons(app),
    traitSegments(app, "scale", "Scale", { common: "Common", normalised: "Each map", raw: "Raw" }),
    choice(app, "colours", "Colours", Object.keys(STOPS).map((name) => [name, name])),
    slider(app, "opacity", "Opacity", [0, 1, 0.05]), slider(app, "threshold", "Threshold", [0, 0.95, 0.05]),
    slider(app, "window", "Level", [0, 255, 1], ...level), slider(app, "window", "Width", [2, 510, 1], ...width),
    h("div", { class: "segments" }, toggle(app, "smooth", "Smooth", "Smooth maps"), toggle(app, "outlines", "Outlines", "Show the outlines"),
      toggle(app, "masked", "Mask text", "Mask the text of the report")),
    button("Unpin", "Unpin all", () => select(app, { ...NO_PICKS, boxes: [] })), button("Fit", "Show all of the picture", () => resetView(app)));
}

function phraseBox(app) {
  if (isPage(app)) return [];
  const input = h("input", { type: "text", placeholder: "Type a phrase, and Enter", "aria-label": "A phrase of your own", keydown: (event) => event.key === "Enter" && askPhrase(app, input) });
  return [h("div", { class: "phrase" }, input, button("Ask", "Ask this phrase", () => askPhrase(app, input)))];
}

function resetView(app) {
  put(app, { window: [128, 255] });
  zoomBy(app, 0);
}

function layOut(app) {
  const { parts } = app;
  parts.panels = h("div", { class: "panels" });
  parts.findings = h("div", { class: "findings", "aria-label": "Findings" });
  parts.report = h("div", { class: "report", "aria-label": "Report" });
  parts.prototypes = h("div", { class: "prototypes", "aria-label": "Prototypes" });
  parts.targets = h("div", { class: "row targets", role: "group", "aria-label": "Outlines by class", hidden: true });
  parts.judged = h("p", { class: "judged" });
  parts.status = h("div", { class: "status", role: "status", "aria-live": "polite" });
  const keys = h("details", { class: "keys" }, h("summary", {}, "Keys and mouse"),
    h("div", { class: "keylist" }, ...KEYS.flatMap(([key, does]) => [h("b", {}, key), h("span", {}, does)])));
  app.root.append(browserRow(app), h("div", { class: "study" }, parts.panels,
    h("section", { class: "text" }, parts.findings, parts.report, ...phraseBox(app), parts.prototypes)), parts.targets, parts.judged, parts.status, controlRow(app), keys);
}

/* ------------------------------------------------------------------ life */

// What has to be done when a trait changes, whoever changed it.
function reactions(app) {
  const paint = () => refresh(app);
  const anew = () => app.study && (buildPanels(app), buildReport(app), refresh(app));
  const search = () => askList(app);
  return {
    position: () => (showPlace(app), showStudy(app)), selection: paint, opacity: paint, threshold: paint, scale: paint, smooth: paint,
    outlines: paint, hidden: () => app.study && (buildTargets(app), paint()), colours: () => (setColours(app), refresh(app)), window: () => app.study && (drawGrey(app), refresh(app)),
    grain: () => app.study && (setGrain(app), refresh(app)), shown: anew, query: search, finding: search, order: search,
    masked: () => (app.studies.clear(), anew(), app.study && buildTargets(app), showStudy(app)),
    typed: () => isPage(app) || (app.studies.clear(), showStudy(app)),
  };
}

function render({ model, el }) {
  const root = h("div", { class: "medvis correspondence", "data-tool": "select" });
  const app = {
    model, el, root, study: null, studies: new Map(), list: null, order: model.get("order"), hover: { picks: null, box: null }, active: 0, tool: "select",
    zoom: { scale: 1, x: 0, y: 0 }, panels: [], parts: {}, items: { words: [], sentences: [], prototypes: [] }, waiting: false, note: "", wanted: null, unread: new Set(),
    grey: document.createElement("canvas"), back: document.createElement("canvas"), drawn: null,
  };
  const listeners = [];
  const listen = (event, act) => (model.on(event, act), listeners.push([event, act]));
  app.follow = (name, show) => (show(), listen(`change:${name}`, show));
  app.sizes = new ResizeObserver(() => (app.panels.forEach(fit), refresh(app)));
  layOut(app);
  for (const [name, act] of Object.entries(reactions(app))) listen(`change:${name}`, act);
  listen("msg:custom", (message, buffers) => receive(app, message, buffers));
  root.addEventListener("keydown", (event) => rootKey(app, event));
  el.append(root);
  askList(app);
  showStudy(app);
  return () => {
    app.sizes.disconnect();
    for (const [event, act] of listeners) model.off(event, act);
  };
}

export default { render };
