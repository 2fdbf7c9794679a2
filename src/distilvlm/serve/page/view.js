// Turns and answers as elements. An answer's element is made once and then told what its answer has become.

import { boxesIn, drawn } from "./boxes.js";
import { button, byId, element, key, pictureElement } from "./elements.js";
import { rendered } from "./markdown.js";

/** A question with its pictures, and an empty place for its answers. */
export function turnElement(turn, number) {
  const pictures = turn.pictures.map((picture) =>
    button(pictureElement(picture, ""), () => showLarge(picture), {
      class: "thumb",
      "aria-label": `${picture.alt}: show this picture larger`,
    }),
  );
  return element(
    "article",
    { class: "turn", "aria-label": `Question ${number}` },
    element("div", { class: "pictures" }, ...pictures),
    element("div", { class: "said" }, element("h2", { class: "question" }, turn.question), element("div", { class: "answers" })),
  );
}

function showLarge(picture) {
  const shown = byId("large-picture");
  shown.src = picture.url;
  shown.alt = picture.alt;
  byId("large").showModal();
}

export class AnswerView {
  /**
   * `again(lane)` asks the same once more, `settings()` opens the settings, `picture()` is the one that boxes are of.
   */
  constructor(turn, lane, { again, settings, picture }) {
    Object.assign(this, { turn, lane, again, settings, picture });
    this.name = element("span", {});
    this.note = element("small", {});
    this.text = element("div", { class: "text" });
    this.problem = element("div", {});
    this.figures = element("span", { class: "figures" });
    this.actions = element("span", { class: "actions" });
    this.root = element(
      "section",
      { class: `answer s${lane}` },
      element("h3", {}, key(), this.name, this.note),
      this.text,
      this.problem,
      element("div", { class: "meta" }, this.figures, this.actions),
    );
  }

  /** Show the answer as it is now; `last`: whether it may be asked for again. */
  show(last) {
    const answer = this.turn.answers[this.lane];
    this.root.setAttribute("aria-label", `Answer of ${answer.model}`);
    this.root.setAttribute("aria-busy", String(answer.state === "coming"));
    this.name.textContent = answer.model;
    this.note.textContent = answer.blind ? "takes no pictures: it got the words alone" : "";
    const boxes = answer.state === "coming" ? [] : boxesIn(answer.text, this.turn.question);
    const picture = boxes.length && this.picture();
    this.text.replaceChildren(rendered(answer.text));
    if (picture) this.text.append(drawn(boxes, picture));
    this.figures.textContent = figures(answer);
    this.showProblem(answer, last);
    const actions = [];
    if (last && answer.state !== "coming" && answer.state !== "failed") {
      actions.push(button("Regenerate", () => this.again(this.lane), { "aria-label": `Regenerate the answer of ${answer.model}` }));
    }
    if (answer.text && answer.state !== "coming" && navigator.clipboard) {
      const copy = button("Copy", async () => {
        await navigator.clipboard.writeText(answer.text);
        copy.textContent = "Copied";
      }, { "aria-label": `Copy the answer of ${answer.model}` });
      actions.push(copy);
    }
    this.actions.replaceChildren(...actions);
  }

  showProblem(answer, last) {
    clearInterval(this.timer);
    this.problem.replaceChildren();
    if (answer.state !== "failed") return;
    const ways = [];
    if (last && answer.key) ways.push(button("Enter the key", this.settings));
    if (last) {
      const retry = button("Try again", () => this.again(this.lane));
      ways.push(retry);
      const wait = () => {
        const left = Math.ceil((answer.notBefore - Date.now()) / 1000);
        retry.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
        if (!(left > 0)) clearInterval(this.timer);
      };
      this.timer = setInterval(wait, 1000);
      wait();
    }
    this.problem.append(element("div", { class: "problem" }, element("p", {}, answer.problem), ...ways));
  }
}

/** What it took, in one line. Tokens of an answer that was stopped are not told by the server: none are shown. */
function figures(answer) {
  if (answer.state === "coming") {
    return answer.first === undefined ? "reading…" : `first token after ${seconds(answer.first)}, answering…`;
  }
  const told = [];
  if (answer.state === "stopped") told.push("stopped");
  if (answer.tokens !== undefined) told.push(answer.tokens === 1 ? "1 token" : `${answer.tokens} tokens`);
  if (answer.tokens > 1 && answer.rest > 0) told.push(`${speed((answer.tokens - 1) / answer.rest)} tokens/s`);
  if (answer.first !== undefined) told.push(`first token after ${seconds(answer.first)}`);
  if (answer.finish === "length") told.push("cut at its longest");
  return told.join(" · ");
}

const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);
const speed = (value) => (value < 10 ? value.toFixed(1) : String(Math.round(value)));
