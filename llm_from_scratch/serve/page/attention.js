// Attention by layer and head: a small map of every head, one large map, and where the chosen token looks.
import { el } from "./dom.js";
import { t } from "./i18n.js";
import { percent, rangeChoice, rove, tokenStrip, visible } from "./strip.js";

const MOST = 256; // tokens that the server reads for a map
const LABEL = 92; // CSS pixels for the tokens' names beside and above the large map

/** Little-endian uint16 in base64, heads x T x T; a number's share of 65535 is the weight. */
function readWeights(text) {
  const view = new DataView(Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0)).buffer);
  return (i) => view.getUint16(2 * i, true) / 65535;
}

/** A head's weights as a picture of one pixel a pair; the square root makes small ones visible. */
function picture(weight, from, size, colour) {
  const canvas = el("canvas", { width: size, height: size }), context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    const opacity = 255 * Math.sqrt(weight(from + Math.floor(i / size), from + (i % size)));
    for (let c = 0; c < 4; c++) image.data[4 * i + c] = colour[c] ?? opacity;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Makes a square canvas `side` CSS pixels large, with a pixel for each of the screen's; gives its context. */
function fit(canvas, side) {
  const density = window.devicePixelRatio || 1, context = canvas.getContext("2d");
  canvas.width = canvas.height = Math.round(side * density);
  canvas.style.width = canvas.style.height = `${side}px`;
  context.scale(density, density);
  context.imageSmoothingEnabled = false;
  return context;
}

function shorten(context, text) {
  return context.measureText(text).width < LABEL - 10 ? text : shorten(context, `${text.slice(0, -2)}…`);
}

export async function attentionView(page, panel) {
  const { state } = page, { layers, context } = page.model(), limit = Math.min(MOST, context || MOST);
  const range = (state.attentionRange ??= {}), name = el("output", { for: "attention-layer" }), body = el("div");
  const choice = rangeChoice(range, state.tokens.length, limit, limit, page.show);
  const start = Math.max(0, range.to - limit), ids = state.ids.slice(start, range.to);
  const slider = el("input", { type: "range", id: "attention-layer", min: 1, max: layers, oninput: load,
    value: Math.min(state.layer ?? Math.ceil(layers / 2), layers) });
  panel.append(el("div", { class: "controls" }, el("label", {}, t("attention.choose"), slider, name), choice), body);
  async function load() {
    state.layer = Number(slider.value);
    name.textContent = t("attention.layer", { layer: state.layer, layers });
    const answer = await page.ask("api/inside/attention", { ids, layer: state.layer - 1 }, body);
    if (answer?.layer !== state.layer - 1) return; // the slider has moved on
    answer.read ??= readWeights(answer.weights);
    page.onTheme(() => drawHeads(page, body, answer, start));
    drawHeads(page, body, answer, start);
  }
  await load();
}

/** The maps of a layer's heads; `start` is the position in the text of the first token that the model read. */
function drawHeads({ root, state }, body, { read, heads, tokens }, start) {
  const from = state.attentionRange.from - start, size = state.attentionRange.to - start - from;
  const within = (position) => Math.min(from + size - 1, Math.max(from, position));
  const weight = (h, r, c) => read((h * tokens.length + r) * tokens.length + c);
  let row = within(state.selected - start), column = within(state.looked ?? 0), cell = 4, margin = 0;
  let head = Math.min(state.head ?? 0, heads - 1);

  const colour = getComputedStyle(root.querySelector(".about a")).color.match(/\d+/g); // the page's accent
  const maps = Array.from({ length: heads }, (_, h) => picture((r, c) => weight(h, r, c), from, size, colour));
  const options = maps.map((picture, h) => {
    const small = el("canvas", { "aria-hidden": "true" });
    fit(small, 56).drawImage(picture, 0, 0, 56, 56);
    const name = t("attention.head", { head: h + 1 });
    return el("span", { role: "option", class: "head", "aria-label": name }, small, String(h + 1));
  });
  const list = el("div", { id: "attention-heads", role: "listbox", "aria-orientation": "horizontal",
    "aria-label": t("attention.heads") }, options);
  rove(list, options, head, (h) => { head = state.head = h; redraw(); });
  const strip = tokenStrip(tokens.slice(from, from + size), { label: t("attention.from"), first: start + from,
    chosen: start + row, onChoose: (i) => move(i - start, column) });
  const readout = el("output", { id: "attention-readout", "aria-live": "polite" });
  const map = el("canvas", { id: "attention-map", tabindex: 0, role: "application", "aria-label": t("attention.map"),
    "aria-describedby": "attention-readout" });
  const frame = el("div", { class: "scroll" }, map), hint = el("p", { class: "hint" }, t("attention.hint"));
  body.replaceChildren(el("div", { class: "beside" }, el("div", {}, list, strip.element, readout, hint), frame));
  function move(toRow, toColumn) {
    state.looked = column = within(toColumn);
    state.selected = start + (row = within(toRow));
    strip.choose(state.selected);
    redraw();
  }

  function redraw() {
    const cellIn = (room) => Math.min(44, Math.floor(room / size)), room = frame.clientWidth - 10;
    margin = cellIn(room - LABEL) >= 10 || size <= 24 ? LABEL : 0;
    cell = margin ? Math.max(size <= 24 ? 14 : 10, cellIn(room - LABEL)) : Math.max(3, cellIn(room));
    const side = size * cell, y = margin + (row - from) * cell, x = margin + (column - from) * cell;
    const context = fit(map, margin + side + 2), style = getComputedStyle(map);
    context.drawImage(maps[head], margin, margin, side, side);
    context.strokeStyle = context.fillStyle = style.color;
    context.strokeRect(margin + 0.5, y + 0.5, side, cell);
    context.lineWidth = 2;
    context.strokeRect(x + 1, y + 1, cell - 1, cell - 1);
    context.font = `${Math.min(13, cell)}px ${style.fontFamily}`;
    context.textBaseline = "middle";
    for (const [align, place, chosen] of [["right", margin - 6, row], ["left", 6 - margin, column]]) {
      context.textAlign = align;
      for (let i = from; margin && i < from + size; i++) {
        context.globalAlpha = i === chosen ? 1 : 0.65;
        context.fillText(shorten(context, visible(tokens[i].text)), place, margin + (i - from + 0.5) * cell);
      }
      context.rotate(-Math.PI / 2);
    }
    strip.options.forEach((option, i) => option.style.setProperty("--share", Math.sqrt(weight(head, row, from + i))));
    readout.textContent = t("attention.readout", { head: head + 1, from: visible(tokens[row].text),
      to: visible(tokens[column].text), share: percent(weight(head, row, column)) });
  }

  const at = (event) => [event.offsetY, event.offsetX].map((place) => from + Math.floor((place - margin) / cell));
  map.addEventListener("pointermove", (event) => event.pointerType === "mouse" && move(...at(event)));
  map.addEventListener("click", (event) => move(...at(event)));
  map.addEventListener("keydown", (event) => {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (by) event.preventDefault();
    if (by) move(row + by[0], column + by[1]);
  });
  new ResizeObserver(redraw).observe(frame);
}
