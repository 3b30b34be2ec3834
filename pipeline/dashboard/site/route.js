"use strict";
// What the address says is shown: "#feature=89" a feature, anything else the list as chosen. Starts the pages.

const Route = (() => {
  const views = ["list", "feature", "notice"].map((name) => document.getElementById(name));
  let looked = null; // the feature shown last
  let isOpen = false;

  /** The address of a feature's page. */
  const to = (feature) => `#feature=${feature}`;

  /** Keep a choice in the address without a step in the browser's history. */
  function remember(text) {
    window.history.replaceState(null, "", text ? `#${text}` : "#");
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
      if (!isOpen) List.open(index, wanted === null ? Selection.parse(text) : { ...Selection.DEFAULTS });
      isOpen = true;
      if (wanted === null) showList(index, Selection.parse(text));
      else await showFeature(index, wanted, text);
    } catch (error) {
      tell(error.message);
    }
  }

  function showList(index, chosen) {
    only("list");
    document.title = `${index.about.model} ${index.about.site}: features`;
    List.show(chosen, looked);
    looked = null;
  }

  async function showFeature(index, wanted, text) {
    const found = /^\d+$/.test(wanted) && index.feature.includes(Number(wanted)) ? await Data.feature(Number(wanted)) : null;
    if (window.location.hash.slice(1) !== text) return; // gone on while it was loading
    if (!found) {
      tell(`There is no page of feature ${wanted} here.`);
      return;
    }
    only("feature");
    looked = Number(wanted);
    document.title = `Feature ${wanted}: ${index.about.model} ${index.about.site}`;
    Feature.show(looked, found);
  }

  window.addEventListener("hashchange", follow);
  window.addEventListener("DOMContentLoaded", follow);

  return { to, remember };
})();
