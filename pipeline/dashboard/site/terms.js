"use strict";
// Words with their definitions: shown by the tooltip at the word, and in its title.

const Terms = (() => {
  const { html } = Elements;
  let definitions = {};

  /** Take the definitions by word. */
  function define(glossary) {
    definitions = glossary;
  }

  /** What gives an element the definition of a word: its title, and what the tooltip shows. */
  function attributes(word) {
    const meaning = definitions[word];
    return meaning ? { title: meaning, "data-tip": meaning, "data-word": word } : {};
  }

  /** A word that shows its definition; `text` is how it is written here. */
  function term(word, text = word) {
    if (!definitions[word]) return html("span", {}, text);
    return html("button", { type: "button", class: "term", ...attributes(word) }, text);
  }

  return { define, attributes, term };
})();
