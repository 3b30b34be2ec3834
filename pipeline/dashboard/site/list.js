"use strict";
// The list of features. Only rows near the visible part exist, so that a list of any length stays quick.

const List = (() => {
  const { html } = Elements;
  const HEAD = 36; // px, as in list.css
  const [ROW, PHONE_ROW] = [36, 66];
  const SPARE = 12; // rows kept above and below what can be seen
  const MOST = 250000; // rows; taller than this and browsers stop drawing
  const AROUND = 28; // characters of a passage shown on each side of what is searched for
  const COLUMNS = [
    ["feature", "feature"], ["interest", "interest"], [null, "fires on"], [null, "promotes"], ["frequency", "frequency"],
    ["max", "max"], ["mean", "mean"], [null, "activations"],
  ];
  const ARCHITECTURES = { batch_topk: "BatchTopK", topk: "TopK", relu: "ReLU", jumprelu: "JumpReLU", gated: "Gated" };
  const phone = window.matchMedia("(max-width: 700px)");
  let index = null;
  let passages = null; // texts that are searched, loaded with the first search
  let texts = null;
  let chosen = { ...Selection.DEFAULTS };
  let places = []; // of the index, in the order shown
  let matches = null; // by place in the index, of what is searched for
  let rows = new Map(); // by place in the order shown
  let filters = null;
  let parts = null;
  let reached = 0; // scroll position, kept while a feature is shown

  const rowHeight = () => (phone.matches ? PHONE_ROW : ROW);

  const root = document.getElementById("list");

  /** Draw the list for the first time. */
  function open(loaded, start) {
    index = loaded;
    chosen = start;
    filters = Filters.form(index, chosen, (values) => choose(values, true));
    const columns = COLUMNS.filter(([, title]) => title !== "promotes" || index.promoted);
    // roles are written out, since the rows of a phone are no table's to a browser
    const head = html("tr", { role: "row" }, columns.map(header));
    const body = html("tbody", { role: "rowgroup", onkeydown: moveByKey });
    const space = () => html("tbody", { "aria-hidden": "true" }, html("tr", {}, html("td", { colspan: columns.length })));
    parts = { head, body, above: space(), below: space(), empty: html("p", { class: "empty", hidden: true }, "No feature matches.") };
    parts.table = html("table", { class: "features", role: "table" }, html("caption", { class: "spoken" }, "Features"),
      html("thead", { role: "rowgroup" }, head), parts.above, body, parts.below);
    parts.scroll = html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "List of features" }, parts.table, parts.empty);
    parts.scroll.addEventListener("scroll", draw, { passive: true });
    window.addEventListener("resize", draw);
    phone.addEventListener("change", drawAnew);
    root.replaceChildren(masthead(), filters.element, parts.scroll);
    choose(start, false);
  }

  function masthead() {
    const { about } = index;
    const { layer } = about;
    const { term } = Terms;
    const facts = [
      architecture(about.architecture), [Text.count(layer.d_sae), " ", term("d_sae", "features")],
      [Text.count(layer.n_rows), " ", term("held-out", layer.split === "heldout" ? "held-out" : layer.split), " tokens", source(about.text)],
      [term("L0"), ` ${Text.number(layer.l0_mean)}`], layer.fvu === null ? null : [term("FVU"), ` ${Text.number(layer.fvu)}`],
      [`${Text.count(layer.n_dead)} `, term("dead")], [`${Text.count(layer.n_dense)} `, term("dense")],
      [term("site", about.hooks[0] === about.hooks[1] ? about.hooks[0] : about.hooks.join(" → "))],
    ];
    return html("header", { class: "masthead" }, Sites.control(),
      html("h1", {}, about.model, html("span", { class: "quiet" }, ` ${about.site}`)),
      html("div", { class: "actions" }, Keys.buttons(false)),
      html("p", { class: "facts" }, facts.filter(Boolean).map((fact) => html("span", {}, fact))));
  }

  function architecture(found) {
    if (!found) return null;
    const name = Terms.term("architecture", ARCHITECTURES[found.kind] ?? found.kind);
    return (found.k ?? null) === null ? [name] : [name, " ", Terms.term("k"), ` ${Text.count(found.k)}`];
  }

  function source(text) {
    if (!text) return null;
    return text.dataset ? ` of ${text.dataset}` : ` of cache ${text.cache}`;
  }

  function header([sort, title]) {
    const name = title.replace(" ", "-");
    const meaning = { feature: "", frequency: "frequency", activations: "activation" }[title] ?? title;
    if (sort === null) return html("th", { scope: "col", role: "columnheader", class: name }, Terms.term(meaning, title));
    const flip = () => {
      const first = sort === "feature" ? sort : "-" + sort;
      const other = sort === "feature" ? "-" + sort : sort;
      choose({ ...chosen, sort: chosen.sort === first ? other : first }, true);
    };
    return html("th", { scope: "col", role: "columnheader", class: name, "data-sort": sort },
      html("button", { type: "button", onclick: flip, ...Terms.attributes(meaning) }, title, html("span", { class: "arrow", "aria-hidden": "true" })));
  }

  /** Show what is chosen; write it into the address if it was chosen here. */
  function choose(values, here) {
    chosen = { ...Selection.DEFAULTS, ...values };
    if (chosen.q.trim()) prepareSearch();
    ({ places, found: matches } = Selection.select(index, texts, chosen));
    const isRanked = matches !== null && chosen.sort === Selection.DEFAULTS.sort;
    for (const cell of parts.head.querySelectorAll("[data-sort]")) {
      const isSorted = !isRanked && chosen.sort.replace("-", "") === cell.dataset.sort;
      if (isSorted) cell.setAttribute("aria-sort", chosen.sort.startsWith("-") ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    filters.update(chosen, places.length, isRanked);
    parts.table.setAttribute("aria-rowcount", nRows() + 1);
    parts.empty.hidden = places.length > 0;
    parts.scroll.scrollTop = 0;
    drawAnew();
    if (here) Route.remember(Selection.format(chosen));
  }

  /** Load what is searched and is not in the index; what is shown is chosen again once it is there. */
  function prepareSearch() {
    texts ??= Selection.searchTexts(index, passages);
    if (passages !== null) return;
    passages = [];
    Data.passages().then((loaded) => {
      passages = loaded;
      texts = Selection.searchTexts(index, passages);
      if (chosen.q.trim()) choose(chosen, false);
    }, (error) => Tooltip.say(error.message));
  }

  function drawAnew() {
    rows = new Map();
    parts.body.replaceChildren();
    draw();
  }

  function nRows() {
    return Math.min(places.length, MOST);
  }

  /** Make the rows that can be seen, and some around them; a row that has the focus and leaves gives it to the list. */
  function draw() {
    if (root.hidden) return;
    const { scroll, above, below } = parts;
    const ROW = rowHeight();
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
    space.firstChild.firstChild.style.height = `${Math.max(0, nRowsHigh) * rowHeight()}px`;
  }

  function makeRow(place) {
    const at = places[place];
    const feature = index.feature[at];
    const frequency = index.frequency[at];
    const isDead = frequency === 0;
    const wanted = matches ? Selection.wanted(chosen.q).text.trim() : "";
    const cell = (attributes, ...children) => html("td", { role: "cell", ...attributes }, ...children);
    const tokens = (name, chips) => cell({ class: name }, html("div", { class: "tokens" }, chips));
    // a bar's length is log frequency, over the five decades up to always
    const length = isDead ? 0 : Math.max(0, 1 + Math.log10(frequency) / 5);
    return html("tr", { role: "row", "data-place": place, "aria-rowindex": place + 2, onclick: (event) => openByClick(event, feature) },
      html("th", { scope: "row", role: "rowheader" }, html("a", { href: Route.to(feature) }, feature)),
      cell({ class: "number interest" }, Text.number(index.interest[at], 2)),
      tokens("fires-on", [labelOf(at, wanted), snippet(at, wanted), chips(at, index.tokens[at].length, wanted)]),
      index.promoted ? tokens("promotes", index.promoted[at].map((token) => Text.token(index.vocabulary[token], { wanted }))) : null,
      cell({ class: "frequency", "--length": length.toFixed(3) },
        isDead ? html("span", { class: "flag" }, "dead") : Text.percent(frequency),
        index.is_dense[at] ? html("span", { class: "flag" }, "dense") : null),
      cell({ class: "number max" }, Text.number(index.max[at])),
      cell({ class: "number mean" }, Text.number(index.mean[at])),
      cell({ class: "activations" }, index.sparks[at] ? Charts.sparkline(index.sparks[at]) : null));
  }

  /** The first tokens that a feature fires on. */
  function chips(at, nTokens, wanted) {
    const examples = index.examples[at];
    return index.tokens[at].slice(0, nTokens).map((token, rank) =>
      Text.token(index.vocabulary[token], { wanted, share: index.shares[at][rank] / 100, examples }));
  }

  function labelOf(at, wanted) {
    const label = index.label?.[at];
    const star = index.starred?.[at] ? html("span", { class: "starred" }, html("span", { class: "spoken" }, "starred"), html("span", { "aria-hidden": "true" }, "★ ")) : null;
    return [star, label ? html("span", { class: "named" }, Text.marked(label, wanted)) : null];
  }

  /** The part of a passage that is searched for, where neither token nor label has it. */
  function snippet(at, wanted) {
    if (matches?.[at][0] !== Selection.MATCH.passage) return null;
    const line = passages[at].split("\n").find((one) => texts.passages[at].includes(wanted) && one.toLowerCase().includes(wanted));
    if (!line) return null;
    const from = Math.max(0, line.toLowerCase().indexOf(wanted) - AROUND);
    const to = from + wanted.length + 2 * AROUND;
    const cut = `${from > 0 ? "…" : ""}${line.slice(from, to)}${to < line.length ? "…" : ""}`;
    return html("span", { class: "snippet" }, Text.marked(cut, wanted));
  }

  function openByClick(event, feature) {
    if (!event.target.closest("a") && !window.getSelection().toString()) window.location.hash = Route.to(feature).slice(1);
  }

  /** Arrow keys, Page up and down, Home and End move among rows while one has the focus. */
  function moveByKey(event) {
    const row = event.target.closest("tr[data-place]");
    const page = Math.max(1, Math.floor(parts.scroll.clientHeight / rowHeight()) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!row || !(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    focusRow(Math.min(nRows() - 1, Math.max(0, Number(row.dataset.place) + steps[event.key])));
  }

  function focusRow(place) {
    const { scroll } = parts;
    const ROW = rowHeight();
    const top = place * ROW;
    const visible = scroll.clientHeight - HEAD;
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

  /** Move the focus to the next row, or to the one before; to the first that is seen if none has it. */
  function step(by) {
    const row = document.activeElement.closest("tr[data-place]");
    const first = Math.ceil(parts.scroll.scrollTop / rowHeight());
    if (places.length) focusRow(Math.min(nRows() - 1, Math.max(0, row ? Number(row.dataset.place) + by : first)));
  }

  /** A feature drawn at random from those shown, another than `other` if there is one. */
  function drawn(other) {
    const own = places.map((at) => index.feature[at]).filter((feature) => feature !== other);
    return own.length ? own[Math.floor(Math.random() * own.length)] : null;
  }

  function focusSearch() {
    filters.focus();
  }

  /** The features before and after one, in the order of the list; by number for one that the list leaves out. */
  function neighbours(feature) {
    const order = places.map((at) => index.feature[at]);
    const own = order.includes(feature) ? order : index.feature;
    const place = own.indexOf(feature);
    return [own[place - 1] ?? null, own[place + 1] ?? null];
  }

  /** A few tokens that tell what a feature is about, or null if the site does not show it. */
  function tokensOf(feature, nTokens = 4) {
    const at = placeOf(feature);
    return at === null ? null : chips(at, nTokens, "");
  }

  /** The label of a feature, or null. */
  const labelled = (feature) => index.label?.[placeOf(feature)] || null;
  const noted = (feature) => index.note?.[placeOf(feature)] || null;
  const starred = (feature) => Boolean(index.starred?.[placeOf(feature)]);

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

  return { open, show, step, drawn, focusSearch, neighbours, tokensOf, labelled, noted, starred, address, redraw };
})();
