// Tokens in a row, and the other parts that the views of See inside share: one choice of many, bars, a range.
import { el } from "./dom.js";
import { t } from "./i18n.js";

const SIGNS = { " ": "·", "\n": "↵", "\r": "␍", "\t": "⇥", "\u3000": "□", "": "∅" };
const SIGN = /([·↵␍⇥□∅⍽]+)/; // the last one is any other sign that takes room or none and shows nothing

/** A token's text with spaces and line ends made visible, and bytes of a part of a character as ⟨e3 81⟩. */
export const visible = (text) => text.replace(/[\p{Zs}\p{Cc}\u200b\u200e\u200f\ufeff]|^$/gu, (s) => SIGNS[s] ?? "⍽")
  .replace(/(\\x[0-9a-f]{2})+/g, (bytes) => `⟨${bytes.slice(2).replaceAll("\\x", " ")}⟩`);
/** The same as nodes, with the signs in a fainter colour. */
export const tokenText = (text) => visible(text).split(SIGN).filter(Boolean).map((part) =>
  (SIGN.test(part) ? el("span", { class: "sign" }, part) : part));
export const percent = (share) => `${(share * 100).toFixed(share > 0 && share < 0.0995 ? 2 : 1)} %`;

/**
 * One of `options` (elements in `box`) is chosen by a click or the arrow keys, and only it is in the tab order;
 * in a grid of `columns` up and down move by a row. Gives a function that chooses from outside without telling.
 */
export function rove(box, options, chosen, onChoose, columns = 1) {
  let current = 0;
  const mark = (i, is) => {
    options[i]?.setAttribute("aria-selected", is);
    options[i]?.setAttribute("tabindex", is ? 0 : -1);
  };
  const choose = (to) => { mark(current, false); mark(current = to, true); };
  options.forEach((option, i) => {
    mark(i, false);
    option.addEventListener("click", () => { choose(i); onChoose(i); });
  });
  box.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: current - 1, ArrowRight: current + 1, ArrowUp: current - columns,
      ArrowDown: current + columns, Home: 0, End: options.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (!options[to]) return;
    options[to].focus();
    choose(to);
    onChoose(to);
  });
  choose(options[chosen] ? chosen : 0);
  return choose;
}

/** Tokens as a list of which one can be chosen; `first` is the position of tokens[0] in the text. */
export function tokenStrip(tokens, { label, chosen, first = 0, ids = false, onChoose }) {
  const options = tokens.map(({ id, text, special }, i) => el("span", {
    role: "option", class: `token hue-${(first + i) % 5}${special ? " special" : ""}`,
    "aria-label": t("inside.token", { position: first + i + 1, text: visible(text), id: String(id) }),
  }, el("span", {}, tokenText(text)), ids && el("span", { class: "id" }, String(id))));
  const element = el("div", { class: "strip", role: "listbox", "aria-label": label, "aria-orientation": "horizontal" },
    options.map((option, i) => [option, tokens[i].text.includes("\n") && el("br")]));
  const choose = rove(element, options, chosen - first, (i) => onChoose(i + first));
  return { element, options, choose: (i) => choose(i - first) };
}

/** Rows of a token, a bar of `share` (0 to 1) and a figure; a row with `onclick` is a button. */
export function bars(rows) {
  return el("ol", { class: "bars" }, rows.map(({ text, id, share, figure, onclick, mark }) => {
    const bar = el("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", Math.min(1, Math.max(0, share)));
    return el("li", { class: mark && "mark" }, el(onclick ? "button" : "div", { type: onclick && "button", onclick },
      el("span", { class: "name" }, tokenText(text)), el("span", { class: "id" }, String(id)), bar,
      el("span", { class: "figure" }, figure)));
  }));
}

/**
 * From which to which token a view shows: at first the last `most` of `count`. The caller keeps `range`, {from, to}
 * (from 0, `to` excluded). The model reads up to `to`, and from `limit` tokens before it.
 */
export function rangeChoice(range, count, limit, most, onChange) {
  range.to ??= count;
  range.from ??= Math.max(0, count - most);
  const field = (name, value, set) => {
    const onchange = ({ target }) => { set(Math.min(count, Math.max(1, Math.round(target.value) || 1))); onChange(); };
    const input = el("input", { type: "number", id: `range-${name}`, min: 1, max: count, value, onchange });
    return el("label", {}, t(`inside.${name}`), input);
  };
  return el("div", { class: "range" }, t("inside.range", { count }),
    field("from", range.from + 1, (first) => {
      range.from = first - 1;
      range.to = Math.min(count, range.from + limit, Math.max(range.to, first));
    }),
    field("to", range.to, (last) => {
      range.to = last;
      range.from = Math.max(0, last - limit, Math.min(range.from, last - 1));
    }), count > limit && el("span", { class: "hint" }, t("inside.cut", { limit })));
}
