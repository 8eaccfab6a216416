// Loss curves as SVG: thin training loss, thick smoothed loss, validation marks; zoom, hover, keyboard. New points
// only lengthen the paths: the zoom, the cursor and the elements stay.
const LEFT = 44, RIGHT = 22, TOP = 10, BOTTOM = 30;
const DASHES = ["", "7 4", "2 3", "10 3 2 3", "14 4"]; // 5 dashes and 6 colours (inside.css): 30 runs are told apart

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const smoothLine = (style, d = "") => svg("path", { class: "smooth", "stroke-dasharray": DASHES[style % 5], d });

/** The small picture beside a run's name: its line and its validation mark. */
export const swatch = (style) => svg("svg", { class: `swatch series-${style % 6}`, width: 36, height: 14,
  "aria-hidden": "true" }, smoothLine(style, "M2 7H34"), svg("path", { d: "M18 7h0", class: "mark" }));

/** The points of one run; `add` takes the records of metrics.jsonl in any number of portions. */
export class Curve {
  constructor(name, style) {
    Object.assign(this, { name, style, train: { x: [], y: [] }, val: { x: [], y: [] }, smooth: [] });
  }
  add(records) {
    for (const record of records) {
      for (const [line, value] of [[this.train, record.loss], [this.val, record.val_loss]]) {
        if (!Number.isFinite(value) || record.step <= line.x.at(-1)) continue;
        line.x.push(record.step);
        line.y.push(value);
      }
    }
  }
  get first() { return Math.min(this.train.x[0] ?? Infinity, this.val.x[0] ?? Infinity); }
  get last() { return Math.max(this.train.x.at(-1) ?? 0, this.val.x.at(-1) ?? 0); }
  /** A running mean that forgets by `factor` a point, without the pull towards its start (as Adam's). */
  smoothTo(factor) {
    if (factor !== this.factor) Object.assign(this, { factor, smooth: [], weight: 0, sum: 0 });
    for (let i = this.smooth.length; i < this.train.y.length; i++) {
      this.sum = this.sum * factor + this.train.y[i];
      this.weight = this.weight * factor + 1;
      this.smooth.push(this.sum / this.weight);
    }
  }
}

/** Where in rising `values` the one nearest to x stands; -1 where there are none. */
function nearest(values, x) {
  const before = values.findLastIndex((value) => value <= x);
  return before < 0 || values[before + 1] - x < x - values[before] ? Math.min(before + 1, values.length - 1) : before;
}

/** About `wanted` round numbers between low and high; 1, 2 and 5 times the powers of ten on a wide logarithmic axis. */
function ticks(low, high, wanted, log = false) {
  const within = (values) => values.map((value) => Number(value.toPrecision(12))).filter((v) => v >= low && v <= high);
  if (log && high / low > 5) {
    return within(Array.from({ length: 36 }, (_, i) => [1, 2, 5][i % 3] * 10 ** (Math.floor(i / 3) - 6)));
  }
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5].find((digit) => digit * power >= raw) ?? 10), first = Math.ceil(low / step);
  return within(Array.from({ length: wanted + 2 }, (_, i) => (first + i) * step));
}

/** A path's `d`; where points are denser than pixels, the lowest and the highest of each few stand for them. */
function pathOf(xs, ys, [from, to], atX, atY, width) {
  const few = Math.ceil((to - from) / width), points = [];
  for (let i = from; i < Math.min(to, xs.length); i += few) {
    const part = ys.slice(i, i + few);
    points.push([xs[i], Math.min(...part)]);
    if (few > 1) points.push([xs[i], Math.max(...part)]);
  }
  return points.map(([x, y], i) => `${i ? "L" : "M"}${atX(x).toFixed(1)} ${atY(y).toFixed(1)}`).join("");
}

