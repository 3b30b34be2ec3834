"use strict";
// Draws every chart from the numbers of the page. Where a run is under way, asks the server for newer ones.

const HEIGHT = 220;
const PAD = { left: 52, right: 10, top: 8, bottom: 22 };
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const N_COLOURS = 7;
const hidden = new Set();
let data = JSON.parse(document.getElementById("data").textContent);

const colour = (index) => `var(--series-${index % N_COLOURS})`;
const dash = (index) => DASHES[Math.floor(index / N_COLOURS) % DASHES.length];

function make(name, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

/** 1200000 as 1.2M; small numbers with four digits. */
function short(value) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (size >= unit) return `${+(value / unit).toPrecision(3)}${name}`;
  return `${+value.toPrecision(4)}`;
}

/** At most about n round numbers between two; powers of ten on a logarithmic axis. */
function ticks(low, high, n, logarithmic) {
  if (logarithmic) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
    const inside = found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    return inside.length > n + 1 ? inside.filter((tick) => Math.abs(Math.log10(tick) % 1) < 1e-9) : inside;
  }
  const rough = (high - low) / n || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) found.push(tick);
  return found;
}

function draw(figure, chart) {
  const svg = figure.querySelector("svg");
  const width = svg.clientWidth || 340;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const shown = data.runs.map((run, index) => ({ run, index, curve: run.curves[chart.key] })).filter(({ curve, index }) => curve && curve.y.length && !hidden.has(index));
  if (!shown.length) return;
  const values = shown.flatMap(({ curve }) => curve.y);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const lines = chart.key === "fvu" ? baselines(shown) : [];
  for (const { value } of lines) if (value < high * 3) [low, high] = [Math.min(low, value), Math.max(high, value)];
  const mayBeLogarithmic = chart.key === "loss" || chart.key === "fvu";
  const logarithmic = mayBeLogarithmic && low > 0 && high / low > 20;
  if (!mayBeLogarithmic) low = Math.min(low, 0);
  if (high === low) high = low + (Math.abs(low) || 1) * 0.1;
  const right = Math.max(...shown.flatMap(({ curve }) => curve.x));
  const scale = logarithmic ? Math.log : (value) => value;
  const x = (value) => PAD.left + (value / right) * (width - PAD.left - PAD.right);
  const y = (value) => HEIGHT - PAD.bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (HEIGHT - PAD.top - PAD.bottom);
  for (const tick of ticks(low, high, 4, logarithmic)) {
    make("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y(tick), y2: y(tick) }, svg);
    make("text", { x: PAD.left - 6, y: y(tick) + 4, "text-anchor": "end" }, svg).textContent = chart.share ? `${+(tick * 100).toPrecision(3)} %` : short(tick);
  }
  for (const tick of ticks(0, right, 4, false))
    make("text", { x: Math.min(x(tick), width - 14), y: HEIGHT - 6, "text-anchor": "middle" }, svg).textContent = short(tick);
  for (const { value, name, stroke } of lines) {
    if (value < low || value > high) continue;
    make("line", { class: "baseline", stroke, x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value) }, svg);
    make("text", { x: width - PAD.right, y: y(value) < 20 ? y(value) + 13 : y(value) - 4, "text-anchor": "end" }, svg).textContent = name;
  }
  for (const { curve, index } of shown) {
    const points = curve.x.map((at, point) => `${x(at).toFixed(1)},${y(curve.y[point]).toFixed(1)}`);
    make("polyline", { class: "curve", stroke: colour(index), "stroke-dasharray": dash(index), points: points.join(" ") }, svg);
    if (points.length < 40) for (const point of points) make("circle", { r: 2.2, cx: point.split(",")[0], cy: point.split(",")[1], fill: colour(index) }, svg);
  }
  const cursor = make("line", { class: "cursor", y1: PAD.top, y2: HEIGHT - PAD.bottom, visibility: "hidden" }, svg);
  const longest = shown.reduce((one, other) => (other.curve.x.length > one.curve.x.length ? other : one)).curve;

  /** Say every run's number at the logged row that is nearest. */
  figure.point = (at) => {
    const lines = shown.flatMap(({ run, curve }) => {
      const point = nearest(curve.x, at);
      const isBeside = Math.abs(curve.x[point] - at) > right / 10; // a run that ended, or has not been scored yet
      return isBeside ? [] : `${run.name}  ${chart.share ? `${(curve.y[point] * 100).toPrecision(3)} %` : curve.y[point].toPrecision(4)}`;
    });
    const rows = longest.x[nearest(longest.x, at)];
    cursor.setAttribute("x1", x(rows));
    cursor.setAttribute("x2", x(rows));
    cursor.setAttribute("visibility", "visible");
    figure.dataset.at = rows;
    svg.dataset.tip = `${rows.toLocaleString("en")} rows\n${lines.join("\n")}`;
    Tooltip.show(svg);
    return svg.dataset.tip;
  };
  figure.leave = () => {
    cursor.setAttribute("visibility", "hidden");
    delete svg.dataset.tip;
    document.getElementById("tooltip").hidden = true;
  };
  figure.rows = (pixel) => ((pixel - PAD.left) / (width - PAD.left - PAD.right)) * right;
  figure.step = (by) => {
    const now = figure.dataset.at === undefined ? longest.x.length - 1 - Math.min(by, 0) : nearest(longest.x, +figure.dataset.at);
    return longest.x[Math.max(0, Math.min(longest.x.length - 1, now + by))];
  };
}

