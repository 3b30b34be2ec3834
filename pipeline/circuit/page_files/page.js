"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const svg = document.getElementById("graph");
const STEP = { x: 30, y: 64 }; // both grow until a graph fills its frame
const MARGIN = { left: 64, bottom: 48, top: 40, right: 24 };
const SHAPES = { head: "rect", embedding: "square", position: "square", error: "diamond", mlp: "diamond" };
let view = { x: 0, y: 0, width: 1, height: 1 };
let whole = view;
let kept = null;
let labels = [];

function element(name, attributes = {}, text = null, space = null) {
  const made = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}
const drawn = (name, attributes, text = null) => element(name, attributes, text, "http://www.w3.org/2000/svg");
const short = (value) => value === null ? "–" : Number(value).toPrecision(3);
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥"); // in running text; tokens come visible

function showHeader() {
  const root = data.root;
  document.title = `${root.text} · circuit`;
  document.getElementById("question").textContent = `${root.text} = ${short(root.value)}`;
  const prompt = document.getElementById("prompt");
  data.tokens.forEach((text, place) => {
    const here = place === root.node.token ? " here" : "";
    prompt.append(element("span", { class: `token${here}`, title: `token ${place}` }, text));
  });
  const inactive = root.is_active ? "" : "The feature is not active here: its pre-activation is explained. ";
  const likely = data.likely.map(({ text, probability }) => `“${text}” ${(100 * probability).toFixed(0)} %`).join(", ");
  document.getElementById("likely").textContent = likely && `Likely to come next: ${likely}.`;
  const ofBos = root.from_bos ? ` (${short(root.from_bos)} from the BOS)` : "";
  document.getElementById("figures").textContent =
    `${inactive}${root.n_terms.toLocaleString("en")} terms sum to it within ${root.incompleteness.toExponential(1)} of the sum of ` +
    "their sizes. " + Object.entries(root.by_kind).map(([kind, value]) => `${kind.replace("_", " ")} ${short(value)}${kind === "head" ? ofBos : ""}`).join(", ") + ".";
}

function showPaths() {
  const place = document.getElementById("paths");
  if (!data.rounds.length) place.append(element("p", {}, "No path: nothing that the filters allow contributes."));
  data.rounds.forEach((paths, round) => {
    place.append(element("h3", {}, `${round + 2} steps`));
    const list = element("ol");
    paths.forEach((text) => list.append(element("li", {}, text)));
    place.append(list);
  });
}

function xOf(value) { return MARGIN.left + (value + 0.5) * STEP.x; }
function yOf(graph, value) { return MARGIN.top + (graph.top - value + 0.5) * STEP.y; }

function drawAxes(graph, width, height) {
  for (const { name, y: level } of graph.layers) { // layers in which nothing lies are left out
    const y = yOf(graph, level);
    svg.append(drawn("line", { class: "grid", x1: MARGIN.left, x2: width, y1: y, y2: y }));
    svg.append(drawn("text", { class: "axis", x: 8, y: y + 4 }, name));
  }
  for (const column of graph.columns) {
    const middle = xOf(column.start + column.width / 2 - 0.5);
    const text = column.token === null ? "all tokens" : data.tokens[column.token];
    const here = column.token === data.root.node.token ? " here" : "";
    const cut = text.length > 4 * column.width + 3 ? `${text.slice(0, 4 * column.width + 2)}…` : text;
    svg.append(drawn("text", { class: `axis${here}`, x: middle, y: height - 14, "text-anchor": "middle" }, cut));
    const start = xOf(column.start - 0.5);
    svg.append(drawn("line", { class: "grid", x1: start, x2: start, y1: MARGIN.top / 2, y2: height - MARGIN.bottom / 2 }));
  }
}

function drawEdges(graph) {
  return graph.edges.map((edge) => {
    const from = graph.nodes[edge.child], to = graph.nodes[edge.parent];
    const [x1, y1, x2, y2] = [xOf(from.x - 0.5), yOf(graph, from.y), xOf(to.x - 0.5), yOf(graph, to.y)];
    const bend = (y1 + y2) / 2;
    const line = drawn("path", {
      class: `edge${edge.value < 0 ? " less" : ""}${from.is_beside ? " beside" : ""}`,
      d: `M${x1},${y1} C${x1},${bend} ${x2},${bend} ${x2},${y2}`,
      "stroke-width": 0.5 + 5 * Math.abs(edge.strength),
    });
    line.append(drawn("title", {}, `${from.name} → ${to.name}: ${short(edge.value)}`));
    svg.append(line);
    return line;
  });
}

