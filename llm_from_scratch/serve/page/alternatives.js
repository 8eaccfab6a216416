// The text continued token by token: how likely each one was, what else could have come, and what would have followed.
import { el } from "./dom.js";
import { continueFrom } from "./generate.js";
import { t } from "./i18n.js";
import { bars, percent, tokenStrip, visible } from "./strip.js";

const SETTINGS = { temperature: 0, max_tokens: 24, seed: null, stop: "" };
const BEFORE = 240; // characters of the text that are shown before its continuation
const shareOf = ({ logprob }) => Math.exp(logprob);

export async function alternativesView(page, panel, current) {
  const { state } = page, stop = new AbortController(), model = page.model().name;
  const given = state.text.length > BEFORE ? `… ${state.text.slice(-BEFORE)}` : state.text;
  const strip = el("div", { id: "alternatives-written" });
  const list = el("div", { id: "alternatives-list", "aria-live": "polite" });
  const problem = el("p", { role: "alert" });
  const button = (name, onclick) => el("button", { type: "button", id: `alternatives-${name}`, class: "quiet",
    onclick }, t(`alternatives.${name}`, { count: SETTINGS.max_tokens }));
  const more = button("more", () => write()), anew = button("anew", () => { state.written = null; page.show(); });
  panel.append(el("p", { class: "given" }, given), strip, problem, el("div", { class: "controls" }, more, anew), list);
  let node = (state.written ??= { model, plain: true, prompt: state.ids, tokens: [], content: "", place: 0 });

  function draw() {
    const label = t("inside.view.alternatives");
    const tokens = tokenStrip(node.tokens, { label, chosen: node.place, onChoose: open });
    tokens.options.forEach((option, i) => option.style.setProperty("--share", shareOf(node.tokens[i])));
    strip.replaceChildren(tokens.element);
    if (node.tokens[node.place]) open(node.place);
  }
  function open(place) {
    const { id, text, top } = node.tokens[(node.place = place)];
    list.replaceChildren(el("h4", {}, t("alternatives.of", { position: place + 1, text: visible(text) })),
      bars(top.map((one) => ({ ...one, share: shareOf(one), figure: percent(shareOf(one)), mark: one.id === id,
        onclick: () => write(place, one) }))));
  }
  /** Writes on from the end, or from token `place` with `other` in its stead. */
  async function write(place = node.tokens.length, other = null) {
    const old = node;
    node = state.written = { model, place };
    more.disabled = true;
    const changed = () => (current() ? draw() : stop.abort());
    await continueFrom(old, place, other, node, { settings: SETTINGS, signal: stop.signal, changed });
    if (!current()) return;
    more.disabled = node.finish === "stop";
    problem.textContent = node.error ?? (more.disabled ? t("alternatives.ended") : "");
    problem.className = node.error ? "error" : "hint";
    draw();
  }
  draw();
  if (!node.tokens.length) await write();
}
