// The page in English and Japanese: every text has a key, `t(key, values)` gives it in the chosen language.
// The first language is the browser's; a choice is remembered.
import { recall, remember } from "./store.js";
const strings = { en: {}, ja: {} };
const listeners = new Set();
const wanted = [recall("language"), ...navigator.languages.map((name) => name.slice(0, 2))];
let current = wanted.find((name) => name in strings) ?? "en";
/** "en" or "ja". */
export const language = () => current;
/** Add texts: {en: {key: text}, ja: {key: text}}. `{name}` in a text stands for a value. */
export const addStrings = (more) => Object.keys(strings).forEach((name) => Object.assign(strings[name], more[name]));

/** The same from texts of "key | English | Japanese", each on a line or behind "||". */
export function bilingual(text) {
  const lines = text.trim().split(/\n| \|\| /).map((line) => line.split(" | "));
  const column = (place) => Object.fromEntries(lines.map((line) => [line[0], line[place]]));
  return { en: column(1), ja: column(2) };
}

/** The text of a key in the chosen language; a key without a text is shown as it is. */
export function t(key, values = {}) {
  const text = strings[current][key] ?? strings.en[key] ?? key;
  const shown = (value) => (typeof value === "number" ? value.toLocaleString(current) : String(value));
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? shown(values[name]) : whole));
}

/** Call `listener` whenever the language changes. */
export const onLanguage = (listener) => listeners.add(listener);

export function setLanguage(name) {
  current = name;
  remember("language", name);
  translate(document);
  for (const listener of listeners) listener(name);
}

/** Put the texts into HTML: data-t names an element's text, data-t-label its label, data-t-placeholder that. */
export function translate(root) {
  document.documentElement.lang = current;
  for (const element of root.querySelectorAll("[data-t], [data-t-label], [data-t-placeholder]")) {
    const { t: text, tLabel: label, tPlaceholder: placeholder } = element.dataset;
    if (text) element.textContent = t(text);
    if (label) element.setAttribute("aria-label", t(label));
    if (label && element.matches("button, a")) element.title = t(label);
    if (placeholder) element.placeholder = t(placeholder);
  }
}