function shapeOf(node) {
  const size = (node.is_beside ? 3 : 5) + 5 * Math.sqrt(Math.abs(node.strength));
  switch (SHAPES[node.kind]) {
    case "rect": return drawn("rect", { class: "shape", x: -size, y: -size * 0.7, width: 2 * size, height: 1.4 * size, rx: 3 });
    case "square": return drawn("rect", { class: "shape", x: -size * 0.8, y: -size * 0.8, width: 1.6 * size, height: 1.6 * size });
    case "diamond": return drawn("path", { class: "shape", d: `M0,${-size} L${size},0 L0,${size} L${-size},0 Z` });
    default: return drawn("circle", { class: "shape", r: size });
  }
}

function drawNodes(graph, lines) {
  graph.nodes.forEach((node, place) => {
    const group = drawn("g", {
      class: `node ${node.kind}${node.value < 0 ? " less" : ""}${node.is_beside ? " beside" : ""}`, tabindex: 0, role: "button", "aria-pressed": "false",
      "aria-label": `${node.name}, ${short(node.value)}`, transform: `translate(${xOf(node.x - 0.5)},${yOf(graph, node.y)})`,
    });
    group.append(drawn("circle", { class: "halo", r: 14 }), shapeOf(node));
    const show = () => { showNode(graph, place); highlight(graph, lines, place); };
    const leave = () => { if (kept !== null) { showNode(graph, kept); highlight(graph, lines, kept); } else highlight(graph, lines, null); };
    const choose = () => {
      svg.querySelectorAll(".selected").forEach((other) => { other.classList.remove("selected"); other.setAttribute("aria-pressed", "false"); });
      kept = kept === place ? null : place;
      if (kept !== null) { group.classList.add("selected"); group.setAttribute("aria-pressed", "true"); }
      show();
    };
    group.addEventListener("mouseenter", show);
    group.addEventListener("mouseleave", leave);
    group.addEventListener("focus", show);
    group.addEventListener("blur", leave);
    group.addEventListener("click", choose);
    group.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); }
    });
    svg.append(group);
  });
}

function drawLabels(graph) { // outside of the nodes, whose middle is then where they are pointed at
  labels = graph.nodes.filter((node) => node.label).map((node) => {
    const place = { x: xOf(node.x - 0.5), y: yOf(graph, node.y) - 12 };
    const label = drawn("text", { class: "label", ...place, "text-anchor": "middle", "aria-hidden": "true" });
    svg.append(label);
    return { label, text: node.label.trim() };
  });
}

function highlight(graph, lines, place) {
  svg.classList.toggle("faded", place !== null);
  graph.edges.forEach((edge, number) => {
    lines[number].classList.toggle("near", place !== null && (edge.child === place || edge.parent === place));
  });
}

function showNode(graph, place) {
  const node = graph.nodes[place], details = document.getElementById("details");
  const facts = element("dl");
  const say = (name, value) => facts.append(element("dt", {}, name), element("dd", {}, value));
  say("value", short(node.value));
  if (node.influence !== null) say("influence", short(node.influence));
  if (node.token !== null && node.token < data.tokens.length) say("token", `${node.token}: ${data.tokens[node.token]}`);
  details.replaceChildren(element("h2", {}, node.name), facts);
  if (node.card && data.cards[node.card]) showCard(details, data.cards[node.card]);
  for (const [title, own, other] of [["What it is made of", "parent", "child"], ["What it contributes to", "child", "parent"]]) {
    const edges = graph.edges.filter((edge) => edge[own] === place).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    if (!edges.length) continue;
    const list = element("ul");
    edges.slice(0, 20).forEach((edge) => list.append(element("li", {}, `${graph.nodes[edge[other]].name}: ${short(edge.value)}`)));
    details.append(element("h3", {}, title), list);
    if (edges.length > 20) details.append(element("p", {}, `and ${edges.length - 20} more`));
  }
}

function showCard(details, card) {
  const facts = element("dl");
  for (const [name, value] of card.facts) facts.append(element("dt", {}, name), element("dd", {}, visible(String(value))));
  details.append(facts);
  for (const example of card.examples) {
    const line = element("p", { class: "example" });
    line.append(document.createTextNode(visible(example.before)), element("mark", {}, example.token), document.createTextNode(visible(example.after)));
    details.append(line);
  }
}

