"use strict";
// Texts are put in by textContent only: a token is never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const kinds = { u16: Uint16Array, u32: Uint32Array, f32: Float32Array, p16: Uint16Array };
const at = (id) => document.getElementById(id);

function unpacked(packed) {
  if (packed === null) return null;
  const bytes = Uint8Array.from(atob(packed.numbers), (c) => c.charCodeAt(0));
  const values = new kinds[packed.kind](bytes.buffer);
  const width = packed.width, scale = packed.kind === "p16" ? 1 / 65535 : 1;
  return (row) => Array.from(values.subarray(row * width, (row + 1) * width), (v) => v * scale);
}

const ids = unpacked(data.ids), T = data.tokens, name = (n) => (data.names[n].trim() ? data.names[n] : data.names[n].replaceAll(" ", "\u2423"));
const layers = data.layers.map((layer) => Object.fromEntries(Object.entries(layer).map(([key, value]) => [key, key === "shapes" ? value : unpacked(value)])));
const routed = layers.map((layer, n) => n).filter((n) => layers[n].weights);
let token = data.start, layer = layers.length - 1, cell = [0, 0], shaded = [];

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function filled(table, caption, heads, rows) {
  const head = element("tr", null), body = element("tbody", null), top = element("thead", null);
  heads.forEach(([text, kind]) => head.append(element("th", text, { scope: "col", class: kind })));
  top.append(head);
  rows.forEach((row) => body.append(row));
  table.replaceChildren(element("caption", caption, { class: "soft", style: "text-align: left; padding: .3rem .6rem" }), top, body);
}

const percent = (share) => (100 * share).toFixed(1) + "%";
const short = (value) => Number(value.toPrecision(3)).toString();
const text = (n) => name(ids(n)[0]);

function bar(share) {
  const box = element("td", null, { class: "bar", "aria-hidden": "true" }), inner = element("div", null);
  inner.style.width = 100 * share + "%";
  box.append(inner);
  return box;
}

// ---- the prompt ----

