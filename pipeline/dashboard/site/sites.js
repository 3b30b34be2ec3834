"use strict";
// Which of several tables is looked at: "index.html?at=layer3" in the address. A site of one has no list of them.

const Sites = (() => {
  const { html } = Elements;
  const all = () => window.dashboardSites || [];
  const asked = () => new URLSearchParams(window.location.search).get("at");

  /** The tables looked at; null in a site of one. */
  function current() {
    if (!all().length) return null;
    const found = asked() === null ? all()[0] : all().find((one) => one.at === asked());
    if (!found) throw new Error(`This site has no ${asked()}: it has ${all().map((one) => one.at).join(", ")}.`);
    return found;
  }

  /** Their name, empty in a site of one. */
  const at = () => current()?.at ?? "";

  /** The folder below data/ that theirs lie in. */
  const folder = () => (at() ? `${encodeURIComponent(at())}/` : "");

  /** The address of a feature of other tables of this site. */
  const to = (name, feature) => `?${new URLSearchParams({ at: name })}#feature=${feature}`;

  /** A switch; the list stays as it is chosen, a feature's page leads to the list. Nothing in a site of one. */
  function control() {
    if (all().length < 2) return null;
    const here = at();
    const options = all().map((one) => html("option", { value: one.at, selected: one.at === here }, title(one)));
    const select = html("select", { onchange: () => go(select.value) }, options);
    return html("label", { class: "sites" }, html("span", { class: "quiet" }, "Layer or run "), select);
  }

  function title({ at: name, site, l0_mean: l0, fvu }) {
    const facts = [name.includes(site) ? null : site, l0 === null ? null : `L0 ${Text.number(l0)}`, fvu === null ? null : `FVU ${Text.number(fvu)}`];
    return [name, ...facts.filter(Boolean)].join(" · ");
  }

  function go(name) {
    const hash = window.location.hash.slice(1);
    const isFeature = new URLSearchParams(hash).has("feature");
    window.location.href = `?${new URLSearchParams({ at: name })}#${isFeature ? "" : hash}`;
  }

  return { at, folder, to, control };
})();
