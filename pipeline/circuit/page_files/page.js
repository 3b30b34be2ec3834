"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const svg = document.getElementById("graph");
const details = document.getElementById("details");
const N_LINES = 150; // of a graph's strongest; a node pointed at shows all of its own
const REACH = 16; // pixels around a node in which it answers the pointer
const STEP = { x: 30, y: 64 }; // both grow until a graph fills its frame
const MARGIN = { left: 64, bottom: 48, top: 40, right: 24 };
const SHAPES = { head: "rect", embedding: "square", position: "square", error: "diamond", mlp: "diamond" };
const pen = document.createElement("canvas").getContext("2d");
let view = { x: 0, y: 0, width: 1, height: 1 };
let whole = view;
let shown = null; // the graph that is drawn, and its parts
let kept = null; // the node that stays selected
let under = null; // the node under the pointer

function element(name, attributes = {}, text = null, space = null) {
  const made = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}
const drawn = (name, attributes = {}, text = null) => element(name, attributes, text, "http://www.w3.org/2000/svg");
const short = (value) => value === null ? "–" : Number(value).toPrecision(3).replace("-", "−");
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥"); // in running text; tokens come visible
const cut = (text, letters) => { const own = [...text]; return own.length > letters ? `${own.slice(0, Math.max(letters - 1, 1)).join("")}…` : text; };

function showPaths() {
  const place = document.getElementById("paths");
  if (!data.rounds.length) place.append(element("p", {}, "No path: nothing that the filters allow contributes."));
  data.rounds.forEach((paths, round) => {
    place.append(element("h3", {}, round ? `${round + 1} steps` : "1 step"));
    const list = element("ol");
    paths.forEach(({ steps, nodes }) => {
      const item = element("li", data.graphs.length ? { tabindex: 0 } : {});
      steps.forEach((step) => item.append(element("span", { class: "arrow" }, "← "), `${step} `));
      for (const start of ["mouseenter", "focus"]) item.addEventListener(start, () => trace(nodes[shown.number]));
      for (const end of ["mouseleave", "blur"]) item.addEventListener(end, () => trace(null));
      list.append(item);
    });
    place.append(list);
  });
}

function xOf(value) { return MARGIN.left + (value + 0.5) * STEP.x; }
function yOf(graph, value) { return MARGIN.top + (graph.top - value + 0.5) * STEP.y; }
/** Units of the drawing in a pixel of the screen. */
function scale() { return Math.max(view.width / Math.max(svg.clientWidth, 1), view.height / Math.max(svg.clientHeight, 1)); }

function drawAxes(graph, width, height) {
  for (const { name, y: level } of graph.layers) { // layers in which nothing lies are left out
    const y = yOf(graph, level);
    svg.append(drawn("line", { class: "grid", x1: MARGIN.left, x2: width, y1: y, y2: y }));
    svg.append(drawn("text", { class: "axis", x: MARGIN.left / 8, y, "dominant-baseline": "middle" }, name));
  }
  return graph.columns.map((column) => {
    const text = column.token === null ? "all tokens" : data.tokens[column.token];
    const start = xOf(column.start - 0.5);
    svg.append(drawn("line", { class: "grid", x1: start, x2: start, y1: MARGIN.top / 2, y2: height - MARGIN.bottom / 2 }));
    const label = drawn("text", {
      class: `axis${column.token === data.here ? " here" : ""}`, "text-anchor": "middle",
      x: xOf(column.start + column.width / 2 - 0.5), y: height - MARGIN.bottom / 3,
    });
    svg.append(label);
    return { label, text, width: column.width * STEP.x };
  });
}

function line(graph, edge) {
  const from = graph.nodes[edge.child], to = graph.nodes[edge.parent];
  const [x1, y1, x2, y2] = [xOf(from.x - 0.5), yOf(graph, from.y), xOf(to.x - 0.5), yOf(graph, to.y)];
  const bend = (y1 + y2) / 2;
  return drawn("path", {
    class: `edge${edge.value < 0 ? " less" : ""}${from.is_beside ? " beside" : ""}`,
    d: `M${x1},${y1} C${x1},${bend} ${x2},${bend} ${x2},${y2}`, "stroke-width": 0.5 + 5 * Math.abs(edge.strength),
  });
}

/** The lines drawn at first: the strongest, and those of what lies beside nodes, which are hidden with it. */
function strongest(graph) {
  const isBeside = (edge) => graph.nodes[edge.child].is_beside;
  const main = graph.edges.filter((edge) => !isBeside(edge)); // the weakest first
  document.getElementById("drawn").textContent =
    main.length > N_LINES ? `The strongest ${N_LINES} of ${main.length.toLocaleString("en")} lines are drawn. ` : "";
  return [...graph.edges.filter(isBeside), ...main.slice(-N_LINES)];
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

function drawNodes(graph) {
  return graph.nodes.map((node, place) => {
    const group = drawn("g", {
      class: `node ${node.kind}${node.value < 0 ? " less" : ""}${node.is_beside ? " beside" : ""}`, tabindex: 0, role: "button",
      "aria-pressed": "false", "aria-label": `${node.name}, ${short(node.value)}`,
      transform: `translate(${xOf(node.x - 0.5)},${yOf(graph, node.y)})`,
    });
    group.append(drawn("circle", { class: "halo", r: 14 }), shapeOf(node));
    group.addEventListener("focus", () => pointAt(place));
    group.addEventListener("blur", () => pointAt(null));
    group.addEventListener("click", (event) => { if (event.detail === 0) choose(place); }); // of a screen reader
    group.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(place); }
    });
    svg.append(group);
    return group;
  });
}

