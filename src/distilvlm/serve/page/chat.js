// The page as a whole: asking, and what is on the page.

import { answer as answerOf } from "./api.js";
import { answering, readyComposer } from "./composer.js";
import { boxesIn } from "./boxes.js";
import { Conversation } from "./conversation.js";
import { button, byId, element, say } from "./elements.js";
import { openSettings, readySettings, settings } from "./settings.js";
import { AnswerView, turnElement } from "./view.js";
import { welcome } from "./welcome.js";
import { chosen, inLane, listModels, models, readyChoice } from "./who.js";

let conversation = new Conversation();
let last = null; // the last turn's `{turn, views}`: only it can be asked again
const running = new Set(); // of AbortControllers
let leaving = false; // the browser then ends requests: that is no failure to be kept

/** Ask the server who can answer, and say so. */
async function meet() {
  byId("notice").replaceChildren();
  try {
    await listModels();
  } catch (problem) {
    trouble(problem, meet);
  }
}

function showWelcome() {
  byId("welcome").hidden = conversation.turns.length > 0 || !models().length;
  byId("welcome").replaceChildren(...welcome(models(), new Set(chosen().map(({ id }) => id))));
}

// Asking

/** Whether the message is on its way; what became of it is then shown. */
function send(text, pictures) {
  if (running.size) {
    say("An answer is still coming: wait for it, or stop it.");
    return false;
  }
  if (!models().length) {
    meet();
    return false;
  }
  byId("notice").replaceChildren();
  const turn = conversation.add(text, pictures);
  conversation.keepPictures(turn).catch(unkept);
  save();
  retire();
  show(turn);
  chosen().forEach((_, lane) => ask(lane));
  scrollTo({ top: document.body.scrollHeight });
  return true;
}

/** Ask the last question of the model that is chosen for a lane, anew. */
async function ask(lane) {
  const { turn, views } = last;
  const model = inLane(lane);
  const name = model.id;
  const blind = !model.sees && conversation.turns.some(({ pictures }) => pictures.length);
  const answer = { model: name, text: "", state: "coming", blind };
  turn.answers[lane] = answer;
  const view = (views[lane] ??= place(turn, lane));
  view.show(true);
  const stopper = new AbortController();
  running.add(stopper);
  answering(true);
  say(`${name} is answering.`);
  const { system, fields } = settings();
  try {
    const messages = await conversation.messages(turn, lane, { system, sees: model.sees });
    const began = performance.now();
    let first;
    for await (const event of answerOf({ model: name, messages, ...fields }, stopper.signal)) {
      if (event.text) {
        first ??= performance.now();
        answer.first = (first - began) / 1000;
        answer.rest = (performance.now() - first) / 1000;
        answer.text += event.text;
        follow(view);
      }
      answer.finish = event.finish ?? answer.finish;
      answer.tokens = event.usage?.completion_tokens ?? answer.tokens;
    }
    answer.state = "whole";
  } catch (error) {
    if (error.name === "AbortError") answer.state = "stopped";
    else {
      const notBefore = Date.now() + 1000 * (error.wait ?? 0);
      Object.assign(answer, { state: "failed", problem: error.message, key: error.key, notBefore });
    }
  }
  running.delete(stopper);
  answering(running.size > 0);
  cancelAnimationFrame(view.planned);
  view.planned = undefined;
  keepAtEnd(() => view.show(last?.turn === turn));
  say(told(answer, turn));
  save();
}

function save() {
  if (leaving) return;
  try {
    conversation.save();
  } catch (error) {
    unkept(error);
  }
}

/** The conversation goes on: what could not be kept is only missing after a reload. */
function unkept(error) {
  trouble(new Error(`The browser does not keep this conversation over a reload: ${error.message}`));
}

function told(answer, turn) {
  if (answer.state === "failed") return answer.problem;
  const boxes = conversation.pictureOf(turn) ? boxesIn(answer.text, turn.question).length : 0;
  const drawn = boxes ? ` ${boxes === 1 ? "One box" : `${boxes} boxes`}, listed below the picture.` : "";
  return `${answer.model}${answer.state === "stopped" ? ", stopped" : ""}: ${answer.text}${drawn}`;
}

/** Show what came with the next frame, however many pieces come before it. */
function follow(view) {
  if (view.planned) return;
  view.planned = requestAnimationFrame(() => {
    view.planned = undefined;
    keepAtEnd(() => view.show(true));
  });
}

/** Change the page; a reader who was at its end stays there. */
function keepAtEnd(change) {
  const page = document.documentElement;
  const atEnd = page.scrollHeight - page.clientHeight - page.scrollTop < 60;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function stop() {
  for (const stopper of running) stopper.abort();
}

// What is on the page

function place(turn, lane) {
  const view = new AnswerView(turn, lane, {
    again: (number) => {
      if (running.size) return;
      byId("question").focus();
      if (models().length) ask(number);
      else meet();
    },
    settings: () => openSettings("key"),
    picture: () => conversation.pictureOf(turn),
  });
  last.answers.append(view.root);
  last.answers.classList.toggle("two", last.answers.children.length > 1);
  return view;
}

function retire() {
  if (!last) return;
  const { views } = last;
  last = null;
  for (const view of views) view?.show(false);
}

function show(turn) {
  const root = turnElement(turn, conversation.turns.indexOf(turn) + 1);
  byId("turns").append(root);
  byId("turns").classList.toggle("pictured", conversation.turns.some(({ pictures }) => pictures.length));
  byId("welcome").hidden = true;
  last = { turn, views: [], answers: root.querySelector(".answers") };
  turn.answers.forEach((_, lane) => (last.views[lane] = place(turn, lane)));
}

function showAll() {
  byId("turns").replaceChildren();
  last = null;
  for (const turn of conversation.turns) {
    retire();
    show(turn);
  }
  for (const view of last?.views ?? []) view.show(true);
  showWelcome();
}

function begin() {
  stop();
  byId("notice").replaceChildren();
  const before = conversation;
  conversation = new Conversation();
  save();
  showAll();
  byId("question").focus();
  if (!before.turns.length) return;
  say("New conversation.");
  const back = () => {
    byId("notice").replaceChildren();
    conversation = before;
    save();
    showAll();
    byId("question").focus();
  };
  const about = element("p", {}, "A new conversation.");
  byId("notice").append(element("div", { class: "note" }, about, button("Bring the last one back", back)));
}

/** Show what went wrong beside no answer; `retry` is offered where it may help. */
function trouble(problem, retry) {
  const ways = [];
  if (problem.key) ways.push(button("Enter the key", () => openSettings("key")));
  if (retry) ways.push(button("Try again", retry));
  byId("notice").replaceChildren(element("div", { class: "problem" }, element("p", {}, problem.message), ...ways));
  say(problem.message);
}

byId("new").addEventListener("click", begin);
addEventListener("pagehide", () => {
  if (running.size) save();
  leaving = true;
});
addEventListener("pageshow", () => (leaving = false));
readyComposer({ send, stop, trouble });
readySettings(meet);
readyChoice(showWelcome);
await meet();
try {
  const [restored, missing] = await Conversation.restored();
  conversation = restored;
  const lost = missing === 1 ? "a picture" : `${missing} pictures`;
  if (missing) trouble(new Error(`The browser no longer has ${lost} of this conversation.`));
} catch (error) {
  unkept(error); // it lets pages keep nothing
}
showAll();
if (conversation.turns.length) scrollTo({ top: document.body.scrollHeight });
document.body.dataset.ready = "";