const buttons = [];
for (let n = 0; n < T; n++) {
  const button = element("button", text(n), { class: "token", type: "button", tabindex: "-1", "aria-pressed": "false" });
  button.addEventListener("click", () => choose(n));
  buttons.push(button);
}
at("tokens").append(...buttons);
at("tokens").addEventListener("keydown", (event) => {
  const to = { ArrowRight: token + 1, ArrowDown: token + 1, ArrowLeft: token - 1, ArrowUp: token - 1, Home: 0, End: T - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(Math.min(Math.max(to, 0), T - 1));
  buttons[token].focus();
});

function choose(n) {
  buttons[token].setAttribute("aria-pressed", "false");
  buttons[token].tabIndex = -1;
  token = n;
  buttons[token].setAttribute("aria-pressed", "true");
  buttons[token].tabIndex = 0;
  at("chosen").replaceChildren(`token ${token} of 0 to ${T - 1}: `, element("code", text(token)));
  showLayers();
  showAttention();
  showExperts();
}

// ---- layers ----

function showLayers() {
  filled(at("layers"), `Token ${token}. A layer's button chooses it for attention.`,
    [["layer", "first"], ["stream before", "number"], ["after attention", "number"], ["after feed-forward", "number"], ["read off here", ""]],
    layers.map((found, n) => {
      const row = element("tr", null), first = element("th", null, { scope: "row" }), read = element("td", null);
      const button = element("button", String(n), { type: "button", "aria-pressed": String(n === layer), "aria-label": `layer ${n}` });
      button.addEventListener("click", () => { layer = n; showLayers(); showAttention(); at("layers").querySelectorAll("button")[n].focus(); });
      first.append(button, found.weights ? "" : " dense");
      const top = found.top_ids(token), shares = found.top_shares(token);
      top.forEach((i, k) => {
        const item = element("span", null, { class: "read", title: `${percent(shares[k])} after layer ${n}` });
        item.append(element("b", name(i), { class: "text" }), " " + percent(shares[k]));
        read.append(item);
      });
      row.append(first, ...found.rms(token).map((value) => element("td", short(value), { class: "number" })), read);
      if (n === layer) row.setAttribute("aria-current", "true");
      return row;
    }));
  const shapes = Object.entries(layers[layer].shapes).map(([what, sizes]) => `${what} ${sizes.join(" × ")}`);
  at("shapes").textContent = `Shapes in layer ${layer}: ${shapes.join(", ")}.`;
}

// ---- attention ----

function showAttention() {
  const keys = layers[layer].keys(token), shares = layers[layer].shares(token);
  const kept = keys.map((key, k) => [key, shares[k]]).filter(([, share]) => share > 0);
  shaded.forEach((n) => { buttons[n].style.removeProperty("--share"); buttons[n].removeAttribute("title"); });
  // At most 0.45, so that a text on the shade keeps its contrast in either theme; the root lets small shares show.
  shaded = kept.map(([key]) => key);
  kept.forEach(([key, share]) => { buttons[key].style.setProperty("--share", 0.45 * Math.sqrt(share)); buttons[key].title = `${percent(share)} of the attention`; });
  at("attention-of").textContent = `Token ${token} in layer ${layer}, ${data.head === null ? `the average of ${data.heads} heads` : `head ${data.head} of ${data.heads}`}: the tokens that it looks at most.`;
  const rest = Math.max(0, 1 - kept.reduce((sum, [, share]) => sum + share, 0));
  filled(at("attention"), `The ${kept.length} that weigh most; all others together ${percent(rest)}.`, [["place", "number first"], ["token", ""], ["share", "number"], ["", "bar"]],
    kept.map(([key, share]) => {
      const row = element("tr", null), shown = element("td", null);
      shown.append(element("code", text(key)));
      row.append(element("td", String(key), { class: "number" }), shown, element("td", percent(share), { class: "number" }), bar(share));
      return row;
    }));
}

// ---- experts ----

const counts = routed.map((n) => {
  const found = new Array(data.experts).fill(0);
  for (let t = 0; t < T; t++) layers[n].expert_ids(t).forEach((e) => found[e]++);
  return found;
});

function values() {
  if (at("every").checked) return counts;
  return routed.map((n) => {
    const found = new Array(data.experts).fill(0), weights = layers[n].weights(token);
    layers[n].expert_ids(token).forEach((e, k) => { found[e] = weights[k]; });
    return found;
  });
}

function showExperts() {
  const found = values(), most = Math.max(...found.map((row) => Math.max(...row))), all = at("every").checked;
  const say = (value) => (all ? String(value) : value.toFixed(3));
  at("most").textContent = say(most) + (all ? ` of ${T} tokens` : "");
  paint(found, most);
  showCell(found, say);
  filled(at("experts"), all ? "How many tokens chose each expert, the busiest first." : `The experts of token ${token} and their weights, best first.`, [["layer", "number first"], ["experts", ""]],
    found.map((row, r) => {
      const made = element("tr", null), chosen = row.map((value, e) => [e, value]).filter(([, value]) => value).sort((a, b) => b[1] - a[1]);
      made.append(element("th", String(routed[r]), { scope: "row", class: "number" }), element("td", chosen.map(([e, value]) => `${e} (${say(value)})`).join(", ")));
      return made;
    }));
}

const heat = at("heat"), STEP = 8;

function paint(found, most) {
  const style = getComputedStyle(document.documentElement), tint = style.getPropertyValue("--tint"), brush = heat.getContext("2d");
  heat.width = data.experts * STEP;
  heat.height = routed.length * STEP;
  heat.style.height = `${Math.max(routed.length * 8, Math.min(120, routed.length * 28))}px`;
  brush.clearRect(0, 0, heat.width, heat.height);
  found.forEach((row, r) => row.forEach((value, e) => {
    if (!value) return;
    brush.fillStyle = `rgba(${tint}, ${0.15 + (0.85 * value) / most})`;
    brush.fillRect(e * STEP, r * STEP, STEP, STEP);
  }));
  brush.strokeStyle = style.getPropertyValue("--ring");
  brush.lineWidth = 1.5;
  brush.strokeRect(cell[1] * STEP + 0.75, cell[0] * STEP + 0.75, STEP - 1.5, STEP - 1.5);
}

function showCell(found, say) {
  const [r, e] = cell, value = found[r][e];
  at("cell").textContent = `layer ${routed[r]}, expert ${e}: ${at("every").checked ? `chosen by ${say(value)} of ${T} tokens` : value ? `weight ${say(value)}` : "not chosen"}`;
}

function moveCell(r, e) {
  cell = [Math.min(Math.max(r, 0), routed.length - 1), Math.min(Math.max(e, 0), data.experts - 1)];
  const found = values(), all = at("every").checked;
  paint(found, Math.max(...found.map((row) => Math.max(...row))));
  showCell(found, (value) => (all ? String(value) : value.toFixed(3)));
}

heat.addEventListener("pointermove", (event) => {
  const box = heat.getBoundingClientRect();
  moveCell(Math.floor(((event.clientY - box.top) / box.height) * routed.length), Math.floor(((event.clientX - box.left) / box.width) * data.experts));
});
heat.addEventListener("keydown", (event) => {
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  if (!step) return;
  event.preventDefault();
  moveCell(cell[0] + step[0], cell[1] + step[1]);
});
at("one").addEventListener("change", showExperts);
at("every").addEventListener("change", showExperts);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => routed.length && showExperts());

at("about").textContent = `${data.model}: ${T} tokens, ${layers.length} layers, ${data.experts} experts in each of ${routed.length}.`;
heat.setAttribute("aria-label", "Routing: layers from top to bottom, experts from left to right. Arrow keys move from cell to cell; the numbers are in the table below.");
if (!routed.length) {
  at("routing").hidden = true;
  showExperts = () => {};
}
choose(token);
