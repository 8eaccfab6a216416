// What the tests ask of the page from inside it; put into every page before its own scripts.

globalThis.probes = (() => {
  const everything = () => [...document.body.querySelectorAll("*")].filter((one) => one.checkVisibility());
  const ownText = (element) => [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE)
    .map((node) => node.data.trim()).join("");

  // What models, tokens and boxes hold is in any language.
  const CONTENT = ".token, .piece, .given, .written, .strip, td, #lens-table th, textarea, .name, code, pre, .trail, "
    + ".details h4, #alternatives-list h4, #neighbours-list h4, #attention-readout, #runs-empty";

  /** Texts and labels that the page itself says. */
  function texts() {
    const found = new Set();
    for (const element of everything().filter((one) => !one.closest(CONTENT))) {
      found.add(ownText(element));
      for (const name of ["aria-label", "title", "placeholder"]) found.add(element.getAttribute(name) ?? "");
    }
    return [...found].filter(Boolean);
  }

  /** Controls of which a screen reader could not say what they are. */
  function nameless() {
    const named = (one) => one.getAttribute("aria-label") || one.getAttribute("aria-labelledby")
      || one.innerText?.trim() || [...(one.labels ?? [])].some((label) => label.innerText.trim());
    const controls = "button, input, select, textarea, a, canvas[tabindex], [role=button], [role=tab], [role=option]";
    return everything().filter((one) => one.matches(controls) && !named(one)).map((one) => one.outerHTML.slice(0, 120));
  }

  // ---------------------------------------------------------------- colours

  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  function rgba(colour) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  }
  const over = ([r, g, b, a], ground) => [r, g, b].map((value, i) => value * a + ground[i] * (1 - a));
  function groundOf(element) {
    if (!element) return [255, 255, 255];
    return over(rgba(getComputedStyle(element).backgroundColor), groundOf(element.parentElement));
  }
  /** Relative luminance, as WCAG 2.2 defines it. */
  function luminance(colour) {
    const [r, g, b] = colour.map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  /** Texts with less contrast than 4.5 to 1 (large ones: 3 to 1); of what cannot be used now none is asked for. */
  function faint() {
    const found = [];
    for (const element of everything()) {
      const text = ownText(element);
      if (!text || element.closest(":disabled, .sr-only, option")) continue;
      const style = getComputedStyle(element), ground = groundOf(element);
      const [low, high] = [luminance(over(rgba(style.color), ground)), luminance(ground)].sort((a, b) => a - b);
      const ratio = (high + 0.05) / (low + 0.05), size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.6 && style.fontWeight >= 700);
      const where = `${element.parentElement.localName}.${element.parentElement.className} ${element.localName}`;
      if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${where}: ${text.slice(0, 40)}`);
    }
    return found;
  }

  // ---------------------------------------------------------------- places and focus

  /** [width of the window, width of the page, controls that lie beside the window and cannot be scrolled to]. */
  function widths() {
    const scrolls = (one) => one
      && (["auto", "scroll"].includes(getComputedStyle(one).overflowX) || scrolls(one.parentElement));
    const beside = everything().filter((one) => one.matches("button, input, select, textarea, a, [tabindex]"))
      .filter((one) => !scrolls(one.parentElement)).filter((one) => {
        const { left, right, width } = one.getBoundingClientRect();
        return width > 1 && (left < -1 || right > innerWidth + 1);
      });
    const { clientWidth, scrollWidth } = document.documentElement;
    return [clientWidth, scrollWidth, beside.map((one) => one.id || one.outerHTML.slice(0, 80))];
  }

  /** Whether what has the focus (or something around it) looks other than without it. */
  function focusIsSeen() {
    const element = document.activeElement;
    const looks = () => {
      const seen = [];
      for (let one = element; one && seen.length < 4; one = one.parentElement) {
        const style = getComputedStyle(one);
        seen.push([style.outline, style.boxShadow, style.borderColor, style.backgroundColor]);
      }
      return JSON.stringify(seen);
    };
    const focused = looks();
    element.blur();
    const blurred = looks();
    element.focus();
    return element === document.body || focused !== blurred;
  }

  /** How many different colours a canvas has. */
  function colours(selector) {
    const element = document.querySelector(selector);
    const { data } = element.getContext("2d").getImageData(0, 0, element.width, element.height);
    return new Set(new Uint32Array(data.buffer)).size;
  }

  return { texts, nameless, faint, widths, focusIsSeen, colours };
})();
