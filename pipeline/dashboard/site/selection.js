"use strict";
// Which features the list shows and in what order: pure functions of the index and of what was chosen.

const Selection = (() => {
  const DEFAULTS = { q: "", show: "live", sort: "feature", min: null, max: null };
  const SORTS = {
    feature: (index) => index.feature,
    frequency: (index) => index.frequency,
    max: (index) => index.max,
    mean: (index) => index.mean,
  };

  /** Read what was chosen from the part of an address after the #. */
  function parse(text) {
    const given = new URLSearchParams(text);
    const number = (name) => (given.get(name) && Number.isFinite(Number(given.get(name))) ? Number(given.get(name)) : null);
    const sort = given.get("sort") || DEFAULTS.sort;
    return {
      q: given.get("q") || "",
      show: ["live", "dead", "dense", "all"].includes(given.get("show")) ? given.get("show") : DEFAULTS.show,
      sort: Object.hasOwn(SORTS, sort.replace("-", "")) ? sort : DEFAULTS.sort,
      min: number("min"),
      max: number("max"),
    };
  }

  /** Write it back, leaving out what is as at the beginning. */
  function format(chosen) {
    const given = new URLSearchParams();
    for (const [name, value] of Object.entries(chosen)) {
      if (value !== DEFAULTS[name] && value !== null) given.set(name, value);
    }
    return given.toString();
  }

  /** What is searched of every feature, made once. */
  function searchTexts(index) {
    const texts = index.vocabulary.map((text) => text.toLowerCase());
    return index.feature.map((_, place) => {
      const own = [...index.tokens[place], ...(index.promoted ? index.promoted[place] : [])];
      return own.map((token) => texts[token]).join("\n");
    });
  }

  /** A function that tells whether a feature, by its place in the index, is searched for. */
  function matcher(index, texts, query) {
    const wanted = query.toLowerCase();
    const digits = wanted.trim();
    if (!digits) return () => true;
    const whole = wanted.match(/^\s*"(.*)"\s*$/);
    if (whole) return (place) => texts[place].split("\n").includes(whole[1]);
    const needle = wanted.replace(/\s+$/, "");
    const isNumber = /^\d+$/.test(digits);
    return (place) => texts[place].includes(needle) || (isNumber && String(index.feature[place]) === digits);
  }

  /** Places in the index of the features to show, in order; `texts` may be null where nothing is searched for. */
  function select(index, texts, chosen) {
    const matches = matcher(index, texts, chosen.q);
    const low = chosen.min === null ? -Infinity : 10 ** chosen.min;
    const high = chosen.max === null ? Infinity : 10 ** chosen.max;
    const isShown = {
      all: () => true,
      live: (place) => index.frequency[place] > 0,
      dead: (place) => index.frequency[place] === 0,
      dense: (place) => index.is_dense[place] === 1,
    }[chosen.show];
    const places = [];
    for (let place = 0; place < index.feature.length; place += 1) {
      const frequency = index.frequency[place];
      if (isShown(place) && frequency >= low && frequency <= high && matches(place)) places.push(place);
    }
    return sorted(places, SORTS[chosen.sort.replace("-", "")](index), chosen.sort.startsWith("-"));
  }

  /** Sort by a column; features without a value come last either way, equal ones by index. */
  function sorted(places, column, isFalling) {
    const sign = isFalling ? -1 : 1;
    return places.sort((one, other) => {
      const [a, b] = [column[one], column[other]];
      if (a === null || b === null) return (a === null) - (b === null) || one - other;
      return sign * (a - b) || one - other;
    });
  }

  return { DEFAULTS, parse, format, searchTexts, select };
})();
