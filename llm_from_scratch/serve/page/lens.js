// The logit lens: what every layer would write next after every token, were it the last layer.
import { el } from "./dom.js";
import { t } from "./i18n.js";
import { bars, percent, rangeChoice, rove, tokenText, visible } from "./strip.js";

const MOST = 96, SHOWN = 24, TOP = 5; // tokens that the server reads, tokens shown at first, guesses of each
const nameOf = (depth) => (depth === 0 ? t("lens.embedding") : String(depth));

export async function lensView(page, panel) {
  const { state } = page, range = (state.lensRange ??= {}), body = el("div");
  const limit = Math.min(MOST, page.model().context || MOST);
  panel.append(rangeChoice(range, state.tokens.length, limit, SHOWN, page.show), body);
  const start = Math.max(0, range.to - limit), columns = range.to - range.from;
  const answer = await page.ask("api/inside/lens", { ids: state.ids.slice(start, range.to), top: TOP }, body);
  if (!answer) return;
  const details = el("div", { id: "lens-cell", "aria-live": "polite" }), options = [];
  const heads = [t("attention.choose"), ...state.tokens.slice(range.from, range.to).map(({ text }) => tokenText(text))];
  const rows = answer.cells.map((guesses, depth) => el("tr", {}, el("th", { scope: "row" }, nameOf(depth)),
    guesses.slice(range.from - start).map(([best], i) => {
      const cell = el("td", { role: "gridcell", class: best.id === state.ids[range.from + i + 1] && "right",
        "aria-label": t("lens.cell", { layer: nameOf(depth), text: visible(best.text), share: percent(best.p) }) },
      el("span", {}, tokenText(best.text)));
      cell.style.setProperty("--share", best.p);
      options.push(cell);
      return cell;
    })));
  const table = el("table", { id: "lens-table", role: "grid", "aria-label": t("inside.view.lens") },
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, rows));
  function open(index) {
    const depth = Math.floor(index / columns), position = (state.selected = range.from + (index % columns));
    const { text } = state.tokens[position], guesses = answer.cells[depth][position - start];
    details.replaceChildren(
      el("h4", {}, t("lens.title", { layer: nameOf(depth), position: position + 1, text: visible(text) })),
      bars(guesses.map((guess) => ({ ...guess, share: guess.p, figure: percent(guess.p),
        mark: guess.id === state.ids[position + 1] }))));
  }
  const column = Math.min(columns - 1, Math.max(0, state.selected - range.from));
  const chosen = (rows.length - 1) * columns + column;
  rove(table, options, chosen, open, columns);
  const frame = el("div", { class: "scroll" }, table);
  body.replaceChildren(el("p", { class: "hint" }, t("lens.hint")), frame, details);
  frame.scrollLeft = options[chosen].offsetLeft - frame.clientWidth / 2;
  open(chosen);
}
