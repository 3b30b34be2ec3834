"use strict";
// Which features the list shows and in what order: pure functions of the index and of what was chosen.

const Selection = (() => {
  const DEFAULTS = { q: "", show: "live", sort: "-interest", min: null, max: null };
  const COLUMNS = ["feature", "interest", "frequency", "max", "mean"];
  /** What a search matches, the best first; the numbers order its results. */
  const MATCH = { number: 0, whole: 1, prefix: 2, part: 3, promoted: 4, passage: 5, label: 6 };

  /** Read what was chosen from the part of an address after the #. */
  function parse(text) {
    const given = new URLSearchParams(text);
    const number = (name) => (given.get(name) && Number.isFinite(Number(given.get(name))) ? Number(given.get(name)) : null);
    const sort = given.get("sort") || DEFAULTS.sort;
    return {
      q: given.get("q") || "",
      show: ["live", "dead", "dense", "all"].includes(given.get("show")) ? given.get("show") : DEFAULTS.show,
      sort: COLUMNS.includes(sort.replace("-", "")) ? sort : DEFAULTS.sort,
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

  const plain = (text) => text.normalize("NFC").toLowerCase();

  /** What is searched of every feature, made once; `passages` may be null while they are not loaded. */
  function searchTexts(index, passages) {
    return {
      vocabulary: index.vocabulary.map(plain),
      labels: index.label ? index.label.map((label, place) => plain(`${label ?? ""} ${index.note?.[place] ?? ""}`)) : null,
      passages: passages ? passages.map(plain) : null,
    };
  }

  /** What is looked for: in lower case, literally; between quotes a whole token with its spaces. */
  function wanted(query) {
    const text = plain(query);
    const quoted = text.match(/^\s*"(.*)"\s*$/);
    return quoted ? { text: quoted[1], isWhole: true } : { text: text.trimEnd(), isWhole: false };
  }

  /** How every text of the vocabulary matches: 0 not at all, else one of whole, prefix and part. */
  function tokenMatches(vocabulary, { text, isWhole }) {
    const found = new Uint8Array(vocabulary.length);
    vocabulary.forEach((token, at) => {
      const own = isWhole || text.startsWith(" ") ? token : token.trim();
      if (own === text) found[at] = MATCH.whole;
      else if (!isWhole && own.startsWith(text)) found[at] = MATCH.prefix;
      else if (!isWhole && own.includes(text)) found[at] = MATCH.part;
    });
    return found;
  }

  /** Each feature's best match by its place in the index, as [which, examples at what matches], or undefined. */
  function search(index, texts, query) {
    const looked = wanted(query);
    const matches = tokenMatches(texts.vocabulary, looked);
    const number = query.trim();
    return index.feature.map((feature, place) => {
      if (String(feature) === number) return [MATCH.number, 1];
      return bestToken(index, matches, place) ?? otherMatch(index, texts, matches, looked, place);
    });
  }

  /** The best match among the tokens it fires on, with the examples at all that match as well as that. */
  function bestToken(index, matches, place) {
    let best = MATCH.promoted;
    let share = 0;
    index.tokens[place].forEach((token, rank) => {
      const match = matches[token];
      if (!match || match > best) return;
      if (match < best) share = 0;
      best = match;
      share += index.shares[place][rank] / 100;
    });
    return best === MATCH.promoted ? undefined : [best, share * index.examples[place]];
  }

  function otherMatch(index, texts, matches, { text, isWhole }, place) {
    const rank = index.promoted ? index.promoted[place].findIndex((token) => matches[token]) : -1;
    if (rank >= 0) return [MATCH.promoted, 1 / (1 + rank)];
    if (isWhole) return undefined;
    if (texts.passages?.[place].includes(text.trim())) return [MATCH.passage, 0];
    return texts.labels?.[place].includes(text.trim()) ? [MATCH.label, 0] : undefined;
  }

  /**
   * Places in the index of the features to show, in order, and how each matches what is searched for (null without a
   * search). Matches come best first unless another order than that of the beginning is chosen.
   */
  function select(index, texts, chosen) {
    const found = chosen.q.trim() ? search(index, texts, chosen.q) : null;
    const low = chosen.min === null ? -Infinity : 10 ** chosen.min;
    const high = chosen.max === null ? Infinity : 10 ** chosen.max;
    const isShown = {
      all: () => true,
      live: (place) => index.frequency[place] > 0,
      dead: (place) => index.frequency[place] === 0,
      dense: (place) => index.is_dense[place] === 1,
    }[chosen.show];
    let places = [];
    for (let place = 0; place < index.feature.length; place += 1) {
      const frequency = index.frequency[place];
      if (isShown(place) && frequency >= low && frequency <= high && (!found || found[place])) places.push(place);
    }
    places = sorted(places, index[chosen.sort.replace("-", "")], chosen.sort.startsWith("-"));
    if (found && chosen.sort === DEFAULTS.sort) {
      places.sort((one, other) => found[one][0] - found[other][0] || found[other][1] - found[one][1]); // stable
    }
    return { places, found };
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

  return { DEFAULTS, MATCH, parse, format, searchTexts, wanted, select };
})();