function drawLabels(graph) { // the strongest first: where two would meet, the stronger is shown
  const order = graph.nodes.map((_, place) => place).filter((place) => graph.nodes[place].label);
  order.sort((a, b) => Math.abs(graph.nodes[b].strength) - Math.abs(graph.nodes[a].strength));
  return order.map((place) => {
    const node = graph.nodes[place], at = { x: xOf(node.x - 0.5), y: yOf(graph, node.y) };
    const rare = node.card && data.cards[node.card].is_rare ? " rare" : "";
    const label = drawn("text", { class: `label${rare}`, x: at.x, "text-anchor": "middle", "aria-hidden": "true" });
    const text = cut(node.label.trim(), 28);
    pen.font = "11px system-ui, sans-serif";
    svg.append(label);
    return { label, text, place, wide: pen.measureText(text).width, ...at };
  });
}

/** Show a node, whose lines are all drawn; null goes back to the one that is kept. */
function pointAt(place) {
  under = place;
  const here = place === null ? kept : place;
  const { graph, groups } = shown;
  groups.forEach((group, number) => group.classList.toggle("under", number === here));
  svg.classList.toggle("faded", here !== null);
  svg.classList.toggle("pointing", place !== null);
  const own = here === null ? [] : graph.edges.filter((edge) => edge.child === here || edge.parent === here);
  shown.near.replaceChildren(...own.map((edge) => line(graph, edge)));
  if (here !== null) showNode(graph, here);
}

function choose(place) {
  kept = kept === place ? null : place;
  shown.groups.forEach((group, number) => {
    group.classList.toggle("selected", number === kept);
    group.setAttribute("aria-pressed", String(number === kept));
  });
  pointAt(place);
}

/** Light the nodes of a path, and the lines between them. */
function trace(places) {
  if (!shown) return;
  const { graph, groups, labels } = shown;
  const lit = new Set(places || []);
  svg.classList.toggle("tracing", places !== null);
  groups.forEach((group, number) => group.classList.toggle("lit", lit.has(number)));
  labels.forEach(({ label, place }) => label.classList.toggle("lit", lit.has(place)));
  if (places === null) { pointAt(null); return; }
  svg.classList.add("faded");
  const steps = new Set(places.slice(1).map((place, step) => `${place} ${places[step]}`));
  const own = graph.edges.filter((edge) => steps.has(`${edge.child} ${edge.parent}`));
  shown.near.replaceChildren(...own.map((edge) => line(graph, edge)));
}

function showNode(graph, place) {
  const node = graph.nodes[place];
  const facts = element("dl");
  const say = (name, value) => facts.append(element("dt", {}, name), element("dd", {}, value));
  say("value", short(node.value));
  if (node.influence !== null) say("influence", short(node.influence));
  details.replaceChildren(element("h2", {}, node.name), facts);
  if (node.card) showCard(data.cards[node.card]);
  for (const [title, own, other] of [["What it is made of", "parent", "child"], ["What it contributes to", "child", "parent"]]) {
    const edges = graph.edges.filter((edge) => edge[own] === place).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    if (!edges.length) continue;
    const list = element("ul");
    edges.slice(0, 20).forEach((edge) => list.append(element("li", {}, `${graph.nodes[edge[other]].name}: ${short(edge.value)}`)));
    details.append(element("h3", {}, title), list);
    if (edges.length > 20) details.append(element("p", {}, `and ${edges.length - 20} more`));
  }
}

function showCard(card) {
  const facts = element("dl");
  for (const [name, value] of card.facts) facts.append(element("dt", {}, name), element("dd", {}, visible(String(value))));
  details.append(facts);
  if (card.page) details.append(element("a", { href: card.page }, "Its page in the dashboard"));
  if (card.examples.length) details.append(element("h3", {}, "In other texts"));
  for (const example of card.examples) {
    const text = element("p", { class: "example" });
    text.append(document.createTextNode(visible(example.before)), element("mark", {}, example.token), document.createTextNode(visible(example.after)));
    details.append(text);
  }
}

function applyView() {
  const own = Math.max(scale(), 0.4);
  svg.style.setProperty("--scale", own);
  const taken = [];
  for (const { label, text, x, y, wide } of shown.labels) {
    const box = [x / own - wide / 2 - 2, y / own - 25, x / own + wide / 2 + 2, y / own - 11];
    const meets = taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]);
    label.textContent = meets ? "" : text;
    label.setAttribute("y", y - 13 * Math.max(own, 0.7));
    if (!meets) taken.push(box);
  }
  for (const { label, text, width } of shown.columns) {
    const letters = Math.floor(width / own / 7);
    label.textContent = letters < 2 ? "" : cut(text, letters);
  }
  svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
}
function zoom(factor, x = view.x + view.width / 2, y = view.y + view.height / 2) {
  const width = Math.min(Math.max(view.width * factor, 60), whole.width * 4), ratio = width / view.width;
  view = { x: x - (x - view.x) * ratio, y: y - (y - view.y) * ratio, width, height: view.height * ratio };
  applyView();
}
function pan(dx, dy) { view = { ...view, x: view.x + dx, y: view.y + dy }; applyView(); }

