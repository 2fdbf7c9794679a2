// The message that is being written: its words, its pictures, and the keys.

import { REFERRING } from "./boxes.js";
import { button, byId, element, say } from "./elements.js";
import { read } from "./pictures.js";

const question = byId("question");
const attached = byId("attached");
let pictures = [];

/** `send(text, pictures)` says whether it took the message; `stop()`; `trouble(problem)` shows what went wrong. */
export function readyComposer({ send, stop, trouble }) {
  const submit = () => {
    const text = question.value.trim();
    if (!text) {
      if (pictures.length) say("Write a question about the picture.");
      return question.focus();
    }
    if (!send(text, pictures)) return undefined;
    question.value = "";
    grow();
    pictures = [];
    showAttached();
    return question.focus();
  };
  const add = async (files) => {
    for (const file of files) {
      try {
        pictures.push(await read(file));
      } catch (problem) {
        trouble(problem);
      }
    }
    showAttached();
    question.focus();
  };

  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
  });
  byId("stop").addEventListener("click", stop);
  question.addEventListener("input", grow);

  const file = byId("file");
  byId("choose").addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    await add(file.files);
    file.value = "";
  });
  addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    add(files);
  });
  const carries = (event) => event.dataTransfer?.types.includes("Files") && !document.querySelector("dialog[open]");
  addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!carries(event)) return;
    event.preventDefault();
    add(event.dataTransfer.files);
  });
  byId("locate").addEventListener("click", () => {
    if (!question.value.startsWith(REFERRING)) question.value = REFERRING + question.value;
    question.focus();
    grow();
  });
}

/** Which buttons make sense with the models chosen. */
export function suit(models) {
  const sees = models.some((model) => model.sees);
  const choose = byId("choose");
  choose.disabled = !sees;
  choose.title = sees ? "" : `${models.map(({ id }) => id).join(" and ")}: no pictures taken`;
  byId("locate").hidden = !models.some((model) => model.boxes);
}

/** While answers come there is a button that stops them where the one that sends was. */
export function answering(under) {
  const [shown, gone] = under ? [byId("stop"), byId("send")] : [byId("send"), byId("stop")];
  const focused = document.activeElement === gone;
  gone.hidden = true;
  shown.hidden = false;
  if (focused) question.focus();
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function showAttached() {
  question.placeholder = pictures.length ? "Ask something about the picture" : "Ask something";
  attached.hidden = !pictures.length;
  attached.replaceChildren(
    ...pictures.map((picture) => {
      const alt = element("input", { type: "text", value: picture.alt, maxlength: "200" });
      alt.addEventListener("input", () => (picture.alt = alt.value));
      const remove = () => {
        pictures = pictures.filter((other) => other !== picture);
        showAttached();
        question.focus();
        say("Picture removed.");
      };
      return element(
        "div",
        { class: "attachment" },
        element("img", { src: picture.url, alt: "" }),
        element("label", {}, element("span", {}, "Picture, in words"), alt),
        button("Remove", remove, { "aria-label": `Remove ${picture.alt}` }),
      );
    }),
  );
  if (pictures.length) say(`${pictures.length === 1 ? "1 picture" : `${pictures.length} pictures`} with the message.`);
}
