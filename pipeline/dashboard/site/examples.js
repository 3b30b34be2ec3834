"use strict";
// Examples as lines of text centred on their token, coloured by the feature's activation on each token.

const Examples = (() => {
  const { html } = Elements;
  const HOT = 0.65; // from this share on text on a dark page is black, as in tokens.css

  const PART = "◌"; // a token that only begins a character, as in analysis/dashboards/values.py
  const MODES = { line: "one line", text: "passages", code: "code" };
  let mode = "line"; // kept from page to page

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
      return { ...facts, about: packed.about ? packed.about[at] : "", ...joined(tokens, packed.before[at]) };
    });
  }

  /** Tokens with those of one character made one; `here` is the place of the example's own among them. */
  function joined(tokens, here) {
    const boxes = [];
    let parts = [];
    let own = 0;
    tokens.forEach((token, place) => {
      parts.push(token);
      if (place === here) own = boxes.length;
      if (token.text === PART && place + 1 < tokens.length) return;
      boxes.push(parts.length === 1 ? token : together(parts));
      parts = [];
    });
    return { tokens: boxes, here: own };
  }

  function together(parts) {
    const read = parts.map(({ activation }) => activation).filter((activation) => activation !== null);
    const { text, at } = parts.at(-1);
    return { text, at, activation: read.length ? Math.max(...read) : null, parts: parts.map(({ activation }) => activation) };
  }

  /** What pointing at a token shows: its activation; of a character that tokens share, its bytes and theirs. */
  function tip({ text, activation, parts }) {
    const value = (one) => (one === null ? "not read" : Text.number(one));
    if (!parts) return value(activation);
    const character = [...text][0];
    const bytes = [...new TextEncoder().encode(character)].map((byte) => byte.toString(16).toUpperCase().padStart(2, "0"));
    const what = text === PART ? "part of a character" : `${character}: bytes ${bytes.join(" ")}`;
    return `${what} in ${parts.length} tokens: ${parts.map(value).join(", ")}`;
  }

  /**
   * A list of examples. `shown` is the feature, `largest`, the end of its colour scale, and whether `documents` can be
   * asked for.
   */
  function list(examples, shown) {
    return html("ol", { class: "examples" }, examples.map((example) => line(example, shown)));
  }

  function line(example, shown) {
    const { largest } = shown;
    const spans = example.tokens.map((token, place) => tokenSpan(token, largest, place === example.here));
    const item = html("li", { class: "example" });
    const token = example.tokens[example.here].text;
    const button = html("button", {
      type: "button", class: "value", onclick: () => open(item, button, !item.classList.contains("whole")),
      "aria-label": `activation ${Text.number(example.activation)} on ${Text.spoken(token)}: whole passage`,
      onkeydown: (event) => walk(event, example, spans),
      onblur: () => spans.forEach((span) => span.classList.remove("cursor")),
    }, Text.number(example.activation));
    const window = html("p", { class: "window" },
      html("span", { class: "before" }, html("span", {}, spans.slice(0, example.here))), spans[example.here],
      html("span", { class: "after" }, spans.slice(example.here + 1)));
    item.append(button, window, origin(example, shown, item));
    if (example.about) item.append(html("p", { class: "quiet about" }, example.about));
    open(item, button, mode !== "line");
    return item;
  }

  /** Where an example is from; a button that opens the document, where there is a server of the tables to ask. */
  function origin(example, shown, item) {
    const where = `document ${example.document}, context ${example.context}, position ${example.position}`;
    const inner = [html("span", { class: "spoken" }, "document "), `${example.document}`];
    if (!shown.documents) return html("span", { class: "origin", "data-tip": where }, inner);
    const button = html("button", {
      type: "button", class: "origin", "aria-expanded": "false", "data-tip": `${where}: show the document`,
      onclick: () => toggleDocument(example, shown, item, button),
    }, inner);
    return button;
  }

  async function toggleDocument(example, { feature, largest }, item, button) {
    const old = item.querySelector(".document");
    button.setAttribute("aria-expanded", String(!old));
    if (old) {
      old.remove();
      return;
    }
    const box = html("div", { class: "document", tabindex: "0", role: "region", "aria-label": `document ${example.document}` }, "…");
    item.append(box);
    try {
      const found = await Data.document(feature, example);
      box.replaceChildren(...documentText(found, largest));
      const here = box.querySelector(".here");
      if (here) box.scrollTop = here.offsetTop - box.clientHeight / 2;
    } catch (error) {
      box.replaceChildren(error.message);
    }
  }

  /** A document's text; where the split lacks a part of it, or more would be too much, stands a gap. */
  function documentText({ tokens, values, here, gaps }, largest) {
    const missing = new Set(gaps);
    const gap = () => html("span", { class: "gap", "data-tip": "not in this split, or left out" }, " … ");
    const boxes = joined(tokens.map((text, at) => ({ text, activation: values[at] ?? 0, at })), here);
    const spans = boxes.tokens.map((token, place) => {
      const first = token.parts ? token.at - token.parts.length + 1 : token.at;
      return [missing.has(first) ? gap() : null, tokenSpan(token, largest, place === boxes.here)];
    });
    return [...spans, missing.has(tokens.length) ? gap() : null].flat().filter((span) => span !== null);
  }

  function tokenSpan(token, largest, isHere) {
    const { text, activation } = token;
    const share = largest > 0 && activation > 0 ? Math.min(1, activation / largest) : 0;
    const names = ["token"];
    if (isHere) names.push("here");
    if (share) names.push("fires");
    if (share >= HOT) names.push("hot");
    if (activation === null) names.push("unseen");
    return html("span", {
      class: names.join(" "), "--share": share ? Math.max(0.04, share).toFixed(3) : null,
      "data-tip": tip(token),
    }, lines(text));
  }

  /** A token's text, the signs of line ends by themselves: where code is shown, lines end there. */
  function lines(text) {
    return text.includes("⏎") ? text.split(/(⏎)/).map((part) => (part === "⏎" ? html("span", { class: "eol" }, part) : part)) : text;
  }

  /** Show the whole window on lines of its own, or the one line again. */
  function open(item, button, isWhole) {
    item.classList.toggle("whole", isWhole);
    button.setAttribute("aria-expanded", String(isWhole));
  }

  /** The choice of how all examples are shown. */
  function modes(sections) {
    const choose = (name) => {
      mode = name;
      for (const section of sections) {
        section.classList.toggle("code", name === "code");
        for (const item of section.querySelectorAll(".example")) open(item, item.querySelector(".value"), name !== "line");
      }
    };
    for (const section of sections) section.classList.toggle("code", mode === "code");
    const one = ([value, text]) => html("label", {},
      html("input", { type: "radio", name: "mode", value, checked: mode === value, onchange: () => choose(value) }), html("span", {}, text));
    return html("fieldset", { class: "field choice modes" }, html("legend", { class: "spoken" }, "Show examples as"),
      html("div", { class: "segments" }, Object.entries(MODES).map(one)));
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
  function sections(feature, record, texts, about, note) {
    if (!record.examples || !record.examples.length.length) return [html("p", { class: "quiet" }, "It fires on none of these tokens.")];
    const examples = unpack(record.examples, texts);
    const shown = { feature, largest: record.statistics.max || 0, documents: about.documents };
    const of = (kind, band) => examples.filter((one) => one.kind === kind && (band === undefined || one.band === band));
    const parts = [section("Strongest examples", of("top"), shown)];
    if (record.bands) {
      const total = record.statistics.n_active / (record.statistics.frequency || 1);
      parts.push(html("section", {}, html("h2", {}, "By strength ", Terms.term("band", "in bands")),
        record.bands.map((band) => bandSection(band, of("band", band.band), shown, total))));
    }
    const drawn = of("random");
    if (drawn.length) parts.push(section("Random examples", drawn, shown));
    return [html("div", { class: "bar-above" }, note, modes(parts)), ...parts];
  }

  function section(title, examples, shown) {
    const heading = html("div", { class: "headed" }, html("h2", {}, title), html("span", { class: "quiet", }, Terms.term("document")));
    return html("section", {}, heading, list(examples, shown));
  }

  function bandSection(band, examples, shown, nRows) {
    const share = (band.is_exact ? "" : "≈ ") + Text.percent(band.rows / nRows);
    const title = `Between ${Text.number(band.low)} and ${Text.number(band.high)}: ${share}`;
    const body = examples.length ? list(examples, shown) : html("p", { class: "quiet" }, "No examples.");
    return html("details", { class: "band", open: true }, html("summary", {}, title), body);
  }

  return { unpack, tip, sections };
})();
