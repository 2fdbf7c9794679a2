// What was said, kept over a reload: texts in localStorage, pictures in IndexedDB.
//
// A turn is `{question, pictures, answers}`; `answers[lane]` is the left or the right model's: `{model, text, state, ...}`
// with the state "coming", "whole", "stopped" or "failed".

import { dataUri, forgetAllBut, keep, kept } from "./pictures.js";

const PLACE = "distilvlm.conversation";

export class Conversation {
  turns = [];

  /** As it was when the page was left; pictures that the browser has thrown away are missing, and counted. */
  static async restored() {
    const made = new Conversation();
    made.turns = JSON.parse(localStorage.getItem(PLACE) ?? "[]");
    let missing = 0;
    for (const turn of made.turns) {
      const pictures = await Promise.all(turn.pictures.map(kept));
      turn.pictures = pictures.filter(Boolean);
      missing += pictures.length - turn.pictures.length;
      for (const answer of turn.answers) if (answer?.state === "coming") answer.state = "stopped";
    }
    await forgetAllBut(new Set(made.turns.flatMap((turn) => turn.pictures.map(({ id }) => id))));
    return [made, missing];
  }

  save() {
    const pictures = (turn) => turn.pictures.map(({ id, width, height, alt }) => ({ id, width, height, alt }));
    localStorage.setItem(PLACE, JSON.stringify(this.turns.map((turn) => ({ ...turn, pictures: pictures(turn) }))));
  }

  add(question, pictures) {
    const turn = { question, pictures, answers: [] };
    this.turns.push(turn);
    return turn;
  }

  async keepPictures(turn) {
    await Promise.all(turn.pictures.map(keep));
  }

  /** The picture that an answer of this turn is about: the last one shown up to then. */
  pictureOf(turn) {
    const before = this.turns.slice(0, this.turns.indexOf(turn) + 1);
    return before.flatMap(({ pictures }) => pictures).at(-1);
  }

  /**
   * The conversation up to a turn's question, as the API takes it.
   *
   * Each lane has its own past; where only one model answered, it is both lanes' past. A question without an answer
   * stays, joined to the next one. Models that take no pictures get the words alone.
   */
  async messages(turn, lane, { system, sees }) {
    const messages = system.trim() ? [{ role: "system", content: system }] : [];
    let texts = [];
    let pictures = [];
    const ask = async () => {
      const text = texts.filter(Boolean).join("\n");
      const parts = await Promise.all(
        pictures.map(async ({ blob }) => ({ type: "image_url", image_url: { url: await dataUri(blob) } })),
      );
      messages.push({ role: "user", content: parts.length ? [...parts, { type: "text", text }] : text });
      texts = [];
      pictures = [];
    };
    for (const past of this.turns) {
      texts.push(past.question);
      if (sees) pictures.push(...past.pictures);
      if (past === turn) break;
      const answered = (past.answers[lane] ?? past.answers[0])?.text;
      if (!answered) continue;
      await ask();
      messages.push({ role: "assistant", content: answered });
    }
    await ask();
    return messages;
  }
}
