// Elements made by calls: text becomes text nodes, whatever is in it. Nothing on this page is ever read as HTML.

/** An element with properties (`class`, `data`, `on` and attributes by their names) and children: nodes or text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** A picture `{url, width, height}`, which takes its place before it is read; a tiny one keeps its pixels when it is enlarged. */
export function pictureElement({ url, width, height }, alt) {
  return element("img", { src: url, alt, width, height, class: Math.max(width, height) < 200 && "tiny" });
}

export function button(text, click, properties = {}) {
  return element("button", { type: "button", on: { click }, ...properties }, text);
}

export const byId = (id) => document.getElementById(id);

/** A model's line, as in the legend of a report: solid for the left one, dashed for the right one. */
export function key() {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  for (const [name, value] of [["class", "key"], ["viewBox", "0 0 28 13"], ["aria-hidden", "true"]]) made.setAttribute(name, value);
  line.setAttribute("d", "M1 6.5H27");
  made.append(line);
  return made;
}

/** Tell readers of screens. */
export function say(text) {
  byId("status").textContent = text;
}
