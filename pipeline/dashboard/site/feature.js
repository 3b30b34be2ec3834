"use strict";
// The page of one feature.

const Feature = (() => {
  const { html } = Elements;
  const root = document.getElementById("feature");

  /** Draw the page; the focus goes to its heading. */
  function show(feature, { record, texts }) {
    const heading = html("h1", { tabindex: "-1" }, `Feature ${feature}`);
    root.replaceChildren(navigation(feature), html("header", { class: "top" }, heading, subject(feature, record), statistics(record.statistics)),
      html("div", { class: "columns" },
        html("div", { class: "lines" }, Examples.sections(record, texts)),
        html("div", { class: "cards" }, present([
          histogram(record), Weights.logits(record.logits, texts), Weights.inputTokens(record.connections, texts),
          Weights.nearest(record.nearest), Weights.coactive(record.coactive), positions(record), Weights.later(record.connections),
        ]))),
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
      html("span", { class: "step" }, before === null ? null : html("a", { href: Route.to(before), rel: "prev" }, `‹ ${before}`),
        after === null ? null : html("a", { href: Route.to(after), rel: "next" }, `${after} ›`)));
  }

  function subject(feature, record) {
    const tokens = List.tokensOf(feature, 8) || [];
    const flags = [["is_dead", "dead"], ["is_dense", "dense"]].filter(([name]) => record.statistics[name]);
    return html("p", { class: "subject" }, tokens.map(Text.token), flags.map(([, name]) => html("span", { class: "flag" }, name)));
  }

  function statistics(found) {
    const interval = found.frequency_low === undefined ? null : `${Text.number(found.frequency_low * 100)} to ${Text.percent(found.frequency_high)}`;
    const entries = [
      ["frequency", Text.percent(found.frequency), interval],
      ["fires on", `${Text.count(found.n_active)}`, "tokens"],
      ["max", Text.number(found.max), null],
      ["mean", Text.number(found.mean), found.std === null ? null : `± ${Text.number(found.std, 2)}`],
      ["median", Text.number(found.p50), (found.p90 ?? null) === null ? null : `p90 ${Text.number(found.p90)}`],
      // none are known where no activations were kept
      ["distinct tokens", (found.n_token_ids ?? null) === null ? undefined : Text.count(found.n_token_ids), Text.percent(found.token_id_share, 2)],
      ["decoder norm", Text.number(found.decoder_norm), null],
      ["encoder norm", Text.number(found.encoder_norm), null],
      ["bias", Text.number(found.encoder_bias), null],
    ];
    return html("dl", { class: "statistics" }, entries.filter(([, value]) => value !== undefined).map(([name, value, note]) =>
      html("div", {}, html("dt", {}, name), html("dd", {}, value, note === null ? null : html("small", {}, ` ${note}`)))));
  }

  function histogram(record) {
    if (!record.histogram) return null;
    const { counts, edges } = record.histogram;
    const tips = counts.map((count, bin) => `${Text.number(edges[bin])} to ${Text.number(edges[bin + 1])}: ${Text.count(count)} tokens`);
    return html("section", { class: "card" }, html("h2", {}, "Activations"), Charts.histogram({
      counts, tips, label: `Activations from ${Text.number(edges[0])} to ${Text.number(edges.at(-1))}, log scale, in ${counts.length} bins of tokens`,
      ticks: Charts.logTicks(edges[0], edges.at(-1)),
    }));
  }

  function positions(record) {
    if (!record.positions) return null;
    const { edges, shares } = record.positions;
    const tips = shares.map((share, bin) => `positions ${edges[bin]} to ${edges[bin + 1] - 1}: ${Text.percent(share)}`);
    return html("section", { class: "card" }, html("h2", {}, "Frequency by position"), Charts.histogram({
      counts: shares.map((share) => share ?? 0), tips, height: 48, label: `Frequency in ${shares.length} parts of the context, from its start to its end`,
      ticks: [[0, String(edges[0])], [1, String(edges.at(-1))]],
    }));
  }

  return { show };
})();
