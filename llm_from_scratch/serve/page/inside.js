// See inside: one text, five views of what the chosen model makes of it.
import { alternativesView } from "./alternatives.js";
import { attentionView } from "./attention.js";
import { el } from "./dom.js";
import { addStrings, t } from "./i18n.js";
import { lensView } from "./lens.js";
import { neighboursView } from "./neighbours.js";
import { strings } from "./strings_inside.js";
import { rove, tokenStrip, visible } from "./strip.js";

addStrings(strings);
const VIEWS = { tokens: tokensView, alternatives: alternativesView, attention: attentionView, lens: lensView,
  neighbours: neighboursView };
const WRITERS_ONLY = ["alternatives", "lens"]; // what an embedding model has no part for

function tokensView({ state }, panel) {
  const { tokens } = state, characters = [...state.text].length;
  const chosen = el("p", { id: "token-chosen", "aria-live": "polite" }), label = t("inside.view.tokens");
  const tell = (i) => {
    const { id, text } = tokens[state.selected = i];
    chosen.textContent = t("inside.token", { position: i + 1, text: visible(text), id: String(id) });
  };
  const strip = tokenStrip(tokens, { label, ids: true, chosen: state.selected, onChoose: tell });
  strip.element.id = "token-list";
  const parts = tokens.some(({ text }) => /^(\\x[0-9a-f]{2})+$/.test(text));
  const ratio = (characters / tokens.length).toFixed(2);
  const count = t("tokens.count", { tokens: tokens.length, characters, ratio });
  panel.append(el("p", { id: "token-count" }, count), strip.element, chosen,
    el("p", { class: "hint" }, parts && t("tokens.bytes")));
  tell(state.selected);
}

export function mountInside(root, context) {
  const state = { view: "tokens", text: "", ids: [], tokens: [], selected: 0, edited: false };
  let answers = new Map(), turn = 0, redraw = null;
  /** What the views share; `state` outlives them. */
  const page = {
    root, state, show, model: context.model,
    onTheme(paint) { redraw = paint; },
    /** The server's answer about the chosen model; null where it failed (`place` says why) or came too late. */
    async ask(path, body, place) {
      const asked = turn, name = path + JSON.stringify(body);
      place.setAttribute("aria-busy", "true");
      if (!place.childElementCount) place.append(el("p", { class: "hint" }, t("inside.busy")));
      try {
        if (!answers.has(name)) answers.set(name, context.api.post(path, { model: context.model().name, ...body }));
        const answer = await answers.get(name);
        return asked === turn ? answer : null;
      } catch (error) {
        answers.delete(name);
        if (asked === turn) place.replaceChildren(el("p", { role: "alert", class: "error" }, error.message));
        return null;
      } finally {
        place.removeAttribute("aria-busy");
      }
    },
  };

  const text = el("textarea", { id: "inside-text", rows: 3, maxlength: 20000, spellcheck: "false",
    oninput: () => { state.edited = true; },
    onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) look(); } });
  const fromChat = el("button", { type: "button", id: "inside-from-chat", class: "quiet", "data-t": "inside.from.chat",
    onclick: () => { state.edited = false; look(); } });
  const form = el("form", { id: "inside-form", onsubmit: (event) => { event.preventDefault(); look(); } },
    el("label", { for: "inside-text", "data-t": "inside.text" }), text, el("div", { class: "controls" },
      el("button", { type: "submit", id: "inside-look", class: "primary", "data-t": "inside.look" }), fromChat));
  const tabs = Object.keys(VIEWS).map((name) => el("button", { type: "button", role: "tab", id: `inside-tab-${name}`,
    "aria-controls": "inside-panel", "data-t": `inside.view.${name}` }));
  const list = el("div", { role: "tablist", class: "views", "data-t-label": "tab.inside" }, tabs);
  rove(list, tabs, 0, (i) => { state.view = Object.keys(VIEWS)[i]; show(); });
  const panel = el("div", { role: "tabpanel", id: "inside-panel" });
  root.append(form, list, panel);
  context.translate(root);
  /** Tokenize the text (or take the conversation's ids as they are), then show the view. */
  async function look() {
    const asked = ++turn, ids = state.edited ? null : context.conversationIds();
    answers = new Map();
    Object.assign(state, { attentionRange: null, lensRange: null, visited: null, written: null, tokens: [] });
    if (!ids && !state.edited) text.value = t("inside.example").replace("\\n", "\n");
    const [answer, whole] = await Promise.all([
      page.ask("api/inside/tokens", ids ? { ids } : { text: text.value }, panel),
      ids && page.ask("v1/detokenize", { tokens: ids }, panel),
    ]);
    if (asked !== turn || !answer) return;
    if (whole) text.value = whole.prompt;
    Object.assign(state, { tokens: answer.tokens, ids: answer.tokens.map(({ id }) => id), text: text.value });
    const word = answer.tokens.findLastIndex((token) => /^ ?\p{L}{2,}$/u.test(token.text));
    state.selected = word < 0 ? Math.max(0, state.ids.length - 1) : word; // more telling than a full stop
    show();
  }
  async function show() {
    const { view } = state, asked = ++turn;
    redraw = null;
    fromChat.hidden = !context.conversationIds();
    panel.setAttribute("aria-labelledby", `inside-tab-${view}`);
    const body = el("div", { class: `view view-${view}` });
    panel.replaceChildren(el("p", { class: "about" }, t(`${view}.about`), " ", el("a", { target: "_blank",
      href: `docs/${context.language()}/inside#${view}` }, t("inside.docs"))), body);
    if (context.model().kind === "embedder" && WRITERS_ONLY.includes(view)) {
      body.append(el("p", { class: "notice" }, t("inside.not.writer")));
    } else if (!state.tokens.length) body.append(el("p", {}, t("inside.empty")));
    else await VIEWS[view](page, body, () => asked === turn);
  }
  /** On coming back: the conversation may have gone on, or the model may be another one. */
  function shown() {
    const ids = state.edited ? null : context.conversationIds();
    if (!state.tokens.length || (ids && String(ids) !== String(state.ids))) look();
    else fromChat.hidden = !context.conversationIds();
  }
  addEventListener("hashchange", () => root.hidden || shown());
  context.onLanguage(show);
  context.onModel(() => {
    state.tokens = [];
    if (!root.hidden) look();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw?.());
  new MutationObserver(() => redraw?.()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  shown();
}
