// The sampling controls: a table of settings, and the form that is made from it. Values are kept in localStorage.
import { byId, el } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { recall, remember } from "./store.js";
const CONTROLS = [ // default, least, most, step, and where there is a slider beside the number, its two ends
  ["temperature", 0.7, 0, 100, 0.05, [0, 2]], ["top_p", 0.95, 0.01, 1, 0.01, [0.01, 1]],
  ["top_k", 0, 0, 1e6, 1, [0, 100]], ["min_p", 0, 0, 1, 0.01, [0, 0.5]],
  ["repetition_penalty", 1, 0.01, 100, 0.01, [1, 2]], ["max_tokens", 512, 1, 1e6, 1],
  ["seed", null, 0, 2 ** 53 - 1, 1], ["stop", ""],
];

/** What is set now. */
export const settings = {};
for (const [name, value] of CONTROLS) settings[name] = recall("settings")?.[name] ?? value;
function set(name, value) { settings[name] = value; remember("settings", settings); }

/** Build the form in `box`. */
export function mountSettings(box) {
  const build = () => box.replaceChildren(...CONTROLS.map((one) => (one[0] === "stop" ? stops() : number(one))),
    el("button", { type: "button", id: "reset-settings", class: "quiet", onclick: reset }, t("set.reset")));
  const reset = () => {
    for (const [name, value] of CONTROLS) set(name, value);
    build();
    byId("reset-settings").focus();
  };
  build();
  onLanguage(build);
}

const stops = () => field("stop", el("textarea", { id: "set-stop", rows: 2, spellcheck: "false",
  oninput: ({ target }) => set("stop", target.value) }, settings.stop));

function number([name, , min, max, step, ends]) {
  const value = settings[name] ?? "";
  const mayBeEmpty = ["max_tokens", "seed"].includes(name);
  const input = el("input", { id: `set-${name}`, type: "number", min, max, step: step === 1 ? 1 : "any", value,
    placeholder: mayBeEmpty && t(`set.${name}.empty`), required: !mayBeEmpty, oninput: () => {
      input.setAttribute("aria-invalid", String(!input.validity.valid));
      if (!input.validity.valid) return; // the last sensible value holds
      if (slider) slider.value = input.value;
      set(name, input.value === "" ? null : input.valueAsNumber);
    } });
  const slider = ends && el("input", { type: "range", min: ends[0], max: ends[1], step, value,
    "aria-label": t(`set.${name}`), oninput: () => {
      input.value = slider.value;
      input.dispatchEvent(new Event("input"));
    } });
  return field(name, input, slider);
}

function field(name, input, slider = null) {
  input.setAttribute("aria-describedby", `about-${name}`);
  return el("div", { class: "field" }, el("label", { for: `set-${name}` }, t(`set.${name}`)), input, slider,
    el("p", { id: `about-${name}`, class: "hint" }, t(`set.${name}.hint`)));
}
