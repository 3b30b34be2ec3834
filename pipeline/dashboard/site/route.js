"use strict";
// What the address says is shown: "#feature=89" a feature, anything else the list as chosen. Starts the pages.

const Route = (() => {
  const views = ["list", "feature", "notice"].map((name) => document.getElementById(name));
  let looked = null; // the feature shown now, or last
  let isOpen = false;
  let isSearching = false; // whether the list opens at its search

  /** The address of a feature's page. */
  const to = (feature) => `#feature=${feature}`;

  const isShown = (name) => !document.getElementById(name).hidden;

  /** Keep a choice in the address without a step in the browser's history. */
  function remember(text) {
    window.history.replaceState(null, "", text ? `#${text}` : "#");
  }

  function go(address) {
    window.location.hash = address;
  }

  /** Open a feature drawn at random from those of the list as it is chosen. */
  function random() {
    const feature = isOpen ? List.drawn(isShown("feature") ? looked : null) : null;
    if (feature !== null) go(to(feature));
  }

  /** Go on to the next feature, or back: on a page to its page, in the list to its row. */
  function step(by) {
    if (isShown("list")) List.step(by);
    if (!isShown("feature")) return;
    const feature = List.neighbours(looked)[by < 0 ? 0 : 1];
    if (feature !== null) go(to(feature));
  }

  /** Open the list at its search. */
  function search() {
    if (isShown("list")) {
      List.focusSearch();
      return;
    }
    isSearching = true;
    go(`#${List.address()}`);
  }

  function only(name) {
    for (const view of views) if (view.id !== name) view.hidden = true;
  }

  function tell(sentence) {
    only("notice");
    const notice = document.getElementById("notice");
    notice.replaceChildren(Elements.html("h1", {}, "Nothing to show"), Elements.html("p", {}, sentence),
      Elements.html("p", {}, Elements.html("a", { href: "#" }, "all features")));
    notice.hidden = false;
  }

  async function follow() {
    const text = window.location.hash.slice(1);
    const wanted = new URLSearchParams(text).get("feature");
    try {
      const index = await Data.index();
      if (!isOpen) {
        Terms.define(index.about.glossary);
        List.open(index, wanted === null ? Selection.parse(text) : { ...Selection.DEFAULTS });
      }
      isOpen = true;
      if (wanted === null) showList(index, Selection.parse(text));
      else await showFeature(index, wanted, text);
    } catch (error) {
      tell(error.message);
    }
  }

  function showList(index, chosen) {
    only("list");
    Tooltip.hide();
    document.title = `${index.about.model} ${index.about.site}: features`;
    List.show(chosen, looked);
    if (isSearching) List.focusSearch();
    isSearching = false;
    looked = null;
  }

  async function showFeature(index, wanted, text) {
    const found = /^\d+$/.test(wanted) && index.feature.includes(Number(wanted)) ? await Data.feature(Number(wanted)) : null;
    if (window.location.hash.slice(1) !== text) return; // gone on while it was loading
    if (!found) {
      const [first, last] = [index.feature[0], index.feature.at(-1)];
      const have = index.feature.length === 0 ? "none" : index.feature.length === last - first + 1
        ? `features ${first} to ${last}` : `${Text.several(index.feature.length, "feature")} between ${first} and ${last}`;
      tell(`This site has no feature ${wanted}: it has ${have}.`);
      return;
    }
    only("feature");
    Tooltip.hide();
    looked = Number(wanted);
    document.title = `Feature ${wanted}: ${index.about.model} ${index.about.site}`;
    Feature.show(looked, found, index.about);
  }

  window.addEventListener("hashchange", follow);
  window.addEventListener("DOMContentLoaded", follow);

  return { to, remember, random, step, search };
})();
