// What the browser keeps: small settings, and the conversations, each under a key of its own in localStorage.
//
// A conversation is a tree. Every message knows the versions of what follows it (`children`) and which of them is
// shown (`chosen`); `path` walks along the chosen ones. So an edited question and a regenerated answer are the same
// thing, a further child, and nothing that was once said is lost.

const PREFIX = "scratchlm.";
const CHAT = "chat.";

/** What `work` gives, or null where it fails: a browser may have no room, or no storage at all. */
export function attempt(work) {
  try {
    return work();
  } catch {
    return null;
  }
}

/** A remembered value, null if there is none. */
export const recall = (name) => attempt(() => JSON.parse(localStorage.getItem(PREFIX + name)));
/** Remember a value; true if there was room. */
export const remember = (name, value, replacer = null) =>
  attempt(() => [localStorage.setItem(PREFIX + name, JSON.stringify(value, replacer))]) !== null;

/** All conversations by id; `sorted` gives them newest first. */
export const conversations = new Map();
export const sorted = () => [...conversations.values()].sort((a, b) => b.updated - a.updated);
export const newConversation = (system = "") => ({ id: Date.now().toString(36) + Math.random().toString(36).slice(2, 8),
  title: "", updated: Date.now(), system, root: { children: [], chosen: 0 } });
/** What a conversation is called: the name it was given, or its first words. */
export const titleOf = (conversation) => conversation.title || path(conversation)[0]?.content.trim().slice(0, 80) || "";

/** The messages that are shown, in order. */
export function path(conversation) {
  const found = [];
  for (let node = conversation.root; (node = node.children[node.chosen]); ) found.push(node);
  return found;
}

/** What stands before a message that is shown: another one, or the root. */
export const parentOf = (conversation, node) =>
  [conversation.root, ...path(conversation)].find(({ children }) => children.includes(node));

/** Add a message as the newest version of what follows `parent`. */
export function addTo(parent, role, content) {
  const node = { role, content, children: [], chosen: 0 };
  parent.chosen = parent.children.push(node) - 1;
  return node;
}

// A token's alternatives are many and can be asked for again: they stay in memory.
const write = (one) => remember(CHAT + one.id, one, (key, value) => (key === "top" ? undefined : value));
const bare = ({ tokens, prompt, ...node }) => ({ ...node, children: node.children.map(bare) });

/** Save; false if there is no room even when the tokens of all other conversations are let go, the oldest first. */
export function save(conversation) {
  conversations.set(conversation.id, conversation);
  const others = sorted().filter((one) => one !== conversation);
  while (!write(conversation)) {
    const oldest = others.pop();
    if (!oldest) return false;
    write({ ...oldest, root: bare(oldest.root) });
  }
  return true;
}

export const remove = ({ id }) =>
  [conversations.delete(id), attempt(() => localStorage.removeItem(PREFIX + CHAT + id))];

/** Read what is kept; `listener(id)` hears of conversations that another tab of the browser changed. */
export function openStore(listener) {
  const read = (key) => {
    const id = key?.startsWith(PREFIX + CHAT) && key.slice(PREFIX.length + CHAT.length);
    const found = id && recall(CHAT + id);
    if (Array.isArray(found?.root?.children)) conversations.set(id, found);
    else conversations.delete(id);
    return id;
  };
  attempt(() => Object.keys(localStorage))?.forEach(read);
  addEventListener("storage", ({ key }) => read(key) && listener(key.slice(PREFIX.length + CHAT.length)));
}

/** The messages as servers and training files want them, the system first; with `end`, only those before it. */
export function messagesOf(conversation, end = null) {
  const shown = path(conversation);
  const nodes = shown.slice(0, end ? shown.indexOf(end) : shown.length);
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  return [...system, ...nodes.filter((node) => node.content).map(({ role, content }) => ({ role, content }))];
}

/** JSONL that `scratchlm finetune sft` reads: each conversation a line {"messages": [...]}, up to its last answer. */
export function toJsonl(list) {
  const upToAnswer = (all) => all.slice(0, all.findLastIndex(({ role }) => role === "assistant") + 1);
  const lists = list.map((one) => upToAnswer(messagesOf(one))).filter((messages) => messages.length);
  return lists.map((messages) => `${JSON.stringify({ messages })}\n`).join("");
}

/** The conversations in a JSONL text; throws {line, problem} for what is not one. */
export function fromJsonl(text) {
  const read = (line, number) => {
    const check = (problem, fine) => { if (!fine) throw { line: number, problem }; };
    const conversation = newConversation();
    const found = attempt(() => JSON.parse(line));
    let parent = conversation.root;
    check("json", found);
    check("messages", Array.isArray(found.messages) && found.messages.length);
    for (const [place, message] of found.messages.entries()) {
      const { role, content } = message ?? {};
      check("content", typeof content === "string");
      check("role", ["user", "assistant"].includes(role) || (role === "system" && place === 0));
      if (role === "system") conversation.system = content;
      else parent = addTo(parent, role, content);
    }
    return conversation;
  };
  return text.split("\n").flatMap((line, i) => (line.trim() ? [read(line, i + 1)] : []));
}