export class LossChart {
  /** `onCursor(step, points)` hears what stands under the pointer, a point for each curve; (null, []) for nothing. */
  constructor(onCursor) {
    Object.assign(this, { onCursor, curves: [], zoom: null, cursor: null, log: false, factor: 0.9 });
    this.axes = svg("g", { class: "axes" });
    this.lines = svg("g", { "clip-path": "url(#loss-chart-clip)" });
    this.rule = svg("path", { class: "rule" });
    this.band = svg("rect", { class: "band", y: TOP, width: 0 });
    this.clip = svg("rect", { x: LEFT - 5, y: 0 });
    this.element = svg("svg", { class: "loss-chart", tabindex: 0, role: "application", id: "loss-chart" },
      svg("clipPath", { id: "loss-chart-clip" }, this.clip), this.band, this.axes, this.lines, this.rule);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.element);
  }
  /** Change the curves, log or factor. */
  set(changes) { Object.assign(this, changes).draw(); }

  listen() {
    let start = null;
    const on = (name, act) => this.element.addEventListener(name, act);
    const at = (event) => event.clientX - this.element.getBoundingClientRect().left;
    const mark = (x, width) => { this.band.setAttribute("x", x); this.band.setAttribute("width", width); };
    on("pointerdown", (event) => { start = at(event); this.element.setPointerCapture(event.pointerId); });
    on("pointermove", (event) => {
      this.point(this.stepAt(at(event)));
      if (start !== null) mark(Math.min(start, at(event)), Math.abs(at(event) - start));
    });
    on("pointerup", (event) => {
      const ends = [start, at(event)].sort((a, b) => a - b);
      if (start !== null && ends[1] - ends[0] > 8) this.zoomTo(...ends.map((x) => this.stepAt(x)));
    });
    on("lostpointercapture", () => { start = null; mark(0, 0); });
    on("pointerleave", () => this.point(null));
    on("dblclick", () => this.zoomTo());
    on("keydown", (event) => {
      const [low, high] = this.range, middle = this.cursor ?? (low + high) / 2, step = (high - low) / 100;
      const go = (by) => this.point(Math.min(high, Math.max(low, middle + by * step * (event.shiftKey ? 10 : 1))));
      const zoom = (by) => this.zoomTo(middle - (middle - low) * by, middle + (high - middle) * by);
      const act = { ArrowLeft: () => go(-1), ArrowRight: () => go(1), Home: () => go(-100), End: () => go(100),
        "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), Escape: () => this.zoomTo() }[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act();
    });
  }

  /** Shows only these steps; without any it shows all, and follows a run that grows. */
  zoomTo(first = -Infinity, last = Infinity) {
    const [low, high] = this.fullRange(), from = Math.max(low, first), to = Math.min(high, last);
    this.zoom = to - from >= 2 && to - from < high - low ? [from, to] : null;
    this.draw();
  }
  fullRange() {
    const low = Math.min(...this.curves.map((curve) => curve.first));
    return low < Infinity ? [low, Math.max(low + 1, ...this.curves.map((curve) => curve.last))] : [0, 1];
  }
  stepAt(x) {
    const [low, high] = this.range;
    return Math.min(high, Math.max(low, low + ((x - LEFT) / (this.width - LEFT - RIGHT)) * (high - low)));
  }

  point(step) {
    this.cursor = step;
    const points = step === null ? [] : this.curves.map((curve) => {
      const at = nearest(curve.train.x, step), val = nearest(curve.val.x, step), valStep = curve.val.x[val];
      const near = Math.abs(this.atX(valStep) - this.atX(step)) < 12 && { valStep, val: curve.val.y[val] };
      return { curve, step: curve.train.x[at], loss: curve.train.y[at], smooth: curve.smooth[at], ...near };
    });
    this.rule.setAttribute("d", step === null ? "" : `M${this.atX(step)} ${TOP}V${this.height - BOTTOM}`);
    this.onCursor(step && Math.round(step), points);
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.element, range = this.zoom ?? this.fullRange();
    Object.assign(this, { width, height, range });
    const [first, last] = range, inner = width - LEFT - RIGHT, tall = height - TOP - BOTTOM;
    if (inner < 10) return;
    const reach = ({ x }) => [Math.max(0, x.findLastIndex((step) => step < first)), // one point beyond both ends
      x.findLastIndex((step) => step <= last) + 2];
    const views = this.curves.map((curve) => ({ curve, train: reach(curve.train), val: reach(curve.val) }));
    const scale = (loss) => (this.log ? Math.log(Math.max(loss, 1e-6)) : loss);
    const bounds = this.lossRange(views), [bottom, top] = bounds.map(scale);
    this.atX = (step) => LEFT + ((step - first) / (last - first)) * inner;
    this.atY = (loss) => TOP + (1 - (scale(loss) - bottom) / (top - bottom)) * tall;
    this.clip.setAttribute("width", inner + 10);
    this.clip.setAttribute("height", height - BOTTOM + 5);
    this.band.setAttribute("height", tall);
    this.drawAxes(bounds, inner);
    this.lines.replaceChildren(...views.map((view) => this.drawCurve(view, inner)));
    if (this.cursor !== null) this.point(Math.min(last, Math.max(first, this.cursor)));
  }
  /** The lowest and highest loss in view, with a little air. */
  lossRange(views) {
    const seen = views.flatMap(({ curve, train, val }) => [curve.train.y.slice(...train), curve.val.y.slice(...val)]);
    const [low, high] = [Math.min, Math.max].map((pick) => seen.flat().reduce((a, b) => pick(a, b), seen.flat()[0]));
    if (low === undefined) return [1, 2];
    if (this.log) return [Math.max(low, 1e-6) / 1.03, Math.max(high, 2e-6) * 1.03];
    const air = (high - low || 1) * 0.04;
    return [low - air, high + air];
  }
  drawAxes(bounds, inner) {
    const bottom = this.height - BOTTOM, text = (x, y, anchor, value) =>
      svg("text", { x, y, "text-anchor": anchor }, value.toLocaleString("en", { maximumSignificantDigits: 9 }));
    const losses = ticks(...bounds, 5, this.log), steps = ticks(...this.range, Math.max(2, Math.round(inner / 70)));
    this.axes.replaceChildren(svg("path", { class: "base", d: `M${LEFT} ${TOP}V${bottom}h${inner}` }),
      svg("path", { d: losses.map((loss) => `M${LEFT} ${this.atY(loss)}h${inner}`).join("") }),
      ...losses.map((loss) => text(LEFT - 6, this.atY(loss) + 4, "end", loss)),
      ...steps.filter(Number.isInteger).map((step) => text(this.atX(step), bottom + 18, "middle", step)));
  }

  drawCurve({ curve, train, val }, width) {
    curve.smoothTo(this.factor);
    curve.group ??= svg("g", { class: `series-${curve.style % 6}`, "data-run": curve.name },
      svg("path", { class: "raw" }), smoothLine(curve.style), svg("path", { class: "mark" }));
    const [raw, smooth, marks] = curve.group.children;
    raw.setAttribute("d", pathOf(curve.train.x, curve.train.y, train, this.atX, this.atY, width));
    smooth.setAttribute("d", pathOf(curve.train.x, curve.smooth, train, this.atX, this.atY, width));
    const places = curve.val.x.slice(...val).map((step, i) => [this.atX(step), this.atY(curve.val.y[val[0] + i])]);
    marks.setAttribute("d", places.map(([x, y]) => `M${x.toFixed(1)} ${y.toFixed(1)}h0`).join(""));
    return curve.group;
  }
}
