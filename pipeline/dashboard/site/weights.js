"use strict";
// What a feature is connected with by its weights: tokens it reads and writes, heads it reads through, other features.

const Weights = (() => {
  const { html } = Elements;

  /** A table of tokens and weights; `scale` is the weight of the strongest colour, the same for both signs. */
  function tokenTable(caption, pairs, texts, scale) {
    const row = ([token, weight]) =>
      html("tr", {}, html("th", { scope: "row" }, Text.token(texts[token])), weightCell(weight, scale));
    return html("table", { class: "pairs" }, html("caption", {}, Terms.term(caption)), headings("token", "weight"),
      html("tbody", {}, pairs.map(row)));
  }

  /** Column headings for those who cannot see what the columns hold. */
  function headings(...names) {
    return html("thead", { class: "spoken" }, html("tr", {}, names.map((name) => html("th", { scope: "col" }, name))));
  }

  function weightCell(weight, scale) {
    const share = scale > 0 ? Math.min(1, Math.abs(weight) / scale) : 0;
    return html("td", { class: weight < 0 ? "weight negative" : "weight positive", "--share": share.toFixed(2) }, Text.signed(weight));
  }

  const strongest = (...lists) => Math.max(0, ...lists.flat().map(([, weight]) => Math.abs(weight)));

  /** The tokens at both ends of a list, side by side, on one scale of colours. */
  function bothEnds(ends, texts, topName, bottomName) {
    const scale = strongest(ends.top, ends.bottom);
    return html("div", { class: "ends" },
      tokenTable(topName, ends.top, texts, scale), tokenTable(bottomName, ends.bottom, texts, scale));
  }

  function featureLink(feature) {
    const tokens = List.tokensOf(feature);
    if (tokens === null) return html("span", {}, String(feature)); // not part of this site
    return html("a", { href: Route.to(feature) }, String(feature), " ", tokens);
  }

  /** A table of this site's features, each with numbers. */
  function featureTable(caption, names, rows) {
    return html("table", { class: "pairs" }, caption ? html("caption", {}, caption) : null,
      html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "feature"), names.map((name) => html("th", { scope: "col", class: "number" }, Terms.term(name))))),
      html("tbody", {}, rows.map(([feature, ...values]) =>
        html("tr", {}, html("th", { scope: "row" }, featureLink(feature)), values.map((value) => html("td", { class: "number" }, value))))));
  }

  function logits(found, texts) {
    if (!found) return null;
    const parts = [html("h2", {}, "Output tokens"), bothEnds(found, texts, "promotes", "suppresses")];
    if (found.histogram) {
      parts.push(html("p", { class: "quiet below" }, Terms.term("logit effect", "Effects"), " on all tokens; counts on a log scale."));
      const { counts, edges } = found.histogram;
      const names = counts.map((_, bin) => (edges[bin] + edges[bin + 1] < 0 ? "bar negative" : "bar positive"));
      const tips = counts.map((count, bin) => `${Text.number(edges[bin])} to ${Text.number(edges[bin + 1])}: ${Text.count(count)} tokens`);
      parts.push(Charts.histogram({
        counts: counts.map((count) => Math.log10(count + 1)), names, tips, height: 56,
        label: `Logits of all tokens, from ${Text.number(edges[0])} to ${Text.number(edges.at(-1))}, log scale of tokens`,
        ticks: Charts.linearTicks(edges[0], edges.at(-1)),
      }));
    }
    return html("section", { class: "card" }, parts);
  }

  function nearest(pairs) {
    if (!pairs || !pairs.length) return null;
    const rows = pairs.map(([feature, cosine]) => [feature, Text.number(cosine, 2)]);
    return html("section", { class: "card" }, html("h2", {}, "Nearest decoders"), featureTable(null, ["cosine"], rows));
  }

  function coactive(found) {
    if (!found || !found.length) return null;
    const rows = found.map(([feature, phi, jaccard, both]) => [feature, Text.number(phi, 2), Text.number(jaccard, 2), Text.count(both)]);
    return html("section", { class: "card" }, html("h2", {}, "Fires together with"), featureTable(null, ["φ", "Jaccard", "tokens"], rows));
  }

  /** The most similar features of other tables of the site: [which, measure, feature, similarity, what it is about]. */
  function similar(pairs) {
    if (!pairs || !pairs.length) return null;
    const rows = pairs.map(([at, measure, feature, value, about]) => html("tr", {},
      html("th", { scope: "row" }, html("a", { href: Sites.to(at, feature) }, `${at} · ${feature}`), about ? [" ", Text.token(about)] : null),
      html("td", {}, measure === "cosine" ? "decoder cosine" : "φ of firing"),
      html("td", { class: "number" }, Text.number(value, 2))));
    return html("section", { class: "card" }, html("h2", {}, "Most similar elsewhere"),
      html("table", { class: "pairs" }, headings("feature", "by", "similarity"), html("tbody", {}, rows)));
  }

  function inputTokens(connections, texts) {
    const tokens = connections?.tokens;
    if (!tokens || tokens.top.length + tokens.bottom.length + (tokens.n_absent ?? 0) === 0) return null;
    const absent = tokens.n_absent ? `${Text.several(tokens.n_absent, "token")} left out: they occur nowhere in the text analysed.` : null;
    return html("section", { class: "card" }, html("h2", {}, "Input tokens"),
      html("p", { class: "quiet" }, Terms.term("de-embedding", "De-embedding"), ": the tokens whose embeddings the encoder reads most, whatever the text."),
      tokens.top.length + tokens.bottom.length ? bothEnds(tokens, texts, "read", "read against") : null,
      absent ? html("p", { class: "quiet below" }, absent) : null);
  }

  /** Folded: a table of layers times heads is as large as all the rest, and few need it. */
  function heads(connections, texts) {
    if (!connections || !connections.heads.length) return null;
    const through = connections.head_tokens.map(({ layer, head, top }) =>
      tokenTable(`through layer ${layer}, head ${head}`, top, texts, strongest(top)));
    const [layer, head] = connections.heads[0];
    return html("details", { class: "card wide" },
      html("summary", {}, html("h2", {}, "Attention heads"), html("span", { class: "quiet" }, ` strongest: layer ${layer}, head ${head}`)),
      html("p", { class: "quiet" }, "How strongly each head can carry what the encoder reads (", Terms.term("head norm"), "), and the tokens it carries best."),
      html("div", { class: "heads" },
        html("div", { class: "scroll-x", tabindex: "0", role: "group", "aria-label": "norms by layer and head" },
          Charts.heatTable(connections.heads, "norm, by layer and head")),
        html("div", { class: "ends" }, through)));
  }

  function later(connections) {
    if (!connections || !connections.later.length) return null;
    const one = ({ site, top, bottom }) => {
      const scale = strongest(top, bottom);
      const table = (caption, pairs) =>
        html("table", { class: "pairs" }, html("caption", {}, caption), headings("feature", "weight"),
          html("tbody", {}, pairs.map(([feature, weight]) =>
            html("tr", {}, html("th", { scope: "row" }, `${site} · ${feature}`), weightCell(weight, scale)))));
      return html("div", { class: "ends" }, table(`excites in ${site}`, top), table(`inhibits in ${site}`, bottom));
    };
    return html("section", { class: "card" }, html("h2", {}, "Later features"), connections.later.map(one));
  }

  return { logits, nearest, similar, coactive, inputTokens, heads, later };
})();
