"use strict";
// The form above the list: search, which features, and a range of frequencies chosen on their histogram.

const Filters = (() => {
  const { html, svg } = Elements;
  const SHOW = { live: "live", dead: "dead", dense: "dense", all: "all" };
  const STEP = 0.05; // of log₁₀ frequency
  const BINS = 64;

  /** Make the form; `changed` is called with what is chosen then. */
  function form(index, chosen, changed) {
    const current = { ...chosen };
    const set = (values) => {
      Object.assign(current, values);
      changed({ ...current });
    };
    const search = html("input", {
      type: "search", id: "search", name: "q", value: current.q, autocomplete: "off", spellcheck: "false",
      placeholder: "token, text, or feature number", oninput: () => set({ q: search.value }),
    });
    const count = html("p", { class: "count", role: "status" });
    const range = frequencyRange(index, current, set);
    const more = html("button", { type: "button", class: "action more", "aria-expanded": "false", onclick: () => {
      more.setAttribute("aria-expanded", String(element.classList.toggle("opened")));
    } }, "filters");
    const element = html("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
      html("div", { class: "field" },
        html("label", { for: "search" }, "Search"), search), more,
      radios(current, set), range.element, count);

    /** Show what was chosen elsewhere, e.g. by the back button. */
    function update(values, nShown, isRanked) {
      Object.assign(current, values);
      if (document.activeElement !== search) search.value = current.q;
      for (const radio of element.querySelectorAll("input[type=radio]")) radio.checked = radio.value === current.show;
      range.update();
      count.textContent = `${Text.count(nShown)} of ${Text.count(index.feature.length)} features${isRanked && nShown > 1 ? ", best match first" : ""}`;
    }

    function focus() {
      search.focus();
      search.select();
    }

    return { element, update, focus };
  }

  function radios(current, set) {
    const one = ([value, text]) =>
      html("label", {},
        html("input", { type: "radio", name: "show", value, checked: current.show === value, onchange: () => set({ show: value }) }),
        html("span", {}, text));
    return html("fieldset", { class: "field choice" }, html("legend", {}, "Show"),
      html("div", { class: "segments" }, Object.entries(SHOW).map(one)));
  }

  function frequencyRange(index, current, set) {
    const live = index.frequency.filter((frequency) => frequency > 0).map(Math.log10);
    const lowest = live.length ? Math.floor(live.reduce((a, b) => Math.min(a, b)) * 2) / 2 : -5;
    const name = (exponent) => Text.percent(10 ** exponent, 2);
    const slider = (label, key) => {
      const input = html("input", {
        type: "range", min: lowest, max: 0, step: STEP, class: "slider", "aria-label": label,
        oninput: () => set(read(key, Number(input.value))),
      });
      return input;
    };
    const read = (key, value) => {
      if (key === "min") return { min: value <= lowest ? null : Math.min(value, current.max ?? 0) };
      return { max: value >= 0 ? null : Math.max(value, current.min ?? lowest) };
    };
    const [low, high] = [slider("lowest frequency", "min"), slider("highest frequency", "max")];
    const text = html("span", { class: "range-text", "aria-hidden": "true" });
    const [picture, colour] = frequencyHistogram(live, lowest);

    function update() {
      const [from, to] = [current.min ?? lowest, current.max ?? 0];
      [low.value, high.value] = [from, to];
      low.setAttribute("aria-valuetext", current.min === null ? "no limit" : name(from));
      high.setAttribute("aria-valuetext", current.max === null ? "no limit" : name(to));
      text.textContent = current.min === null && current.max === null ? "any" : `${name(from)} to ${name(to)}`;
      colour(from, to);
    }

    const element = html("fieldset", { class: "field range" },
      html("legend", {}, Terms.term("frequency", "Frequency"), " ", text), html("div", { class: "sliders" }, picture, low, high));
    update();
    return { element, update };
  }

  /** The histogram behind the sliders, and a function that marks what lies between two exponents. */
  function frequencyHistogram(live, lowest) {
    const counts = new Array(BINS).fill(0);
    for (const exponent of live) counts[Math.min(BINS - 1, Math.floor(((exponent - lowest) / -lowest) * BINS))] += 1;
    const highest = counts.reduce((a, b) => Math.max(a, b), 1);
    const rects = counts.map((count, place) => {
      const height = count ? Math.max(1, (count / highest) * 30) : 0;
      return svg("rect", { x: (place * 240) / BINS, y: 30 - height, width: 240 / BINS - 1, height });
    });
    const picture = svg("svg", { viewBox: "0 0 240 30", class: "frequencies", "aria-hidden": "true", preserveAspectRatio: "none" }, rects);
    const colour = (from, to) => {
      rects.forEach((rect, place) => {
        const middle = lowest - (lowest * (place + 0.5)) / BINS;
        rect.classList.toggle("outside", middle < from || middle > to);
      });
    };
    return [picture, colour];
  }

  return { form };
})();
