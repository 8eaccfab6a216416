// Small helpers for making elements. Text always goes in as a text node: nothing that a model or a person wrote is
// ever read as HTML.

export const byId = (id) => document.getElementById(id);
export const on = (id, event, listener) => byId(id).addEventListener(event, listener);

/**
 * Make an element. In `attributes` a function under "onclick" and the like becomes a listener, `true` an empty
 * attribute; false, null and undefined are left out. Children are nodes or texts, arrays of them, or null.
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

const PATHS = { // on a field of 24 by 24
  menu: "M4 7h16M4 12h16M4 17h16",
  sliders: "M4 8h6M14 8h6M4 16h2M10 16h10M10 8a2 2 0 1 0 4 0 2 2 0 1 0-4 0M6 16a2 2 0 1 0 4 0 2 2 0 1 0-4 0",
  plus: "M12 5v14M5 12h14", send: "M12 19V5M6 11l6-6 6 6", stop: "M7 7h10v10H7z", copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  check: "M5 12.5l4.5 4.5L19 7.5", again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  pen: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3", trash: "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12", close: "M6 6l12 12M18 6L6 18",
  left: "M14 6l-6 6 6 6", right: "M10 6l6 6-6 6", down: "M12 5v14M6 13l6 6 6-6", forward: "M5 12h13M13 7l5 5-5 5",
  branch: "M6 4v16M6 15c6 0 11-2 11-9M13 9l4-4 4 4",
  help: "M12 4a8 8 0 1 1 0 16 8 8 0 0 1 0-16M9.8 9.8a2.2 2.2 0 1 1 3.2 2c-.7.4-1 .8-1 1.6M12 16v.1",
  light: "M12 8a4 4 0 1 1 0 8 4 4 0 0 1 0-8M12 3v2M12 19v2M3 12h2M19 12h2M6 6l1 1M17 17l1 1M6 18l1-1M17 7l1-1",
  dark: "M19 14.5A7.5 7.5 0 0 1 9.5 5a7.5 7.5 0 1 0 9.5 9.5z",
  system: "M12 4a8 8 0 1 1 0 16 8 8 0 0 1 0-16v16M15 5v14M18 7v10",
};

/** A drawing in the colour of the text, hidden from screen readers. */
export function icon(name) {
  const [svg, path] = ["svg", "path"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  const attributes = { viewBox: "0 0 24 24", class: `icon icon-${name}`, "aria-hidden": "true" };
  for (const [key, value] of Object.entries(attributes)) svg.setAttribute(key, value);
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon only; `label` is what screen readers and the mouse's hint say. */
export const iconButton = (name, label, onclick, { class: more = "", ...rest } = {}) => el("button", { type: "button",
  class: `icon-button ${more}`, "aria-label": label, title: label, onclick, ...rest }, icon(name));

/** A button that copies what `text()` gives, and shows for a moment that it did. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    await copyText(text());
    button.replaceChildren(icon("check"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Over plain http from another machine there is no clipboard.
  const area = document.body.appendChild(el("textarea", { class: "sr-only" }, text));
  area.select();
  document.execCommand("copy");
  area.remove();
}
