// What stands there before anything was asked: what to do, and who can answer.

import { element } from "./elements.js";

export function welcome(models, chosen) {
  const yes = (can) => (can ? "yes" : "no");
  const rows = models.map(({ id, sees, boxes, context, parameters }) =>
    element(
      "tr",
      chosen.has(id) ? { class: "chosen" } : {},
      element("th", { scope: "row" }, id, chosen.has(id) && element("small", {}, "chosen")),
      element("td", { "data-label": "pictures" }, yes(sees)),
      element("td", { "data-label": "boxes" }, yes(boxes)),
      element("td", { "data-label": "context", class: "n" }, `${context.toLocaleString("en")} tokens`),
      element("td", { "data-label": "parameters", class: "n" }, short(parameters)),
    ),
  );
  const heads = ["model", "pictures", "boxes"].map((name) => element("th", { scope: "col" }, name));
  const figures = ["context", "parameters"].map((name) => element("th", { scope: "col", class: "n" }, name));
  return [
    element("h2", {}, "Ask about a picture"),
    element("p", { class: "lead" }, "Drop it anywhere on this page, paste it, or add it below; then ask. Without a picture, just talk."),
    element(
      "table",
      { class: "served" },
      element("caption", {}, models.length === 1 ? "The model of this server" : "The models of this server"),
      element("thead", {}, element("tr", {}, ...heads, ...figures)),
      element("tbody", {}, ...rows),
    ),
    element("p", { class: "about" }, "The conversation stays in this browser; what you ask goes to this server alone."),
  ];
}

/** 1234567 → "1.2 M". */
function short(number) {
  const [size, unit] = number >= 1e9 ? [1e9, "B"] : number >= 1e6 ? [1e6, "M"] : [1e3, "k"];
  const value = number / size;
  return `${value < 100 ? value.toFixed(1) : Math.round(value)} ${unit}`;
}
