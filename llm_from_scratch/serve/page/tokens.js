// The tokens of an answer, coloured by how likely the model found them, and the panel of a token: what could have
// stood in its place, and how likely that was. Arrow keys walk along the tokens, Enter opens the panel, Esc closes it.
import { byId, el, icon, iconButton } from "./dom.js";
import { alternatives } from "./generate.js";
import { language, t } from "./i18n.js";
import { percent, tokenText, visible } from "./strip.js";
const BORDERS = [0.05, 0.2, 0.5, 0.8]; // of the five colours
const share = ({ logprob }) => Math.exp(logprob);
const pieceAt = (box, place) => box.querySelector(`[data-place="${place}"]`);
let panel = null; // the open one: {element, box, place}

/** A box for the tokens of `node`; `onPick(place, other)` continues from another one. */
export function tokenBox(node, onPick) {
  const act = (event, key = event.key) => {
    const place = Number(event.target.closest(".piece")?.dataset.place ?? -1);
    const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: node.tokens.length - 1 }[key];
    const opens = key === "Enter" || key === " ";
    if (place < 0 || event.ctrlKey || event.metaKey || event.altKey || (to === undefined && !opens)) return;
    event.preventDefault();
    if (opens) openPanel(box, node, place, onPick);
    else focusOn(box, to);
  };
  const box = el("div", { class: "pieces", role: "group", "aria-label": t("piece.of"), onkeydown: (event) => act(event),
    onclick: (event) => act(event, "Enter") });
  return box;
}

/** Put the tokens that the box does not show yet at its end. */
export function showTokens(box, { tokens }) {
  for (let place = box.childElementCount; place < tokens.length; place++) {
    const { id, text, logprob, part, completed, picked } = tokens[place];
    const level = BORDERS.filter((border) => share({ logprob }) >= border).length;
    const shown = (line) => (text.trim() || !line ? line : tokenText(line)); // spaces between words need no sign
    const lines = part || !text ? tokenText(text)
      : text.split("\n").map((line, i) => [i > 0 && [tokenText("\n"), el("br")], shown(line)]);
    box.append(el("span", { role: "button", tabindex: place ? -1 : 0, "data-place": place,
      class: `piece level-${level} ${part ? "part" : ""} ${picked ? "picked" : ""}`,
      title: `${id} · ${percent(share({ logprob }))}` }, lines, completed && el("b", {}, completed)));
  }
}

/** What the colours mean. */
export const legend = () => el("p", { class: "legend" }, t("piece.unlikely"),
  [0, 1, 2, 3, 4].map((level) => el("span", { class: `sample level-${level}` })), t("piece.likely"));

function focusOn(box, place) {
  if (!pieceAt(box, place)) return;
  box.querySelector("[tabindex='0']").tabIndex = -1;
  pieceAt(box, place).tabIndex = 0;
  pieceAt(box, place).focus();
}

/** Close the panel; true if there was one. The focus goes back to its token. */
export function closePanel() {
  if (!panel) return false;
  const { element, box, place } = panel;
  const hadFocus = element.contains(document.activeElement);
  panel = null;
  element.remove();
  pieceAt(box, place).classList.remove("open");
  if (hadFocus) focusOn(box, place);
  return true;
}

addEventListener("pointerdown", ({ target }) => panel?.element.contains(target) || closePanel());

async function openPanel(box, node, place, onPick) {
  closePanel();
  focusOn(box, place);
  const token = node.tokens[place];
  const last = node.tokens.length - 1;
  const list = el("ol", { class: "alternatives" }, el("li", { class: "hint" }, t("piece.loading")));
  const step = (by) => place + by >= 0 && place + by <= last && openPanel(box, node, place + by, onPick);
  const facts = t("piece.facts", { id: String(token.id), place: place + 1, share: percent(share(token)) });
  const element = el("div", { id: "token-panel", role: "dialog", "aria-label": t("piece.panel"),
    onkeydown: ({ key }) => step({ ArrowLeft: -1, ArrowRight: 1 }[key]) },
    el("header", {}, el("code", { class: "token-text" }, tokenText(token.text)), el("span", { class: "facts" }, facts),
      iconButton("left", t("piece.previous"), () => step(-1), { disabled: place === 0 }),
      iconButton("right", t("piece.next"), () => step(1), { disabled: place === last }),
      iconButton("close", t("close"), closePanel, { id: "close-token" })),
    token.part && el("p", { class: "hint" }, t("piece.part")), list,
    el("p", { class: "hint" }, el("a", { href: `docs/${language()}/page`, target: "_blank" }, t("piece.hint"))));
  panel = { element, box, place };
  pieceAt(box, place).classList.add("open");
  byId("chat").append(element);
  movePanel();
  byId("close-token").focus({ preventScroll: true });
  try {
    const found = await alternatives(node, place);
    const all = found.some(({ id }) => id === token.id) ? found : [...found, token];
    list.replaceChildren(...all.map((one) => row(one, one.id === token.id, () => [closePanel(), onPick(place, one)])));
  } catch (error) {
    list.replaceChildren(el("li", { class: "hint" }, error.message));
  }
  movePanel();
}

function row(one, isOwn, pick) {
  const bar = el("span", { class: "bar" }, el("span"));
  bar.firstChild.style.width = `${Math.max(share(one) * 100, 0.5)}%`;
  return el("li", { class: isOwn && "own" }, el("code", {}, tokenText(one.text)), bar,
    el("span", { class: "share" }, percent(share(one))), el("span", { class: "id" }, String(one.id)), isOwn
      ? el("span", { class: "taken", role: "img", "aria-label": t("piece.taken") }, icon("check"))
      : iconButton("branch", t("piece.pick", { text: visible(one.text) }), pick, { class: "pick" }));
}

/** Put the panel below its token or, without room there, above; on a phone the style sheet puts it at the bottom. */
export function movePanel() {
  if (!panel) return;
  const { style, offsetWidth: width, offsetHeight: height } = panel.element;
  const token = pieceAt(panel.box, panel.place).getBoundingClientRect();
  const area = byId("chat").getBoundingClientRect();
  const top = token.bottom + 8 + height < innerHeight ? token.bottom + 8 : token.top - height - 8;
  style.left = `${Math.max(8, Math.min(token.left - 24, innerWidth - width - 8)) - area.left}px`;
  style.top = `${Math.max(8, top) - area.top}px`;
}
