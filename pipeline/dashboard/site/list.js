"use strict";
// The list of features. Only rows near the visible part exist, so that a list of any length stays quick.

const List = (() => {
  const { html } = Elements;
  const ROW = 36; // px, as in list.css
  const SPARE = 12; // rows kept above and below what can be seen
  const MOST = 250000; // rows; taller than this and browsers stop drawing
  const COLUMNS = [
    ["feature", "feature"], [null, "fires on"], [null, "promotes"], ["frequency", "frequency"], ["max", "max"],
    ["mean", "mean"], [null, "activations"],
  ];
  let index = null;
  let texts = null;
  let chosen = { ...Selection.DEFAULTS };
  let places = []; // of the index, in the order shown
  let rows = new Map(); // by place in the order shown
  let filters = null;
  let parts = null;
  let reached = 0; // scroll position, kept while a feature is shown

  const root = document.getElementById("list");

  /** Draw the list for the first time. */
  function open(loaded, start) {
    index = loaded;
    chosen = start;
    filters = Filters.form(index, chosen, (values) => choose(values, true));
    const columns = COLUMNS.filter(([, title]) => title !== "promotes" || index.promoted);
    const head = html("tr", {}, columns.map(header));
    const body = html("tbody", { onkeydown: moveByKey });
    const space = () => html("tbody", { "aria-hidden": "true" }, html("tr", {}, html("td", { colspan: columns.length })));
    parts = { head, body, above: space(), below: space(), empty: html("p", { class: "empty", hidden: true }, "No feature is like that.") };
    parts.table = html("table", { class: "features" }, html("caption", { class: "spoken" }, "Features"),
      html("thead", {}, head), parts.above, body, parts.below);
    parts.scroll = html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "List of features" }, parts.table, parts.empty);
    parts.scroll.addEventListener("scroll", draw, { passive: true });
    window.addEventListener("resize", draw);
    root.replaceChildren(masthead(), filters.element, parts.scroll);
    choose(start, false);
  }

  function masthead() {
    const { about } = index;
    const { layer } = about;
    const facts = [
      `${Text.count(layer.n_rows)} ${layer.split === "heldout" ? "held-out" : layer.split} tokens`,
      `L0 ${Text.number(layer.l0_mean)}`, layer.fvu === null ? null : `FVU ${Text.number(layer.fvu)}`,
      `${Text.count(layer.n_dead)} dead`, `${Text.count(layer.n_dense)} dense`, about.hooks.join(" → "),
    ];
    return html("header", { class: "masthead" }, Sites.control(),
      html("h1", {}, about.model, html("span", { class: "quiet" }, ` ${about.site}`)),
      html("p", { class: "facts" }, facts.filter(Boolean).map((fact) => html("span", {}, fact))));
  }

  function header([sort, title]) {
    const name = title.replace(" ", "-");
    if (sort === null) return html("th", { scope: "col", class: name }, title);
    const flip = () => {
      const first = sort === "feature" ? sort : "-" + sort;
      const other = sort === "feature" ? "-" + sort : sort;
      choose({ ...chosen, sort: chosen.sort === first ? other : first }, true);
    };
    return html("th", { scope: "col", class: name, "data-sort": sort },
      html("button", { type: "button", onclick: flip }, title, html("span", { class: "arrow", "aria-hidden": "true" })));
  }

  /** Show what is chosen; write it into the address if it was chosen here. */
  function choose(values, here) {
    chosen = { ...Selection.DEFAULTS, ...values };
    if (chosen.q) texts ??= Selection.searchTexts(index);
    places = Selection.select(index, texts, chosen);
    for (const cell of parts.head.querySelectorAll("[data-sort]")) {
      const isSorted = chosen.sort.replace("-", "") === cell.dataset.sort;
      if (isSorted) cell.setAttribute("aria-sort", chosen.sort.startsWith("-") ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    filters.update(chosen, places.length);
    parts.table.setAttribute("aria-rowcount", nRows() + 1);
    parts.empty.hidden = places.length > 0;
    rows = new Map();
    parts.body.replaceChildren();
    parts.scroll.scrollTop = 0;
    draw();
    if (here) Route.remember(Selection.format(chosen));
  }

  function nRows() {
    return Math.min(places.length, MOST);
  }

  /** Make the rows that can be seen, and some around them; a row that has the focus and leaves gives it to the list. */
  function draw() {
    if (root.hidden) return;
    const { scroll, above, below } = parts;
    const first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - SPARE);
    const last = Math.min(nRows(), Math.ceil((scroll.scrollTop + scroll.clientHeight) / ROW) + SPARE);
    for (const [place, row] of rows) {
      if (place >= first && place < last) continue;
      if (row.contains(document.activeElement)) scroll.focus({ preventScroll: true });
      row.remove();
      rows.delete(place);
    }
    for (let place = first; place < last; place += 1) {
      if (!rows.has(place)) insert(place);
    }
    resize(above, first);
    resize(below, nRows() - last);
    reached = scroll.scrollTop;
  }

  function insert(place) {
    const row = makeRow(place);
    const next = [...parts.body.children].find((other) => Number(other.dataset.place) > place);
    parts.body.insertBefore(row, next || null);
    rows.set(place, row);
  }

  function resize(space, nRowsHigh) {
    space.hidden = nRowsHigh <= 0;
    space.firstChild.firstChild.style.height = `${Math.max(0, nRowsHigh) * ROW}px`;
  }

  function makeRow(place) {
    const at = places[place];
    const feature = index.feature[at];
    const frequency = index.frequency[at];
    const isDead = frequency === 0;
    const tokens = (own) => html("td", {}, html("div", { class: "tokens" }, own.map((token) => Text.token(index.vocabulary[token]))));
    // a bar's length is log frequency, over the five decades up to always
    const length = isDead ? 0 : Math.max(0, 1 + Math.log10(frequency) / 5);
    return html("tr", { "data-place": place, "aria-rowindex": place + 2, onclick: (event) => openByClick(event, feature) },
      html("th", { scope: "row" }, html("a", { href: Route.to(feature) }, feature)),
      tokens(index.tokens[at]), index.promoted ? tokens(index.promoted[at]) : null,
      html("td", { class: "frequency", "--length": length.toFixed(3) },
        isDead ? html("span", { class: "flag" }, "dead") : Text.percent(frequency),
        index.is_dense[at] ? html("span", { class: "flag" }, "dense") : null),
      html("td", { class: "number" }, Text.number(index.max[at])),
      html("td", { class: "number" }, Text.number(index.mean[at])),
      html("td", { class: "activations" }, index.sparks[at] ? Charts.sparkline(index.sparks[at]) : null));
  }

  function openByClick(event, feature) {
    if (!event.target.closest("a") && !window.getSelection().toString()) window.location.hash = Route.to(feature).slice(1);
  }

  /** Arrow keys, Page up and down, Home and End move among rows while one has the focus. */
  function moveByKey(event) {
    const row = event.target.closest("tr[data-place]");
    const page = Math.max(1, Math.floor(parts.scroll.clientHeight / ROW) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!row || !(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    focusRow(Math.min(nRows() - 1, Math.max(0, Number(row.dataset.place) + steps[event.key])));
  }

  function focusRow(place) {
    const { scroll } = parts;
    const top = place * ROW;
    const visible = scroll.clientHeight - ROW; // the head covers one row
    if (top < scroll.scrollTop) scroll.scrollTop = top;
    if (top + ROW > scroll.scrollTop + visible) scroll.scrollTop = top + ROW - visible;
    draw();
    rows.get(place)?.querySelector("a").focus({ preventScroll: true });
  }

  /** Come back to the list as it was left, with the focus on the feature that was looked at. */
  function show(values, feature) {
    const isSame = Selection.format(values) === Selection.format(chosen);
    const was = reached;
    root.hidden = false;
    if (!isSame) choose(values, false);
    parts.scroll.scrollTop = isSame ? was : 0;
    draw();
    const place = feature === null ? -1 : places.findIndex((at) => index.feature[at] === feature);
    if (place >= 0 && place < nRows()) focusRow(place);
  }

  /** The features before and after one, in the order of the list. */
  function neighbours(feature) {
    const order = places.map((at) => index.feature[at]);
    const place = order.indexOf(feature);
    return place < 0 ? [null, null] : [order[place - 1] ?? null, order[place + 1] ?? null];
  }

  /** A few tokens that tell what a feature is about, or null if the site does not show it. */
  function tokensOf(feature, nTokens = 4) {
    const at = placeOf(feature);
    return at === null ? null : index.tokens[at].slice(0, nTokens).map((token) => index.vocabulary[token]);
  }

  let byFeature = null;

  function placeOf(feature) {
    byFeature ??= new Map(index.feature.map((one, place) => [one, place]));
    return byFeature.get(feature) ?? null;
  }

  const address = () => Selection.format(chosen);

  /** Draw the list again after the index has changed. */
  function redraw() {
    texts = null;
    choose(chosen, false);
  }

  return { open, show, neighbours, tokensOf, address, redraw };
})();
