// A little of Markdown, as models write it: paragraphs, headings, lists, code, bold and italics. All of it becomes elements
// with text nodes; links and HTML stay the text that they are.

import { element } from "./elements.js";

const INLINE = /(`+)(.+?)\1|\*\*(\S|\S.*?\S)\*\*(?!\*)|(?<![\w*])\*(\S|\S.*?\S)\*(?![\w*])|(?<!\w)_(\S|\S.*?\S)_(?!\w)/s;
const FENCE = /^\s*(```+|~~~+)/;
const HEADING = /^#{1,6}\s+(.*)/;
const BULLET = /^\s*[-*+]\s+(.*)/;
const NUMBER = /^\s*(\d{1,9})[.)]\s+(.*)/;

/** A text → nodes. A fence that is still open is code up to the end: answers are shown while they come. */
export function rendered(text) {
  const made = document.createDocumentFragment();
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  let paragraph = [];
  let list = null;
  const close = () => {
    if (paragraph.length) made.append(element("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
    list = null;
  };
  const item = (tag, words, start) => {
    if (paragraph.length || list?.localName !== tag) {
      close();
      list = element(tag, start > 1 ? { start } : {});
      made.append(list);
    }
    list.append(element("li", {}, ...inline(words)));
  };
  for (let number = 0; number < lines.length; number++) {
    const line = lines[number];
    const fence = line.match(FENCE)?.[1];
    const numbered = line.match(NUMBER);
    if (fence) {
      close();
      const code = [];
      while (++number < lines.length && !lines[number].trim().startsWith(fence)) code.push(lines[number]);
      made.append(element("pre", { tabindex: "0", role: "region", "aria-label": "Code" }, element("code", {}, code.join("\n"))));
    } else if (!line.trim()) close();
    else if (HEADING.test(line)) {
      close();
      made.append(element("p", { class: "heading" }, ...inline(line.match(HEADING)[1])));
    } else if (BULLET.test(line)) item("ul", line.match(BULLET)[1]);
    else if (numbered) item("ol", numbered[2], Number(numbered[1]));
    else if (list) list.lastChild.append(" ", ...inline(line.trim()));
    else paragraph.push(line);
  }
  close();
  return made;
}

function inline(text) {
  const made = [];
  for (let rest = text, match; rest; rest = rest.slice(match.index + match[0].length)) {
    match = rest.match(INLINE);
    if (!match) return [...made, rest];
    const [, ticks, code, bold, starred, underscored] = match;
    const italic = starred ?? underscored;
    made.push(rest.slice(0, match.index));
    if (ticks) made.push(element("code", {}, code));
    else if (bold !== undefined) made.push(element("strong", {}, ...inline(bold)));
    else made.push(element("em", {}, ...inline(italic)));
  }
  return made;
}