function applyView() {
  const scale = Math.min(Math.max(view.width / Math.max(svg.clientWidth, 1), 0.4), 2);
  svg.style.setProperty("--scale", scale);
  const room = Math.floor(STEP.x / scale / 7); // letters between one node and the next: more as the view comes nearer
  for (const { label, text } of labels) {
    const letters = [...text]; // a code point each, so that none is cut in two
    const isNumber = /^#\d+$/.test(text); // half a number would be another feature's
    label.textContent = letters.length <= room ? text : isNumber || room < 3 ? "" : `${letters.slice(0, room - 1).join("")}…`;
  }
  svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
}
function zoom(factor, x = view.x + view.width / 2, y = view.y + view.height / 2) {
  const width = Math.min(Math.max(view.width * factor, 60), whole.width * 4), ratio = width / view.width;
  view = { x: x - (x - view.x) * ratio, y: y - (y - view.y) * ratio, width, height: view.height * ratio };
  applyView();
}
function pan(dx, dy) { view = { ...view, x: view.x + dx * view.width, y: view.y + dy * view.height }; applyView(); }

function atPointer(event) {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return [point.x, point.y];
}

function listenToView() {
  let from = null;
  svg.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, ...atPointer(event)); }, { passive: false });
  svg.addEventListener("pointerdown", (event) => { if (!event.target.closest(".node")) { from = atPointer(event); svg.setPointerCapture(event.pointerId); } });
  svg.addEventListener("pointermove", (event) => {
    if (!from) return;
    const [x, y] = atPointer(event);
    view = { ...view, x: view.x + from[0] - x, y: view.y + from[1] - y };
    applyView();
  });
  for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, () => { from = null; });
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };
    if (moves[event.key]) pan(...moves[event.key]);
    else if (event.key === "+" || event.key === "=") zoom(1 / 1.25);
    else if (event.key === "-") zoom(1.25);
    else if (event.key === "0") { view = whole; applyView(); }
    else return;
    event.preventDefault();
  });
}

function drawGraph(number) {
  const graph = data.graphs[number];
  kept = null;
  document.getElementById("beside").hidden = !graph.nodes.some((node) => node.is_beside);
  document.querySelectorAll("#choices .graph").forEach((button, place) => button.setAttribute("aria-pressed", String(place === number)));
  const last = graph.columns[graph.columns.length - 1];
  const columns = last.start + last.width + 0.5;
  const shape = Math.max(svg.clientWidth, 1) / Math.max(svg.clientHeight, 1);
  const tall = MARGIN.top + MARGIN.bottom + (graph.top + 1) * 64;
  STEP.x = Math.min(Math.max((tall * shape - MARGIN.left - MARGIN.right) / columns, 30), 72);
  const width = xOf(last.start + last.width) + MARGIN.right;
  const room = width * svg.clientHeight / Math.max(svg.clientWidth, 1) - MARGIN.top - MARGIN.bottom;
  STEP.y = Math.min(Math.max(room / (graph.top + 1), 48), 160);
  const height = yOf(graph, -0.5) + MARGIN.bottom;
  svg.replaceChildren();
  svg.classList.remove("faded");
  drawAxes(graph, width, height);
  drawNodes(graph, drawEdges(graph));
  drawLabels(graph);
  whole = view = { x: 0, y: 0, width, height };
  applyView();
  document.getElementById("details").replaceChildren(element("p", {}, "Point at a node, or walk to it with Tab, to see what it is made of."));
}

showHeader();
showPaths();
if (data.graphs.length) {
  data.graphs.forEach((graph, number) => {
    const button = element("button", { type: "button", class: "graph", "aria-pressed": "false" }, graph.title);
    button.addEventListener("click", () => drawGraph(number));
    document.getElementById("choices").append(button);
  });
  const beside = element("button", { type: "button", id: "beside", "aria-pressed": "true" }, "Errors, biases and what was left out");
  beside.addEventListener("click", () => {
    const hidden = svg.classList.toggle("without-beside");
    beside.setAttribute("aria-pressed", String(!hidden));
  });
  document.getElementById("choices").append(beside);
  listenToView();
  drawGraph(0);
} else {
  document.getElementById("graph-part").replaceChildren(element("p", {}, "There is no graph: capped values do not add up, and none was asked for."));
}