function atPointer(event) {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return [point.x, point.y];
}
/** The node nearest to the pointer, if it is within reach. */
function nearest(event) {
  const [x, y] = atPointer(event), { graph } = shown;
  let best = null, least = REACH * scale();
  graph.nodes.forEach((node, place) => {
    if (node.is_beside && svg.classList.contains("without-beside")) return;
    const far = Math.hypot(xOf(node.x - 0.5) - x, yOf(graph, node.y) - y);
    if (far <= least) [best, least] = [place, far];
  });
  return best;
}

function listenToView() {
  const held = new Map(); // pointers that are down, by where they were last
  let moved = 0;
  svg.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, ...atPointer(event)); }, { passive: false });
  svg.addEventListener("pointerdown", (event) => {
    if (!held.size) moved = 0;
    held.set(event.pointerId, atPointer(event));
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (!held.has(event.pointerId)) {
      const place = nearest(event);
      if (place !== under) pointAt(place);
      return;
    }
    const [x, y] = atPointer(event), [fromX, fromY] = held.get(event.pointerId);
    const others = [...held].filter(([pointer]) => pointer !== event.pointerId).map(([, at]) => at);
    moved += Math.hypot(x - fromX, y - fromY) / scale();
    if (others.length) { // two fingers: what lies under the other stays there
      const [otherX, otherY] = others[0];
      const before = Math.hypot(fromX - otherX, fromY - otherY), now = Math.hypot(x - otherX, y - otherY);
      if (now > 0 && before > 0) zoom(before / now, otherX, otherY);
    } else if (moved > 4) pan(fromX - x, fromY - y);
    held.set(event.pointerId, atPointer(event));
  });
  const release = (event) => {
    const place = held.delete(event.pointerId) && event.type === "pointerup" && moved <= 4 ? nearest(event) : null;
    if (place !== null) choose(place);
  };
  for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, release);
  svg.addEventListener("pointerleave", () => { if (!held.size) pointAt(null); });
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };
    const move = moves[event.key];
    if (move) pan(move[0] * view.width, move[1] * view.height);
    else if (event.key === "+" || event.key === "=") zoom(1 / 1.25);
    else if (event.key === "-") zoom(1.25);
    else if (event.key === "0") { view = whole; applyView(); }
    else return;
    event.preventDefault();
  });
}

function drawGraph(number) {
  const graph = data.graphs[number];
  kept = under = null;
  document.getElementById("beside").hidden = !graph.nodes.some((node) => node.is_beside);
  document.querySelectorAll("#choices .graph").forEach((button, place) => button.setAttribute("aria-pressed", String(place === number)));
  const last = graph.columns[graph.columns.length - 1];
  const columns = last.start + last.width + 0.5;
  const [wide, tall] = [Math.max(svg.clientWidth, 1), Math.max(svg.clientHeight, 1)];
  STEP.x = Math.min(Math.max((wide - 88) / columns, 30), 160);
  const across = Math.max((columns * STEP.x) / (wide - 88), 1); // units of a pixel that the width alone asks for
  STEP.y = Math.min(Math.max(((tall - 88) * across) / (graph.top + 1), 48), 160 * across);
  // margins hold text, which is as large however far away the graph is
  const far = Math.max(across, ((graph.top + 1) * STEP.y) / (tall - 88));
  Object.assign(MARGIN, { left: 64 * far, right: 24 * far, top: 40 * far, bottom: 48 * far });
  const width = xOf(last.start + last.width) + MARGIN.right;
  const height = yOf(graph, -0.5) + MARGIN.bottom;
  svg.replaceChildren();
  svg.classList.remove("faded", "tracing");
  shown = { number, graph, columns: drawAxes(graph, width, height), near: drawn("g", { class: "near" }) };
  const edges = drawn("g", { class: "edges" });
  edges.append(...strongest(graph).map((edge) => line(graph, edge)));
  svg.append(edges, shown.near);
  shown.groups = drawNodes(graph);
  shown.labels = drawLabels(graph);
  whole = view = { x: 0, y: 0, width, height };
  applyView();
  showNode(graph, graph.root);
}

showPaths();
if (data.graphs.length) {
  data.graphs.forEach((graph, number) => {
    const button = element("button", { type: "button", class: "graph", "aria-pressed": "false" }, graph.title);
    button.addEventListener("click", () => drawGraph(number));
    document.getElementById("choices").append(button);
  });
  svg.classList.add("without-beside");
  const beside = element("button", { type: "button", id: "beside", "aria-pressed": "false" }, "Errors, biases and what was left out");
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
