"use strict";
// Numbers and tokens as they are written on the pages.

const Text = (() => {
  const { html } = Elements;

  /** A number to a few significant digits, with a real minus sign. */
  function number(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    let text;
    if (size >= 1e5 || size < 1e-3) text = value.toExponential(digits - 1).replace("e+", "e");
    else text = value.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
    return text.replace("-", "−");
  }

  function signed(value, digits = 3) {
    return value > 0 ? "+" + number(value, digits) : number(value, digits);
  }

  /** A share as a percentage. */
  function percent(share, digits = 3) {
    if (share === null || share === undefined) return "–";
    return number(share * 100, digits) + " %";
  }

  function count(value) {
    return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en");
  }

  /** A number of things: "1 document", "3 documents". */
  const several = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

  /** A text in which what is searched for is marked, as nodes; `wanted` is in lower case, or empty. */
  function marked(text, wanted) {
    const lower = text.toLowerCase();
    const at = wanted && lower.length === text.length ? lower.indexOf(wanted) : -1;
    if (at < 0) return wanted && lower.includes(wanted) ? [html("mark", {}, text)] : [text];
    const end = at + wanted.length;
    return [text.slice(0, at), html("mark", {}, text.slice(at, end)), text.slice(end)];
  }

  /** A token on its own: in a frame, the spaces at its ends to be seen; the larger its share (0 to 1), the stronger. */
  function token(text, { share = null, examples = 0, wanted = "" } = {}) {
    const inner = text.replace(/^ +| +$/g, "");
    const before = text.length - text.replace(/^ +/, "").length;
    const after = inner ? text.length - text.replace(/ +$/, "").length : 0;
    const space = (length) => (length ? html("span", { class: "space" }, "␣".repeat(length)) : null);
    const tip = share === null ? {} : { "--share": share.toFixed(2), "data-tip": `${percent(share, 2)} of ${several(examples, "strongest example")}` };
    return html("span", { class: "chip", ...tip }, space(before), marked(inner, wanted), space(after));
  }

  /** A token in a sentence for those who listen. */
  function spoken(text) {
    return `“${text}”`;
  }

  return { number, signed, percent, count, several, marked, token, spoken };
})();
