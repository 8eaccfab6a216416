// The chat: the conversation that is shown, the box to write in, and what happens between them.
// Answers of several conversations may run at once; each goes on while another one is shown.
import { byId, on } from "./dom.js";
import { answer, continueFrom } from "./generate.js";
import { onLanguage, t } from "./i18n.js";
import { isSend, messageView, welcome } from "./message.js";
import { settings } from "./settings.js";
import { addTo, conversations, newConversation, parentOf, path, recall, remember, save } from "./store.js";
import { closePanel, movePanel } from "./tokens.js";
let context; // app.js's
let changed; // the list of conversations wants to hear of titles, of answers that run, and of which one is shown
let current = newConversation(recall("system") ?? "");
let tokens = recall("tokens") ?? false; // whether answers are shown as tokens
const running = new Map(); // conversation id -> {control, node}
const views = new Map(); // message -> its view, of the conversation that is shown

export const shown = () => current;
export const isRunning = ({ id } = current) => running.has(id);
export const stop = ({ id } = current) => running.get(id)?.control.abort();

export function mountChat(given, onChanged) {
  [context, changed] = [given, onChanged];
  byId("message").value = recall("draft") ?? "";
  byId("show-tokens").checked = tokens;
  on("message", "input", ({ target }) => [remember("draft", target.value), fit()]);
  on("message", "keydown", (event) => isSend(event) && submit(event));
  on("composer", "submit", submit);
  on("stop", "click", () => stop());
  on("show-tokens", "change", ({ target }) => [remember("tokens", (tokens = target.checked)), render()]);
  on("system", "input", ({ target }) => {
    remember("system", (current.system = target.value));
    if (views.size) keep(current);
  });
  on("scroll", "scroll", () => [movePanel(), (byId("to-end").hidden = atEnd())]);
  on("to-end", "click", toEnd);
  addEventListener("pagehide", () => isRunning() && save(current));
  onLanguage(render);
  context.onModel(renderFrame);
  open(conversations.get(recall("shown")) ?? current);
}

/** Show a conversation. */
export function open(conversation) {
  current = conversation;
  remember("shown", current.id);
  byId("system").value = current.system;
  render();
  toEnd();
  changed();
}

/** A new, empty conversation with the same system prompt. */
export function create() { open(newConversation(current.system)); byId("message").focus(); }

/** The ids of the conversation as the model read and continued it; null if the chosen model did not write it. */
export function conversationIds() {
  const last = path(current).findLast((node) => node.tokens?.length && node.prompt);
  return last && last.model === context.model()?.name ? [...last.prompt, ...last.tokens.map(({ id }) => id)] : null;
}

/** Edit the last question. */
export function editLast() {
  const last = path(current).findLast(({ role }) => role === "user");
  if (last && !isRunning()) views.get(last).edit();
}

const submit = (event) => [event.preventDefault(), send(byId("message").value.trim())];

function send(text) {
  if (!text || isRunning() || !mayWrite()) return;
  byId("message").value = "";
  remember("draft", "");
  write(addTo(addTo(path(current).at(-1) ?? current.root, "user", text), "assistant", ""));
}

/** Whether the chosen model can write; where none is known yet, the server is asked again (for a key, too). */
function mayWrite() {
  const kind = context.model()?.kind;
  if (kind !== "writer") (kind ? context.notify(t("welcome.embedder")) : context.loadModels());
  return kind === "writer";
}

/** Let the model write `node`: an answer to what stands before it, or what `work` does. */
async function write(node, work = answer.bind(null, current, node)) {
  const conversation = current;
  const isShown = () => current === conversation;
  const isThere = () => conversations.has(conversation.id); // it may be deleted meanwhile
  const control = new AbortController();
  let said = 0, timer = null, saved = performance.now();
  const show = () => {
    timer = null;
    if (isShown()) following(() => views.get(node)?.update());
    const end = node.content.lastIndexOf("\n") + 1; // whole paragraphs are read aloud, not every token
    if (end > said && isShown()) context.say(node.content.slice(said, end));
    said = Math.max(said, end);
    if (performance.now() - saved > 3000 && isThere()) [saved] = [performance.now(), save(conversation)];
  };
  running.set(conversation.id, { control, node });
  node.model ??= context.model().name;
  keep(conversation, true);
  render();
  toEnd();
  context.say(t("writing"));
  await work({ model: context.model(), settings, signal: control.signal,
    changed: () => (timer ??= setTimeout(show, 40)) }); // no frames: a tab in the background draws none
  clearTimeout(timer);
  running.delete(conversation.id);
  if (isThere()) keep(conversation, true);
  if (!isShown()) return;
  following(() => [views.get(node)?.update(), renderFrame()]);
  context.say(`${node.content.slice(said)} ${node.error ?? t("done", { n: node.tokens?.length ?? 0 })}`);
}

/** What the buttons of a message do. While an answer runs, nothing is changed. */
function actionsOf(node) {
  const version = (role, content) => addTo(parentOf(current, node), role, content);
  const actions = {
    edit(text) {
      if (node.role === "user") return mayWrite() && write(addTo(version("user", text), "assistant", ""));
      version("assistant", text);
      keep(current, true);
      render();
    },
    again() {
      const parent = node.role === "user" ? node : parentOf(current, node);
      if (!mayWrite()) return;
      parent.children = parent.children.filter((one) => one.content || one.children.length); // others have failed
      write(addTo(parent, "assistant", ""));
    },
    choose(by) {
      const parent = parentOf(current, node);
      parent.chosen += by;
      keep(current);
      render();
      const { element } = views.get(parent.children[parent.chosen]);
      [...element.querySelectorAll(".versions button:enabled")].at(by < 0 ? 0 : -1).focus();
    },
    goOn: () => actions.pick(node.tokens.length, null),
    pick(place, other) {
      const next = version("assistant", "");
      next.model = node.model;
      write(next, (how) => continueFrom(node, place, other, next, how));
    },
  };
  const idle = ([name, action]) => [name, (...given) => isRunning() || action(...given)];
  return Object.fromEntries(Object.entries(actions).map(idle));
}

function keep(conversation, touched = false) {
  if (touched) conversation.updated = Date.now();
  if (!save(conversation)) context.notify(t("error.full"));
  changed();
}

function render() {
  closePanel();
  views.clear();
  for (const node of path(current)) {
    const siblings = parentOf(current, node).children;
    const state = () => ({ running: running.get(current.id)?.node === node, versions: siblings.length,
      version: siblings.indexOf(node), tokens });
    views.set(node, messageView(node, state, actionsOf(node)));
  }
  byId("messages").replaceChildren(...[...views.values()].map(({ element }) => element));
  renderFrame();
}

/** All but the messages. */
function renderFrame() {
  byId("welcome").hidden = views.size > 0;
  byId("welcome").replaceChildren(...(views.size ? [] : welcome(context.model(), send)));
  byId("send").hidden = isRunning();
  byId("stop").hidden = !isRunning();
  fit();
}

/** The box to write in grows with its text. */
function fit() {
  const { style } = byId("message");
  style.height = "auto";
  style.height = `${Math.min(byId("message").scrollHeight, innerHeight * 0.4)}px`;
}

const atEnd = () => byId("scroll").scrollHeight - byId("scroll").scrollTop - byId("scroll").clientHeight < 60;
const toEnd = () => void (byId("scroll").scrollTop = views.size && byId("scroll").scrollHeight);

/** Do what changes the messages; whoever was at the end stays there. */
const following = (change) => [atEnd(), change()][0] && toEnd();
