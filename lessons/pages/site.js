"use strict";
// Every page reads without this. With it the code follows the lesson, the search finds, and the theme is kept.

const root = document.documentElement;
function remembered(value) {
  try {
    if (value === undefined) return localStorage.getItem("k2-theme");
    localStorage.setItem("k2-theme", value);
  } catch { /* a page opened from a file may have no storage */ }
  return null;
}
if (remembered()) root.dataset.theme = remembered();
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  remembered(root.dataset.theme);
});

// ---- the code beside the lesson ----

const quotes = [...document.querySelectorAll(".quote")];
const aside = document.querySelector("aside");
let shown = null;

function show(quote) {
  if (!aside || quote === shown) return;
  shown = quote;
  const { file, first, last } = quote.dataset;
  quotes.forEach((other) => other.classList.toggle("here", other === quote));
  aside.querySelectorAll(".file").forEach((pre) => { pre.hidden = pre.dataset.file !== file; });
  aside.querySelectorAll(".marked").forEach((line) => line.classList.remove("marked"));
  aside.querySelector(".where").textContent = `${file}, ${aside.dataset.lines} ${first}–${last}`;
  const name = file.replace(/[^A-Za-z0-9]+/g, "-");
  for (let n = Number(first); n <= Number(last); n++) document.getElementById(`${name}-${n}`)?.classList.add("marked");
  const pre = aside.querySelector(`.file[data-file="${file}"]`), line = document.getElementById(`${name}-${first}`);
  if (pre && line) pre.scrollTop = line.offsetTop - pre.offsetTop - 2 * line.offsetHeight;
}

function follow() {
  if (!quotes.length) return;
  const middle = innerHeight * 0.55;
  const above = quotes.filter((quote) => quote.getBoundingClientRect().top < middle);
  show(above.length ? above[above.length - 1] : quotes[0]);
}
addEventListener("scroll", () => requestAnimationFrame(follow), { passive: true });
addEventListener("resize", follow);
quotes.forEach((quote) => quote.addEventListener("focusin", () => show(quote)));
follow();

// ---- search ----

const language = root.lang.startsWith("zh");
const input = document.getElementById("search"), list = document.getElementById("found");
input.addEventListener("input", () => {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = words.length ? window.K2_SEARCH.filter((entry) => entry.page.startsWith("zh/") === language && words.every((word) => `${entry.part} ${entry.text}`.toLowerCase().includes(word))).slice(0, 20) : [];
  list.replaceChildren(...hits.map((entry) => {
    const item = document.createElement("li"), link = document.createElement("a"), text = document.createElement("small");
    link.href = `${document.body.dataset.root}${entry.page}#${entry.anchor}`;
    link.textContent = entry.title === entry.part ? entry.title : `${entry.title} · ${entry.part}`;
    const at = Math.max(0, entry.text.toLowerCase().indexOf(words[0]) - 40);
    text.textContent = entry.text.slice(at, at + 140);
    item.append(link, text);
    return item;
  }));
  if (words.length && !hits.length) list.append(Object.assign(document.createElement("li"), { textContent: document.body.dataset.none }));
  list.hidden = !words.length;
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== input) { event.preventDefault(); input.focus(); }
  if (event.key === "Escape") { input.value = ""; list.hidden = true; document.querySelector(".contents")?.removeAttribute("open"); }
});
