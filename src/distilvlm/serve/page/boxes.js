// Boxes in answers: `[left, top, right, bottom]` from 0 to 1 of the picture padded to a square (docs/grounding.md).

import { element, pictureElement } from "./elements.js";

/** The question that models are taught to answer with a box: what is asked for follows. */
export const REFERRING = "Please provide the bounding box coordinate of the region this sentence describes: ";

const NUMBER = String.raw`\s*([01]?\.[0-9]+|[01])\s*`;
const BOX = new RegExp(String.raw`\[${Array(4).fill(NUMBER).join(",")}\]`, "g");
const SERIES = 8; // colours

/**
 * Every box in a text, with the words before it as its name, or what the question asked for.
 * Unlike the metric, which reads strictly, this looks for boxes in sentences, too: it only shows them.
 */
export function boxesIn(text, question = "") {
  const asked = question.startsWith(REFERRING) ? question.slice(REFERRING.length).trim() : "";
  const found = [];
  let end = 0;
  for (const match of text.matchAll(BOX)) {
    const [left, top, right, bottom] = match.slice(1).map(Number);
    const before = text.slice(end, match.index).split("\n").pop().replace(/^[\s;,.*-]+|[\s:;,(*-]+$/g, "");
    end = match.index + match[0].length;
    if (Math.max(left, top, right, bottom) > 1) continue;
    const name = (before.length <= 60 && before) || asked || "box";
    found.push({ name, left, top, right, bottom, inverted: left >= right || top >= bottom });
  }
  return found;
}

/** Shares of the padded square → shares of the picture itself; one that reaches into the padding is cut. */
export function onPicture(box, width, height) {
  const side = Math.max(width, height);
  const across = Math.floor((side - width) / 2);
  const down = Math.floor((side - height) / 2);
  const share = (value, margin, length) => Math.min(1, Math.max(0, (value * side - margin) / length));
  return {
    left: share(box.left, across, width),
    right: share(box.right, across, width),
    top: share(box.top, down, height),
    bottom: share(box.bottom, down, height),
  };
}

/** The picture with the boxes on it, and beside it the same as a list. */
export function drawn(boxes, picture) {
  const frames = [];
  const items = boxes.map((box, number) => {
    const colour = `s${number % SERIES}`;
    if (box.inverted) return element("li", { class: colour }, element("b", {}, box.name), " ends before it begins: not drawn");
    const place = onPicture(box, picture.width, picture.height);
    const frame = element("div", { class: `box ${colour}` }, element("span", {}, String(number + 1)));
    frame.style.left = percent(place.left);
    frame.style.top = percent(place.top);
    frame.style.width = percent(place.right - place.left);
    frame.style.height = percent(place.bottom - place.top);
    frames.push(frame);
    const lit = (event) => frame.classList.toggle("lit", event.type === "pointerenter");
    return element(
      "li",
      { class: colour, on: { pointerenter: lit, pointerleave: lit } },
      element("b", {}, box.name),
      ` ${whole(place.left)} to ${whole(place.right)}% across, ${whole(place.top)} to ${whole(place.bottom)}% down`,
    );
  });
  const canvas = element("div", { class: "canvas" }, pictureElement(picture, picture.alt), ...frames);
  canvas.style.width = `min(100%, 26rem, ${(24 * picture.width) / picture.height}rem)`;
  const list = element("ol", { "aria-label": "Boxes, in shares of the picture" }, ...items);
  return element("div", { class: "located" }, canvas, list);
}

const percent = (share) => `${(100 * share).toFixed(3)}%`;
const whole = (share) => Math.round(100 * share);
