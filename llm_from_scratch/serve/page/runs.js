// Runs: loss curves of run folders beside each other, with samples, figures and settings; live while they train.
import { Curve, LossChart, swatch } from "./chart.js";
import { el } from "./dom.js";
import { addStrings, language, t } from "./i18n.js";
import { strings } from "./strings_inside.js";

addStrings(strings);
const EVERY_MS = 2000;
const COLUMNS = ["name", "state", "steps", "val_loss", "updated"];
const told = (tag, key, attributes = {}) => el(tag, { ...attributes, "data-t": key }, t(key));

/** A number as the language writes it; losses with three decimals. */
function number(value) {
  if (!Number.isFinite(value)) return "–";
  const whole = Number.isInteger(value) || value >= 100, [least, most] = whole ? [0, 1] : value < 0.1 ? [3, 6] : [3, 3];
  return value.toLocaleString(language(), { minimumFractionDigits: least, maximumFractionDigits: most });
}

export function mountRuns(root, context) {
  const rows = new Map(); // by name: {name, data, curve, seen, one, box, cells, element}
  let open = null, timer = null, busy = false, again = false;

  const readout = el("output", { id: "run-readout" });
  const chart = new LossChart((step, points) => readout.replaceChildren(...(step === null ? [t("runs.hint")]
    : [el("b", {}, t("runs.step", { step })), ...points.map(pointText)])));
  chart.element.dataset.tLabel = "runs.chart";
  chart.point(null);
  const problem = el("p", { role: "alert", class: "error" });
  const empty = told("p", "runs.empty", { id: "runs-empty", hidden: true });
  const title = (key) => told("th", `runs.${key}`, { scope: "col", class: key }), body = el("tbody");
  const table = el("table", { id: "run-list" }, el("thead", {}, el("tr", {}, ["show", ...COLUMNS].map(title))), body);
  const button = (id, key, onclick) => told("button", key, { type: "button", id, class: "quiet small", onclick });
  const log = el("input", { type: "checkbox", id: "chart-log", onchange: () => chart.set({ log: log.checked }) });
  const smooth = el("input", { type: "range", id: "chart-smooth", min: 0, max: 0.99, step: 0.01, value: 0.9,
    oninput: () => chart.set({ factor: Number(smooth.value) }) });
  const figure = el("figure", { class: "chart" }, el("div", { class: "controls" },
    el("label", {}, log, told("span", "runs.log")), el("label", {}, told("span", "runs.smooth"), smooth),
    button("chart-reset", "runs.reset", () => chart.zoomTo()), button("runs-refresh", "runs.refresh", refresh),
  ), chart.element, readout);
  const details = el("section", { id: "run-details" });
  root.append(problem, empty, el("div", { class: "scroll" }, table), figure, details);
  function pointText({ curve, step, loss, smooth: mean, valStep, val }) {
    const parts = [loss !== undefined && t("runs.point", { step, loss: number(loss), smooth: number(mean) }),
      val !== undefined && t("runs.point.val", { step: valStep, loss: number(val) })];
    const text = parts.filter(Boolean).join(" · ");
    return el("span", { class: "point" }, swatch(curve.style), el("b", {}, curve.name), text);
  }
  function makeRow(data) {
    const { name } = data, cells = COLUMNS.slice(1).map((key) => el("td", { class: key }));
    const row = { name, cells, curve: new Curve(name, rows.size) };
    row.box = el("input", { type: "checkbox", checked: rows.size === 0, "aria-label": name, onchange: refresh });
    const show = () => { open = name; row.box.checked = true; refresh(); };
    const choose = el("button", { type: "button", class: "quiet small", onclick: show }, name);
    row.element = el("tr", { "data-run": name }, el("td", {}, el("label", {}, row.box, swatch(row.curve.style))),
      el("th", { scope: "row" }, choose), cells);
    rows.set(name, row);
    return row.element;
  }
  function fillRow({ data, name, cells, element }) {
    const { steps, max_steps: most, val_loss: loss, running } = data, date = new Date(data.updated * 1000);
    const texts = [t(running ? "runs.running" : "runs.finished"),
      most > steps ? `${number(steps)} / ${number(most)}` : number(steps), number(loss),
      date.toLocaleString(language(), { dateStyle: "short", timeStyle: "short" })];
    cells.forEach((cell, i) => { cell.textContent = texts[i]; });
    element.classList.toggle("running", running);
    element.classList.toggle("open", name === open);
  }

  /** Fetch a run's new points. Its last step is asked for again: its val_loss is written after its loss. */
  async function load(row) {
    if (row.data.steps < row.curve.last) row.curve = new Curve(row.name, row.curve.style); // begun again
    const seen = JSON.stringify(row.data), name = encodeURIComponent(row.name);
    if (row.seen === seen) return;
    row.one = await context.api.get(`api/runs/one?name=${name}&after=${row.curve.last - 1}`);
    row.curve.add(row.one.metrics);
    row.seen = seen;
  }
  async function refresh() {
    again = busy; // a box was ticked while the runs are being fetched
    if (busy) return;
    busy = true;
    try {
      const { runs } = await context.api.get("api/runs");
      const fresh = runs.filter(({ name }) => !rows.has(name)).sort((a, b) => b.updated - a.updated);
      body.prepend(...fresh.map(makeRow));
      for (const data of runs) rows.get(data.name).data = data;
      for (const [name, row] of rows) if (!runs.includes(row.data)) { row.element.remove(); rows.delete(name); }
      if (!rows.has(open)) open = rows.keys().next().value;
      for (const row of rows.values()) {
        fillRow(row);
        if (row.box.checked || row.name === open) await load(row);
      }
      empty.hidden = rows.size > 0;
      figure.hidden = table.hidden = details.hidden = rows.size === 0;
      chart.set({ curves: [...rows.values()].filter(({ box }) => box.checked).map(({ curve }) => curve) });
      showDetails(rows.get(open)?.one);
      problem.textContent = "";
    } catch (error) {
      problem.textContent = error.message;
    }
    busy = false;
    if (again) refresh(); else plan();
  }
  /** While a run is being trained and somebody can see it, look again. */
  function plan() {
    clearTimeout(timer);
    const live = [...rows.values()].some(({ data }) => data.running);
    if (live && !document.hidden && !root.hidden) timer = setTimeout(refresh, EVERY_MS);
  }

  function showDetails(one) {
    const { name, summary, samples, config } = one ?? {};
    const state = JSON.stringify([name, summary, samples, config, language()]);
    if (!one || details.state === state) return;
    const unfolded = [...details.querySelectorAll("[open]")].map(({ id }) => id).filter((id) => id !== details.newest);
    const fold = (id, title, content) =>
      el("details", { id, open: unfolded.includes(id) }, el("summary", {}, title), content);
    const steps = (samples ?? "").split(/\n(?=## Step \d+\n)/).slice(1).map((part) => {
      const [head, ...rest] = part.split("\n"), step = Number(head.slice(8));
      return fold(`samples-${step}`, t("runs.step", { step }), sampleTexts(rest.join("\n")));
    }).reverse();
    if (steps.length) steps[0].open = true;
    Object.assign(details, { state, newest: steps[0]?.id });
    const figure = ([key, value]) => el("div", {}, el("dt", {}, t(`summary.${key}`).replace("summary.", "")),
      el("dd", {}, isNaN(value) ? String(value) : number(value)));
    const figures = Object.entries(summary ?? {}).map(figure);
    details.replaceChildren(el("h3", {}, name), el("dl", { class: "figures" }, figures),
      el("h4", {}, t(steps.length ? "runs.samples" : "runs.no.samples")), ...steps,
      config ? fold("run-config", t("runs.config"), el("pre", {}, config)) : "");
  }
  /** The samples of one step: the beginnings in bold, what was written as it is. */
  function sampleTexts(markdown) {
    const unfenced = (part) => part.trim().replace(/^`{3,}text\n|\n?`{3,}$/g, "");
    return markdown.split(/^(\*\*.*\*\*)$/m).map((part) => (part.startsWith("**") ? el("b", {}, part.slice(2, -2))
      : part.trim() && el("pre", {}, unfenced(part))));
  }

  addEventListener("hashchange", () => root.hidden || refresh());
  document.addEventListener("visibilitychange", () => (document.hidden || root.hidden ? plan() : refresh()));
  context.onLanguage(() => { rows.forEach(fillRow); chart.point(null); showDetails(rows.get(open)?.one); });
  context.translate(root);
  refresh();
}
