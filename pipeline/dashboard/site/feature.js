"use strict";
// The page of one feature.

const Feature = (() => {
  const { html } = Elements;
  const { term } = Terms;
  const root = document.getElementById("feature");
  const FEW_DOCUMENTS = 3;

  /** Draw the page; the focus goes to its heading. */
  function show(feature, { record, texts }, about) {
    const heading = html("h1", { tabindex: "-1" }, `Feature ${feature}`);
    const cards = present([
      histogram(record), Weights.logits(record.logits, texts), Weights.inputTokens(record.connections, texts),
      Weights.nearest(record.nearest), Weights.similar(record.similar), Weights.coactive(record.coactive), positions(record), Weights.later(record.connections),
    ]);
    const isDead = record.statistics.is_dead;
    root.replaceChildren(navigation(feature),
      html("header", { class: "top" }, heading, subject(feature, record), noted(feature), statistics(record.statistics)),
      ...(isDead ? [deadNote(record.statistics, about), html("div", { class: "cards spread" }, cards)] : [
        html("div", { class: "columns" }, html("div", { class: "lines" }, Examples.sections(feature, record, texts, about, documentsNote(record.examples))),
          html("div", { class: "cards" }, cards))]),
      ...present([Weights.heads(record.connections, texts)]));
    root.dispatchEvent(new CustomEvent("drawn", { detail: { feature, record } }));
    root.hidden = false;
    window.scrollTo(0, 0);
    heading.focus({ preventScroll: true });
  }

  const present = (parts) => parts.filter((part) => part !== null);

  function navigation(feature) {
    const [before, after] = List.neighbours(feature);
    const list = List.address();
    return html("nav", { "aria-label": "Features" }, Sites.control(),
      html("a", { href: list ? `#${list}` : "#", class: "back" }, "← all features"),
      html("span", { class: "actions" }, Keys.buttons(true)),
      html("span", { class: "step" }, before === null ? null : html("a", { href: Route.to(before), rel: "prev" }, `‹ ${before}`),
        after === null ? null : html("a", { href: Route.to(after), rel: "next" }, `${after} ›`)));
  }

  function subject(feature, record) {
    const flags = [["is_dead", "dead"], ["is_dense", "dense"]].filter(([name]) => record.statistics[name]);
    const label = List.labelled(feature);
    return html("p", { class: "subject" }, List.starred(feature) ? html("span", { class: "starred" }, "★") : null, label ? html("span", { class: "named" }, label) : null, List.tokensOf(feature, 8),
      flags.map(([, name]) => html("span", { class: "flag" }, term(name))));
  }

  function noted(feature) {
    const note = List.noted(feature);
    return note ? html("p", { class: "noted" }, note) : null;
  }

  function statistics(found) {
    const interval = found.frequency_low === undefined ? null : `${Text.number(found.frequency_low * 100)} to ${Text.percent(found.frequency_high)}`;
    const p90 = (found.p90 ?? null) === null ? null : [term("p90"), ` ${Text.number(found.p90)}`];
    const entries = [
      ["frequency", Text.percent(found.frequency), interval],
      ["fires on", `${Text.count(found.n_active)}`, "tokens"],
      ["max", Text.number(found.max), null],
      ["mean", Text.number(found.mean), found.std === null ? null : `± ${Text.number(found.std, 2)}`],
      ["median", Text.number(found.p50), p90],
      // none are known where no activations were kept
      ["distinct tokens", (found.n_token_ids ?? null) === null ? undefined : Text.count(found.n_token_ids), Text.percent(found.token_id_share, 2)],
      ["decoder norm", Text.number(found.decoder_norm), null],
      ["encoder norm", Text.number(found.encoder_norm), null],
      ["encoder bias", Text.number(found.encoder_bias), null],
    ];
    const word = (name) => (name === "fires on" ? term("activation", name) : term(name));
    return html("dl", { class: "statistics" }, entries.filter(([, value]) => value !== undefined).map(([name, value, note]) =>
      html("div", {}, html("dt", {}, word(name)), html("dd", {}, value, note === null ? null : html("small", {}, " ", note)))));
  }

  /** A warning where what is seen may be of a few texts rather than of the language. */
  function documentsNote(examples) {
    const documents = [...new Set(examples?.document ?? [])].sort((a, b) => a - b);
    const nExamples = examples?.document.length ?? 0;
    if (!documents.length || documents.length > FEW_DOCUMENTS || nExamples <= documents.length) return null;
    const names = documents.map((document) => Text.count(document)).join(", ");
    return html("p", { class: "warning" }, `From ${Text.several(documents.length, "document")} only (${names}): `,
      `what its ${nExamples} examples share may be these texts.`);
  }

  /** Why a feature is dead, and how close to firing it is known to be. */
  function deadNote(found, about) {
    const atMost = found.frequency_high === undefined ? null
      : ` So it may still fire on other text: on up to ${Text.percent(found.frequency_high, 2)} of tokens, at 95 % confidence.`;
    return html("section", { class: "dead" }, html("h2", {}, "Why there are no examples"),
      html("p", {}, `Its activation was above zero on none of the ${Text.count(about.layer.n_rows)} tokens analysed.`, atMost),
      html("p", {}, "How close it came is not in the tables, which keep activations above zero. What is known: its ",
        term("encoder bias"), ` is ${Text.number(found.encoder_bias)} and its `, term("encoder norm"), ` ${Text.number(found.encoder_norm)}, `,
        "so it can fire where the input's component along the encoder row exceeds ", distance(found),
        about.architecture?.k ? ", if it is then among the strongest, which are kept." : "."));
  }

  /** How far an input must go along the encoder row, whose bias must be outweighed. */
  function distance({ encoder_bias: bias, encoder_norm: norm }) {
    if (!norm) return "any length";
    return Text.number(Math.max(0, -bias / norm));
  }

  function histogram(record) {
    if (!record.histogram) return null;
    const { counts, edges } = record.histogram;
    const tips = counts.map((count, bin) => `${Text.number(edges[bin])} to ${Text.number(edges[bin + 1])}: ${Text.several(count, "token")}`);
    return html("section", { class: "card" }, html("h2", {}, "Activations"), Charts.histogram({
      counts, tips, label: `Activations from ${Text.number(edges[0])} to ${Text.number(edges.at(-1))}, log scale, in ${counts.length} bins of tokens`,
      ticks: Charts.logTicks(edges[0], edges.at(-1)), yName: "tokens", xName: "activation, log scale",
    }));
  }

  function positions(record) {
    if (!record.positions || record.statistics.is_dead) return null;
    const { edges, shares } = record.positions;
    const tips = shares.map((share, bin) => `positions ${edges[bin]} to ${edges[bin + 1] - 1}: ${Text.percent(share)}`);
    return html("section", { class: "card" }, html("h2", {}, "Frequency by position"), Charts.histogram({
      counts: shares.map((share) => share ?? 0), tips, height: 48, label: `Frequency in ${shares.length} parts of the context, from its start to its end`,
      ticks: [[0, String(edges[0])], [1, String(edges.at(-1))]], yName: "frequency", yText: (value) => Text.percent(value, 2), xName: "position in the context",
    }));
  }

  return { show };
})();
