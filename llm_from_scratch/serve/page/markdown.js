// Simple Markdown as DOM nodes: headings, paragraphs, nested lists, code blocks, bold, italic, inline code.
// Nothing is ever parsed as HTML, and an unfinished text (an answer on its way) shows sensibly at every moment.
import { copyButton, el } from "./dom.js";
import { t } from "./i18n.js";
const FENCE = /^(\s*)(```+|~~~+)\s*([^`\s]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const INLINE = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)\*\*|(?<!\w)\*(?=[^\s*])([^*\n]+?)\*(?!\w)/s;

/** The text's nodes. */
export function markdown(text) {
  const root = document.createDocumentFragment();
  const lines = text.split("\n");
  let lists = []; // the open lists, outermost first: {indent, list}
  let open = null; // the paragraph or item that the next line belongs to
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i].trim();
    const [fence, heading, item] = [FENCE, HEADING, ITEM].map((pattern) => lines[i].match(pattern));
    const goesOn = /^\s|^$/.test(lines[i]) || (open && !fence && !heading);
    if (!goesOn && !item) lists = []; // a line at the margin ends the lists
    const place = lists.at(-1)?.list.lastElementChild ?? root;
    if (fence) {
      const isEnd = (other, k) => k > i && other.trim().startsWith(fence[2]) && /^\s*(`+|~+)\s*$/.test(other);
      const end = lines.findIndex(isEnd); // -1: the block is still being written
      const body = lines.slice(i + 1, end < 0 ? lines.length : end);
      place.append(codeBlock(body.map((one) => one.replace(new RegExp(`^${fence[1]}`), "")).join("\n"), fence[3]));
      [i, open] = [end < 0 ? lines.length : end, null];
    } else if (!line) open = null;
    else if (heading || RULE.test(line)) {
      [lists, open] = [[], null];
      root.append(heading ? el(`h${Math.min(heading[1].length + 3, 6)}`, {}, inline(heading[2])) : el("hr"));
    } else if (item) {
      lists = listFor(root, lists, item[1].length, /\d/.test(item[2]) ? { start: parseInt(item[2], 10) } : null);
      lists.at(-1).list.append((open = el("li", {}, inline(item[3]))));
    } else if (open) open.append(el("br"), ...inline(line));
    else place.append((open = el("p", {}, inline(line))));
  }
  return root;
}

/** The open lists once an item of this indent has its list: deeper ones are closed, a new one opened at need. */
function listFor(root, lists, indent, numbered) {
  const tag = numbered ? "ol" : "ul";
  const open = lists.filter((one) => one.indent <= indent);
  const last = open.at(-1);
  const isThere = last && indent < last.indent + 2;
  if (isThere && last.list.localName === tag) return open;
  if (isThere) open.pop(); // another kind of list at the same place
  const list = el(tag, numbered ?? {});
  (open.at(-1)?.list.lastElementChild ?? root).append(list);
  return [...open, { indent, list }];
}

/** The nodes of one line: code, bold, italic, and plain text between them. */
function inline(text) {
  const found = text.match(INLINE);
  if (!found) return text ? [text] : [];
  const [whole, , code, bold, italic] = found;
  const node = code !== undefined ? el("code", {}, code.trim() || code)
    : bold !== undefined ? el("strong", {}, inline(bold)) : el("em", {}, inline(italic));
  return [text.slice(0, found.index), node, ...inline(text.slice(found.index + whole.length))];
}

const codeBlock = (code, language) => el("div", { class: "code" },
  el("div", { class: "code-head" }, el("span", {}, language), copyButton(t("copy.code"), () => code)),
  el("pre", { tabindex: 0 }, el("code", {}, code)));
