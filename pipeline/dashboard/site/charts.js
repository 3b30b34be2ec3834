"use strict";
// Small pictures, drawn as SVG in units of pixels and stretched to their place.

const Charts = (() => {
  const { html, svg } = Elements;
  const LEVELS = 35; // heights of a sparkline are written 0 to z

  function bars(heights, width, height, tips, names) {
    const step = width / heights.length;
    return heights.map((share, place) => {
      const tall = share > 0 ? Math.max(share * height, 1) : 0;
      const x = place * step;
      const bar = svg("rect", {
        x: x.toFixed(2), y: (height - tall).toFixed(2), width: Math.max(step - 1, 0.8).toFixed(2), height: tall.toFixed(2),
        class: names ? names[place] : "bar",
      });
      if (!tips) return bar;
      // the whole column answers the mouse, so that the lowest bars do too
      const column = svg("rect", { x: x.toFixed(2), y: 0, width: step.toFixed(2), height, class: "column", "data-tip": tips[place] });
      return [bar, column];
    });
  }

  /** A sparkline of characters 0 to z: one path, because the list draws dozens at once. */
  function sparkline(levels) {
    const step = 112 / levels.length;
    const bar = (level, place) => {
      const tall = (parseInt(level, 36) / LEVELS) * 20;
      return tall ? `M${(place * step).toFixed(1)} 20v${-Math.max(tall, 1).toFixed(1)}h${(step - 1).toFixed(1)}V20z` : "";
    };
    return svg("svg", { class: "spark", viewBox: "0 0 112 20", width: 112, height: 20, "aria-hidden": "true" },
      svg("path", { d: [...levels].map(bar).join("") }));
  }

  /**
   * A histogram with ticks below; `ticks` are [share of the width, text]. With `yName`, the unit of its heights, it has an
   * axis of these as well; `yText` writes a height. `xName` says what the ticks below measure.
   */
  function histogram({ counts, label, ticks, tips, names, height = 84, yName = null, yText = Text.count, xName = null }) {
    const highest = Math.max(...counts, 0) || 1;
    const left = yName ? 46 : 0;
    const top = yName ? 18 : 0;
    const width = 400 - left;
    const marks = ticks.map(([share, text]) => {
      const anchor = share < 0.04 ? "start" : share > 0.96 ? "end" : "middle";
      return [
        svg("line", { x1: share * width, x2: share * width, y1: height, y2: height + 4, class: "tick" }),
        svg("text", { x: share * width, y: height + 16, "text-anchor": anchor, class: "label" }, text),
      ];
    });
    const heights = yName ? [
      svg("text", { x: -left, y: -7, class: "label" }, yName),
      [[0, highest], [height, 0]].map(([y, value]) => [
        svg("line", { x1: -4, x2: 0, y1: y, y2: y, class: "tick" }),
        svg("text", { x: -7, y: y + 4, "text-anchor": "end", class: "label" }, yText(value)),
      ]),
    ] : [];
    const below = xName ? svg("text", { x: width / 2, y: height + 31, "text-anchor": "middle", class: "label" }, xName) : [];
    return svg("svg", { class: "chart", viewBox: `0 0 400 ${top + height + (xName ? 36 : 20)}`, role: "img", "aria-label": label },
      svg("g", { transform: `translate(${left} ${top})` },
        bars(counts.map((one) => one / highest), width, height, tips, names),
        svg("line", { x1: 0, x2: width, y1: height, y2: height, class: "axis" }), marks, heights, below));
  }

  /** Ticks at round values of a logarithmic axis; few enough to read. */
  function logTicks(low, high) {
    const from = Math.log10(low);
    const span = Math.log10(high) - from;
    const steps = span > 3 ? [1] : span > 1.2 ? [1, 3] : [1, 2, 3, 5, 7];
    const ticks = [];
    for (let power = Math.floor(from); power <= Math.ceil(from + span); power += 1) {
      for (const step of steps) {
        const share = (Math.log10(step) + power - from) / span;
        if (share >= 0 && share <= 1) ticks.push([share, Text.number(step * 10 ** power, 1)]);
      }
    }
    return ticks;
  }

  /** Ticks at both ends and at zero of a linear axis. */
  function linearTicks(low, high) {
    const ends = [[0, Text.number(low, 2)], [1, Text.number(high, 2)]];
    const zero = -low / (high - low);
    return zero > 0.1 && zero < 0.9 ? [...ends, [zero, "0"]] : ends;
  }

  /** A heat map as a table: a row per layer, a column per head. */
  function heatTable(cells, caption) {
    const nLayers = Math.max(...cells.map(([layer]) => layer)) + 1;
    const nHeads = Math.max(...cells.map(([, head]) => head)) + 1;
    const largest = Math.max(...cells.map(([, , value]) => value)) || 1;
    const values = new Map(cells.map(([layer, head, value]) => [`${layer}.${head}`, value]));
    const cell = (layer, head) => {
      const value = values.get(`${layer}.${head}`);
      if (value === undefined) return html("td", { class: "unknown" }, html("span", { class: "spoken" }, "not among the strongest"));
      const tip = `layer ${layer}, head ${head}: ${Text.number(value)}`;
      return html("td", { "--share": (value / largest).toFixed(2), class: value / largest >= 0.65 ? "hot" : null, "data-tip": tip },
        Text.number(value, 2));
    };
    const heads = [...Array(nHeads).keys()];
    return html("table", { class: "heat" }, html("caption", {}, caption),
      html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "layer"),
        heads.map((head) => html("th", { scope: "col" }, html("span", { class: "spoken" }, "head "), head)))),
      html("tbody", {}, [...Array(nLayers).keys()].map((layer) =>
        html("tr", {}, html("th", { scope: "row" }, layer), heads.map((head) => cell(layer, head))))));
  }

  return { sparkline, histogram, logTicks, linearTicks, heatTable };
})();
