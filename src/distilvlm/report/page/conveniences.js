// Conveniences only: without this file everything on the page can still be read.
"use strict";

// Values under the pointer, read off the drawn averages.
for (const svg of document.querySelectorAll("svg.chart")) {
  const [x0, x1, p0, p1] = svg.dataset.x.split(" ").map(Number);
  const [y0, y1, q0, q1, log] = svg.dataset.y.split(" ").map(Number);
  const figure = svg.closest("figure");
  const title = figure.querySelector("b");
  const name = title.textContent;
  const values = new Map([...figure.querySelectorAll(".value")].map((e) => [e.dataset.label, [e, e.textContent]]));
  const lines = [...svg.querySelectorAll("path.mean")].map((path) => [
    path.dataset.label,
    path.getAttribute("d").slice(1).split("L").map((point) => point.split(",").map(Number)),
  ]);
  const rule = document.createElementNS("http://www.w3.org/2000/svg", "path");
  rule.setAttribute("class", "rule");
  svg.append(rule);
  const value = (q) => {
    const share = (q - q0) / (q1 - q0);
    return log ? y0 * (y1 / y0) ** share : y0 + share * (y1 - y0);
  };
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const p = Math.min(p1, Math.max(p0, ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width));
    title.textContent = `${name} at update ${Math.round(x0 + ((p - p0) / (p1 - p0)) * (x1 - x0))}`;
    rule.setAttribute("d", `M${p},${q1}V${q0}`);
    for (const [label, points] of lines) {
      const near = points.reduce((a, b) => (Math.abs(b[0] - p) < Math.abs(a[0] - p) ? b : a));
      values.get(label)[0].textContent = Math.abs(near[0] - p) < 6 ? value(near[1]).toPrecision(3) : "–";
    }
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    title.textContent = name;
    rule.removeAttribute("d");
    for (const [element, text] of values.values()) element.textContent = text;
  });
}

// Choosing among the samples: by what the models got right, or by a word.
for (const answers of document.querySelectorAll(".answers")) {
  const patterns = [...answers.querySelectorAll(".pattern")];
  if (!patterns.length) continue;
  const form = document.createElement("form");
  form.className = "filter";
  const select = document.createElement("select");
  for (const kind of ["all kinds", ...patterns.map((p) => p.dataset.kind)]) select.add(new Option(kind));
  const word = Object.assign(document.createElement("input"), { type: "search" });
  const labelled = (text, control) => {
    const label = document.createElement("label");
    label.append(text, control);
    return label;
  };
  form.append(labelled("Show ", select), labelled("with the word ", word));
  answers.insertBefore(form, patterns[0]);
  const apply = () => {
    const wanted = word.value.toLowerCase();
    for (const [number, pattern] of patterns.entries()) {
      let left = 0;
      for (const card of pattern.querySelectorAll(".card")) {
        card.hidden = !card.textContent.toLowerCase().includes(wanted);
        left += !card.hidden;
      }
      pattern.hidden = (select.selectedIndex && select.selectedIndex !== number + 1) || !left;
    }
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
}

// What is folded would be missing on paper.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});

// Where the reader is.
const links = new Map([...document.querySelectorAll(".contents a")].map((a) => [a.hash.slice(1), a]));
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) links.get(entry.target.id)?.toggleAttribute("aria-current", entry.isIntersecting);
  },
  { rootMargin: "-20% 0px -70% 0px" },
);
for (const section of document.querySelectorAll("main > section")) seen.observe(section);
