"use strict";
// Examples as lines of text centred on their token, coloured by the feature's activation on each token.

const Examples = (() => {
  const { html } = Elements;
  const HOT = 0.65; // from this share on text on a dark page is black, as in tokens.css

  /** One feature's examples, unpacked: per example its facts and its tokens with their activations. */
  function unpack(packed, texts) {
    const values = new Map(packed.fires.map((place, at) => [place, packed.values[at]]));
    const unread = new Set(packed.unread);
    let start = 0;
    return packed.length.map((length, at) => {
      const tokens = [];
      for (let place = start; place < start + length; place += 1) {
        const activation = unread.has(place) ? null : values.get(place) || 0;
        tokens.push({ text: texts[packed.tokens[place]], activation });
      }
      start += length;
      const facts = Object.fromEntries(["kind", "band", "activation", "document", "context", "position"].map((name) => [name, packed[name][at]]));
      return { ...facts, here: packed.before[at], tokens };
    });
  }

  /** A list of examples; `largest` is the end of the colour scale. */
  function list(examples, largest) {
    return html("ol", { class: "examples" }, examples.map((example) => line(example, largest)));
  }

  function line(example, largest) {
    const spans = example.tokens.map((token, place) => tokenSpan(token, largest, place === example.here));
    const item = html("li", { class: "example" });
    const token = example.tokens[example.here].text;
    const button = html("button", {
      type: "button", class: "value", "aria-expanded": "false", onclick: () => toggle(item, button),
      "aria-label": `activation ${Text.number(example.activation)} on ${Text.spoken(token)}: whole passage`,
      onkeydown: (event) => walk(event, example, spans),
      onblur: () => spans.forEach((span) => span.classList.remove("cursor")),
    }, Text.number(example.activation));
    item.append(button,
      html("p", { class: "window" },
        html("span", { class: "before" }, html("span", {}, spans.slice(0, example.here))), spans[example.here],
        html("span", { class: "after" }, spans.slice(example.here + 1))),
      html("span", { class: "origin", "data-tip": `document ${example.document}, context ${example.context}, position ${example.position}` },
        html("span", { class: "spoken" }, "document "), `${example.document}`));
    return item;
  }

  function tokenSpan({ text, activation }, largest, isHere) {
    const share = largest > 0 && activation > 0 ? Math.min(1, activation / largest) : 0;
    const names = ["token"];
    if (isHere) names.push("here");
    if (share) names.push("fires");
    if (share >= HOT) names.push("hot");
    if (activation === null) names.push("unseen");
    return html("span", {
      class: names.join(" "), "--share": share ? Math.max(0.04, share).toFixed(3) : null,
      "data-tip": activation === null ? "not read" : Text.number(activation),
    }, text);
  }

  /** Show the whole window on lines of its own, or the one line again. */
  function toggle(item, button) {
    const isWhole = item.classList.toggle("whole");
    button.setAttribute("aria-expanded", String(isWhole));
  }

  /** While an example has the focus, the left and right arrow keys go through its tokens and tell their values. */
  function walk(event, example, spans) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const at = spans.findIndex((span) => span.classList.contains("cursor"));
    const place = Math.min(spans.length - 1, Math.max(0, (at < 0 ? example.here : at) + step));
    spans.forEach((span, other) => span.classList.toggle("cursor", other === place));
    Tooltip.show(spans[place]);
    Tooltip.say(`${Text.spoken(example.tokens[place].text)} ${spans[place].dataset.tip}`);
  }

  /** Strongest, banded and random examples, each under its heading. */
  function sections(record, texts) {
    if (!record.examples || !record.examples.length.length) return [html("p", { class: "quiet" }, "It fires on none of these tokens.")];
    const examples = unpack(record.examples, texts);
    const largest = record.statistics.max || 0;
    const of = (kind, band) => examples.filter((one) => one.kind === kind && (band === undefined || one.band === band));
    const parts = [section("Strongest examples", of("top"), largest)];
    if (record.bands) {
      const total = record.statistics.n_active / (record.statistics.frequency || 1);
      parts.push(html("section", {}, html("h2", {}, "By strength"),
        record.bands.map((band) => bandSection(band, of("band", band.band), largest, total))));
    }
    const drawn = of("random");
    if (drawn.length) parts.push(section("Random examples", drawn, largest));
    return parts;
  }

  function section(title, examples, largest) {
    const heading = html("div", { class: "headed" }, html("h2", {}, title), html("span", { class: "quiet", "aria-hidden": "true" }, "document"));
    return html("section", {}, heading, list(examples, largest));
  }

  function bandSection(band, examples, largest, nRows) {
    const share = (band.is_exact ? "" : "≈ ") + Text.percent(band.rows / nRows);
    const title = `Between ${Text.number(band.low)} and ${Text.number(band.high)}: ${share}`;
    const body = examples.length ? list(examples, largest) : html("p", { class: "quiet" }, "No examples.");
    return html("details", { class: "band", open: true }, html("summary", {}, title), body);
  }

  return { sections };
})();