/** The mean's FVU, and the best linear map's: once where all runs have the same. */
function baselines(shown) {
  const known = shown.filter(({ run }) => run.linear_fvu !== null);
  const same = new Set(known.map(({ run }) => run.linear_fvu)).size === 1;
  const linear = (same ? known.slice(0, 1) : known).map(({ run, index }) => ({
    value: run.linear_fvu, name: same ? "linear map" : "", stroke: same ? "var(--muted)" : colour(index),
  }));
  return [{ value: 1, name: "mean", stroke: "var(--muted)" }, ...linear];
}

function nearest(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle;
    else high = middle;
  }
  return value - sorted[low] < sorted[high] - value ? low : high;
}

function show() {
  for (const figure of document.querySelectorAll(".chart")) draw(figure, data.charts.find((chart) => chart.key === figure.dataset.key));
  for (const [index, run] of data.runs.entries()) {
    const row = document.querySelector(`tr[data-run="${index}"]`);
    if (!row) return location.reload(); // a run more than there was
    row.querySelector(".progress").textContent = run.progress;
    row.querySelector(".verdict").textContent = run.verdict;
  }
}

for (const figure of document.querySelectorAll(".chart")) {
  const svg = figure.querySelector("svg");
  svg.addEventListener("pointermove", (event) => figure.point?.(figure.rows(event.clientX - svg.getBoundingClientRect().left)));
  svg.addEventListener("pointerleave", () => figure.leave?.());
  svg.addEventListener("blur", () => figure.leave?.());
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !figure.step) return;
    event.preventDefault();
    Tooltip.say(figure.point(figure.step(by)));
  });
}
for (const button of document.querySelectorAll(".runs button"))
  button.addEventListener("click", () => {
    const index = +button.closest("tr").dataset.run;
    if (!hidden.delete(index)) hidden.add(index);
    button.setAttribute("aria-pressed", String(!hidden.has(index)));
    show();
  });
addEventListener("resize", show);
show();

async function poll() {
  try {
    const answer = await fetch("curves.json");
    if (answer.ok) {
      data = await answer.json();
      show();
    }
  } catch {
    // the server is gone for now; the curves stay
  }
  if (data.live) setTimeout(poll, 5000);
}
if (data.live) setTimeout(poll, 5000);
