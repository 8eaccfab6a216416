// The tokens whose embeddings point most nearly the same way; every one of them leads on to its own neighbours.
import { el } from "./dom.js";
import { t } from "./i18n.js";
import { bars, tokenStrip, tokenText, visible } from "./strip.js";

export async function neighboursView(page, panel) {
  const { state } = page, visited = (state.visited ??= []); // the way from a token of the text to the present one
  const strip = tokenStrip(state.tokens, { label: t("inside.view.tokens"), chosen: state.selected, onChoose: (i) => {
    state.selected = i;
    visited.length = 0;
    go({ id: state.ids[i] });
  } });
  const input = el("input", { id: "neighbours-text", autocomplete: "off", maxlength: 200, required: true });
  const form = el("form", { class: "controls" }, el("label", {}, t("neighbours.other"), input),
    el("button", { type: "submit", class: "quiet" }, t("runs.show")));
  form.addEventListener("submit", (event) => { event.preventDefault(); go({ text: input.value }); });
  const trail = el("ol", { class: "trail", "aria-label": t("neighbours.trail") });
  const list = el("div", { id: "neighbours-list", "aria-live": "polite" });
  panel.append(strip.element, form, trail, list);
  async function go(what) {
    const answer = await page.ask("api/inside/neighbours", { ...what, top: 12 }, list);
    if (!answer) return;
    const { token, pieces, neighbours } = answer, seen = visited.findIndex(({ id }) => id === token.id);
    visited.splice(seen < 0 ? visited.length : seen, Infinity, token);
    trail.replaceChildren(...visited.slice(-8).map(({ id, text }) => el("li", {}, el("button", { type: "button",
      class: "quiet small", onclick: () => go({ id }) }, tokenText(text)))));
    list.replaceChildren(el("h4", {}, t("neighbours.of", { text: visible(token.text), id: String(token.id) })),
      pieces?.length > 1 ? el("p", { class: "hint" }, t("neighbours.pieces", { ...what, count: pieces.length })) : "",
      bars(neighbours.map(({ id, text, cosine }) => ({ id, text, share: cosine, figure: cosine.toFixed(3),
        onclick: () => go({ id }) }))));
  }
  await go({ id: visited.at(-1)?.id ?? state.ids[state.selected] });
}
