// One message as it stands on the page: its text (Markdown, or its tokens), its versions, and what can be done with it.
import { copyButton, el, icon, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { markdown } from "./markdown.js";
import { legend, showTokens, tokenBox } from "./tokens.js";
const button = (look, onclick, ...content) => el("button", { type: "button", class: look, onclick }, content);
/** Whether a key means "send": Enter, but neither with Shift nor to take over what an input method offers. */
export const isSend = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

/**
 * The view of a message. `state()` says {running, versions, version, tokens}; `act` holds what the buttons do.
 * `update()` shows what has changed; to the tokens of an answer it only adds.
 */
export function messageView(node, state, act) {
  const isUser = node.role === "user";
  const [body, foot] = [el("div", { class: "body" }), el("footer")];
  const who = el("h3", { class: isUser ? "sr-only" : "who" }, isUser ? t("you") : node.model ?? t("answer"));
  const element = el("li", { class: `message ${node.role}` }, who, body, foot);
  let editing = false;

  function update() {
    const { running } = state();
    element.setAttribute("aria-busy", String(running));
    if (!editing) fill(running);
    const parts = isUser ? buttons() : running ? [speed(node)] : [notice(), ...buttons()];
    foot.replaceChildren(...parts.filter((part) => part && !editing));
  }

  function fill(running) {
    if (isUser) return body.replaceChildren(node.content);
    if (!state().tokens || !node.tokens?.length) {
      return body.replaceChildren(node.content ? markdown(node.content) : running ? waiting() : "");
    }
    if (!body.querySelector(".pieces")) body.replaceChildren(tokenBox(node, act.pick), legend());
    return showTokens(body.firstChild, node);
  }

  const buttons = () => [versions(), node.content && copyButton(t("copy"), () => node.content),
    (!isUser || !node.children.length) && iconButton("again", t("again"), act.again, { class: "again" }),
    iconButton("pen", t("edit"), edit, { class: "edit" }), !isUser && speed(node)];

  function versions() {
    const { versions: count, version } = state();
    const arrow = (name, key, by, disabled) => iconButton(name, t(key), () => act.choose(by), { disabled });
    return count > 1 && el("span", { class: "versions", role: "group", "aria-label": t("versions") },
      arrow("left", "version.previous", -1, version === 0), `${version + 1}/${count}`,
      arrow("right", "version.next", 1, version + 1 === count));
  }

  /** Why the answer ended, unless the model was through with it. */
  function notice() {
    const { error, finish, tokens } = node;
    const ended = tokens && !finish ? "early" : finish;
    if (!error && !["early", "length", "stopped"].includes(ended)) return null;
    const why = error ?? t(`ended.${ended}`);
    return el("div", { class: `notice ${error ? "problem" : ""}`, role: error && "alert" }, why,
      tokens?.length > 0 && button("quiet go-on", act.goOn, t("go.on")),
      error && button("quiet retry", act.again, t("retry")));
  }

  function edit() {
    editing = true;
    const rows = Math.min(14, node.content.split("\n").length + 1);
    const area = el("textarea", { "aria-label": t("edit"), rows, onkeydown: (event) => {
      const isKeep = isSend(event) && (isUser || event.ctrlKey || event.metaKey);
      if (!isKeep && event.key !== "Escape") return;
      event.preventDefault();
      (isKeep ? keep : leave)();
    } }, node.content);
    const leave = () => {
      editing = false;
      body.replaceChildren();
      update();
      foot.querySelector(".edit").focus();
    };
    const keep = () => (area.value.trim() && area.value !== node.content ? act.edit(area.value) : leave());
    body.replaceChildren(area, el("div", { class: "row" }, button("quiet", leave, t("cancel")),
      button("primary", keep, t(isUser ? "send" : "save"))));
    foot.replaceChildren();
    area.focus();
  }

  update();
  return { element, update, edit };
}
const waiting = () => el("span", { class: "dot", role: "img", "aria-label": t("waiting") });

/** How many tokens, how fast. */
function speed({ tokens, rate, read, first }) {
  const round = (value) => Number(value.toPrecision(3));
  return el("span", { class: "speed" }, [tokens?.length && t("speed.tokens", { n: tokens.length }),
    rate && t("speed.rate", { n: round(rate) }), read && t("speed.read", { n: read }),
    first && t("speed.first", { n: round(first) })].filter(Boolean).join(" · "));
}

/** What stands where there are no messages yet; `onPick(text)` sends one of the beginnings. */
export function welcome(model, onPick) {
  const kind = model?.kind === "embedder" ? "embedder" : model?.chat === false ? "text" : "chat";
  const start = (text) => el("li", {}, button("start", () => onPick(text), text, icon("forward")));
  return [el("h2", {}, t(`welcome.${kind}`)), model && el("p", {}, t(`welcome.${kind}.about`, { model: model.name })),
    kind !== "embedder" && el("ul", {}, [1, 2, 3].map((n) => start(t(`start.${kind}.${n}`))))].filter(Boolean);
}
