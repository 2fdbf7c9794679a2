// Who answers: the models of the server, and which of them are chosen.

import { models as served, Problem } from "./api.js";
import { suit } from "./composer.js";
import { byId } from "./elements.js";

const PLACE = "distilvlm.models";
const [left, right, pair] = ["left", "right", "pair"].map(byId);
let known = [];
let changed;

/** The server's models, as far as it was asked. */
export const models = () => known;

/** The model of a lane: 0 the left one, 1 the right one, which stays chosen where one model alone answers. */
export const inLane = (lane) => named([left, right][lane].value);

/** Those that the next question goes to. */
export const chosen = () => (known.length ? [0, 1].slice(0, paired() ? 2 : 1).map(inLane) : []);

const paired = () => pair.getAttribute("aria-pressed") === "true";
const named = (name) => known.find(({ id }) => id === name);

/** `change` is called whenever others are chosen. */
export function readyChoice(change) {
  changed = change;
  for (const select of [left, right]) select.addEventListener("change", () => choose(paired()));
  pair.addEventListener("click", () => choose(!paired()));
}

/** Ask the server; choose as before, where it still has the models. Throws a `Problem`. */
export async function listModels() {
  known = await served();
  if (!known.length) throw new Problem("This server has no models.");
  const before = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
  for (const select of [left, right]) select.replaceChildren(...known.map(({ id }) => new Option(id)));
  pair.hidden = known.length < 2;
  left.value = (named(before.left) ?? known[0]).id;
  right.value = (named(before.right) ?? known[1] ?? known[0]).id;
  choose(Boolean(before.paired) && known.length > 1);
}

function choose(both) {
  pair.setAttribute("aria-pressed", String(both));
  document.body.classList.toggle("paired", both);
  byId("right-label").hidden = !both;
  byId("left-name").textContent = both ? "Left" : "Model";
  localStorage.setItem(PLACE, JSON.stringify({ left: left.value, right: right.value, paired: both }));
  suit(chosen());
  changed();
}
