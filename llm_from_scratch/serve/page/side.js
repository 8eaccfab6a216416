// The list of conversations: choose, rename, delete (and take that back), export, import.
import * as chat from "./chat.js";
import { byId, el, iconButton, on } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { isSend } from "./message.js";
import { conversations, fromJsonl, remove, save, sorted, titleOf, toJsonl } from "./store.js";
let context; // app.js's
const nameOf = (one) => titleOf(one) || t("chat.new");
const rowOf = ({ id }) => byId("conversations").querySelector(`[data-id="${id}"]`);

export function mountSide(given) {
  context = given;
  on("new-chat", "click", leaveFor(chat.create));
  on("export-one", "click", () => offer("conversation", [chat.shown()]));
  on("export-all", "click", () => offer("conversations", sorted()));
  on("import", "click", () => byId("import-file").click());
  on("import-file", "change", take);
  onLanguage(list);
}

/** On a phone the list gives way to the conversation. */
const leaveFor = (action) => () => [action(), context.leaveList()];

/** Show the conversations anew. */
export function list() {
  const focused = document.activeElement.closest("#conversations li");
  if (focused?.querySelector("input")) return; // a name is being written
  byId("conversations").replaceChildren(...sorted().map(row));
  byId("no-conversations").hidden = conversations.size > 0;
  if (focused) rowOf(focused.dataset)?.querySelector(".open").focus();
}

/** Another tab of the browser has changed a conversation. */
export function changedElsewhere(id) {
  if (chat.shown().id === id && !chat.isRunning() && conversations.has(id)) chat.open(conversations.get(id));
  else list();
}

function row(one) {
  const current = one === chat.shown() && "true";
  return el("li", { "data-id": one.id },
    el("button", { type: "button", class: "open", title: nameOf(one), "aria-current": current,
      onclick: leaveFor(() => chat.open(one)) }, nameOf(one),
    chat.isRunning(one) && el("span", { class: "dot", role: "img", "aria-label": t("chat.running") })),
    iconButton("pen", t("chat.rename"), () => rename(one), { class: "rename" }),
    iconButton("trash", t("chat.delete"), () => discard(one), { class: "delete" }));
}

function rename(one) {
  const input = el("input", { "aria-label": t("chat.rename"), maxlength: 120, value: titleOf(one) });
  const leave = (keep) => {
    input.removeEventListener("blur", leave);
    if (keep) one.title = input.value.trim();
    if (keep && !save(one)) context.notify(t("error.full"));
    input.remove();
    list();
    rowOf(one)?.querySelector(".open").focus();
  };
  input.addEventListener("blur", leave);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" && !isSend(event)) return;
    event.preventDefault();
    leave(event.key !== "Escape");
  });
  rowOf(one).replaceChildren(input);
  input.select();
}

function discard(one) {
  const all = sorted();
  const next = all[all.indexOf(one) + 1] ?? all[all.indexOf(one) - 1];
  chat.stop(one);
  remove(one);
  if (one === chat.shown()) (next ? chat.open(next) : chat.create());
  list();
  const undo = () => [save(one), chat.open(one)];
  context.notify(t("chat.deleted", { title: nameOf(one) }), { label: t("undo"), action: undo });
}

/** Offer conversations as a file to save. */
function offer(name, found) {
  const text = toJsonl(found);
  if (!text) return void context.notify(t("export.none"));
  const address = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  el("a", { href: address, download: `${name}-${new Date().toISOString().slice(0, 10)}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

async function take({ target }) {
  try {
    const found = fromJsonl(await target.files[0].text());
    const kept = found.every(save);
    context.notify(kept ? t("import.done", { n: found.length }) : t("error.full"));
    if (found.length) chat.open(found[0]);
  } catch ({ line, problem }) {
    context.notify(t("import.wrong", { line, problem: t(`import.${problem}`) }));
  }
  target.value = ""; // the same file can be chosen again
}
