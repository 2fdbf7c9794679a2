// What the user sets: kept by the browser, but for the API key, which the tab forgets when it is closed.

import { byId } from "./elements.js";

const PLACE = "distilvlm.settings";
const KEY = "distilvlm.key";

// The temperature of LLaVA's demo; everything else is the model's own affair.
const DEFAULTS = { system: "", temperature: "0.2", max_tokens: "", seed: "" };

const dialog = byId("settings");
const form = dialog.querySelector("form");

/** Settings as they stand: a request's fields, and the system prompt. */
export function settings() {
  const { system, temperature, max_tokens, seed } = { ...DEFAULTS, ...JSON.parse(localStorage.getItem(PLACE) ?? "{}") };
  const fields = { temperature: Number(temperature) };
  if (max_tokens) fields.max_tokens = Number(max_tokens);
  if (seed) fields.seed = Number(seed);
  return { system, fields };
}

export function openSettings(field = "system") {
  const shown = { ...DEFAULTS, ...JSON.parse(localStorage.getItem(PLACE) ?? "{}"), key: sessionStorage.getItem(KEY) ?? "" };
  for (const [name, value] of Object.entries(shown)) form.elements[name].value = value;
  dialog.showModal();
  form.elements[field].focus();
}

/** `changedKey` is called when the dialog closes with another API key than before. */
export function readySettings(changedKey) {
  byId("settings-open").addEventListener("click", () => openSettings());
  // A number that can't be sent is never kept: the form says what is wrong with it, or Esc leaves the one before.
  form.addEventListener("submit", () => {
    const kept = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, form.elements[name].value]));
    localStorage.setItem(PLACE, JSON.stringify(kept));
    const key = form.elements.key.value.trim();
    const before = sessionStorage.getItem(KEY) ?? "";
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
    if (key !== before) changedKey();
  });
  const theme = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const name = () => {
    theme.textContent = dark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", `${theme.textContent} colours`);
  };
  theme.addEventListener("click", () => {
    const wanted = dark() ? "light" : "dark";
    // Chosen as the system has it is not chosen: it goes with the system again.
    if ((wanted === "dark") === system.matches) {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem("distilvlm.theme");
    } else {
      document.documentElement.dataset.theme = wanted;
      localStorage.setItem("distilvlm.theme", wanted);
    }
    name();
  });
  system.addEventListener("change", name);
  name();
}
