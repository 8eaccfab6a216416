// The frame of the page: tabs, models, language, colours, keys, notes; it starts the chat and the other parts.
import * as api from "./api.js";
import * as chat from "./chat.js";
import { byId, el, icon, iconButton, on } from "./dom.js";
import { addStrings, language, onLanguage, setLanguage, t, translate } from "./i18n.js";
import { mountSettings } from "./settings.js";
import { changedElsewhere, list, mountSide } from "./side.js";
import { openStore, recall, remember } from "./store.js";
import { strings } from "./strings.js";
import { rove } from "./strip.js";
import { closePanel } from "./tokens.js";
const TABS = ["chat", "inside", "runs"];
const PANELS = ["list", "settings"];
const THEMES = ["system", "light", "dark"];
const narrow = matchMedia("(max-width: 899px)"); // as in style.css: there the panels lie over the conversation
const modelListeners = [];
let models = []; // as /api/page tells them
let chosen = null;

/** The part of the page that is shown; the address says which. */
const tabNow = () => TABS.find((tab) => location.hash.slice(1) === tab && !byId(`tab-${tab}`).hidden) ?? "chat";
const tabs = TABS.map((tab) => byId(`tab-${tab}`));
const chooseTab = rove(byId("tabs"), tabs, 0, (place) => [(location.hash = TABS[place]), tabs[place].focus()]);

/** What the parts of the page share. */
const context = { api, language, onLanguage, translate, notify, say, loadModels,
  conversationIds: chat.conversationIds, model: () => chosen, onModel: (listener) => modelListeners.push(listener),
  leaveList: () => narrow.matches && toggle("list", false) };
const MOUNT = { inside: "mountInside", runs: "mountRuns" }; // what is loaded when it is first looked at

function showTab() {
  const now = tabNow();
  closePanel();
  chooseTab(TABS.indexOf(now));
  for (const tab of TABS) byId(tab).hidden = tab !== now;
  for (const id of PANELS) byId(`open-${id}`).hidden = now !== "chat";
  document.title = `${t(`tab.${now}`)} · scratchlm`;
  const mount = MOUNT[now];
  if (!chosen || !mount) return; // loadModels comes back here
  delete MOUNT[now];
  import(`./${now}.js`).then((part) => part[mount](byId(now), context));
}

async function loadModels() {
  byId("notes").replaceChildren(); // what went wrong last time
  try {
    const about = await api.get("api/page");
    models = about.models;
    byId("tab-runs").hidden = !about.runs;
  } catch (error) {
    notify(error.message, { label: t("retry"), action: loadModels });
  }
  choose(recall("model"));
  showTab();
}

function choose(name) {
  chosen = models.find((one) => one.name === name) ?? models[0] ?? null;
  listModels();
  for (const listener of modelListeners) listener(chosen);
}

function listModels() {
  const label = ({ name, kind }) => (kind === "embedder" ? t("model.embedder", { name }) : name);
  const options = models.map((one) => el("option", { value: one.name, selected: one === chosen }, label(one)));
  byId("model").replaceChildren(...(options.length ? options : [el("option", {}, t("model.none"))]));
}

function showLanguage() {
  const [lang, textContent] = language() === "en" ? ["ja", "日本語"] : ["en", "English"];
  Object.assign(byId("language"), { lang, textContent });
  byId("help").href = `docs/${language()}/page`;
  showTheme(recall("theme") ?? "system");
  listModels();
  showTab();
}

function showTheme(theme) {
  remember("theme", theme);
  document.documentElement.dataset.theme = theme;
  const next = () => [showTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]), byId("theme").focus()];
  byId("theme").replaceWith(iconButton(theme, t(`theme.${theme}`), next, { id: "theme" }));
}

/** Open or close the list of conversations or the settings. */
function toggle(id, open = byId(id).hidden) {
  const hadFocus = byId(id).contains(document.activeElement);
  if (!narrow.matches) remember(`open.${id}`, open);
  else if (open) PANELS.forEach((panel) => show(panel, false));
  show(id, open);
  if (open && narrow.matches) byId(id).querySelector("button").focus();
  if (!open && hadFocus) byId(`open-${id}`).focus();
}

const show = (id, open) => [(byId(id).hidden = !open), byId(`open-${id}`).setAttribute("aria-expanded", String(open))];
/** The panels as they were left; on a phone they begin closed. */
function fitPanels() {
  for (const id of PANELS) show(id, !narrow.matches && (recall(`open.${id}`) ?? (id === "list" || innerWidth >= 1280)));
}

/** Tell screen readers, once and politely. */
function say(text) {
  byId("live").append(el("p", {}, text));
  if (byId("live").childElementCount > 20) byId("live").firstChild.remove();
}

/** Show a note for a while, with a button for `action` where there is one. */
function notify(text, { label, action } = {}) {
  const close = () => note.remove();
  const act = action && el("button", { type: "button", class: "quiet", onclick: () => [close(), action()] }, label);
  const note = el("div", { class: "note" }, el("span", {}, text), act, iconButton("close", t("close"), close));
  const wait = () => setTimeout(() => (note.matches(":hover, :focus-within") ? wait() : close()), 12000);
  byId("notes").replaceChildren(note);
  wait();
}

/** Ask for the server's key; null if none is given. */
function askForKey(refused) {
  const dialog = byId("key-dialog");
  byId("key-wrong").hidden = !refused;
  byId("key").value = dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const told = () => resolve(dialog.returnValue === "ok" ? byId("key").value.trim() : null);
    dialog.addEventListener("close", told, { once: true });
  });
}

const KEYS = { "/": () => byId("message").focus(), n: chat.create, e: chat.editLast,
  t: () => byId("show-tokens").click(), c: () => toggle("list"), s: () => toggle("settings") };

function onKey(event) {
  const { key, target, isComposing, ctrlKey, metaKey, altKey } = event;
  if (event.defaultPrevented || isComposing || tabNow() !== "chat" || byId("key-dialog").open) return;
  const isTyping = target.matches("input:not([type=checkbox], [type=range]), textarea, select");
  if (key === "Escape") escape();
  if (isTyping || ctrlKey || metaKey || altKey || !KEYS[key]) return;
  event.preventDefault();
  KEYS[key]();
}

/** Close the topmost thing; where nothing is open, stop the answer. */
function escape() {
  const over = narrow.matches && PANELS.find((id) => !byId(id).hidden);
  return closePanel() || (over ? toggle(over, false) : chat.stop());
}

addStrings(strings);
for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
translate(document);
openStore(changedElsewhere);
mountSettings(byId("sampling"));
chat.mountChat(context, list);
mountSide(context);
fitPanels();
showLanguage();
onLanguage(showLanguage);
api.onKeyWanted(askForKey);
narrow.addEventListener("change", fitPanels);
on("model", "change", ({ target }) => [remember("model", target.value), choose(target.value)]);
on("language", "click", () => setLanguage(byId("language").lang));
on("backdrop", "click", escape);
on("no-key", "click", () => byId("key-dialog").close());
for (const id of PANELS) for (const what of ["open", "close"]) on(`${what}-${id}`, "click", () => toggle(id));
addEventListener("keydown", onKey);
addEventListener("hashchange", showTab);
loadModels();
