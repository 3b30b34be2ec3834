"use strict";
// Data from the site's own folder, opened from disk or over HTTP: a page on disk may load a script but not fetch a file.

const Data = (() => {
  const waiting = new Map();
  const loaded = new Map();
  const KEPT = 24; // files of pages kept in memory, a few MB

  async function unpack(packed) {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("This browser cannot unpack the data. Use one of 2023 or later.");
    }
    const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  /** Called by every data file with what it holds. */
  window.dashboardData = (name, packed) => {
    waiting.get(name)?.resolve(packed);
  };

  function script(name) {
    return new Promise((resolve, reject) => {
      waiting.set(name, { resolve });
      const path = `data/${Sites.folder()}${name}.js`;
      const missing = new Error(`The file ${path} is not there. Copy the whole folder of the dashboard, or make it again.`);
      const element = Elements.html("script", { src: path, onerror: () => reject(missing) });
      document.head.append(element);
    });
  }

  function load(name) {
    if (!loaded.has(name)) {
      const found = script(name).then(unpack);
      loaded.set(name, found);
      found.catch(() => loaded.delete(name));
      forgetOldest();
    }
    return loaded.get(name);
  }

  function forgetOldest() {
    const pages = [...loaded.keys()].filter((name) => name !== "index" && name !== "passages");
    for (const name of pages.slice(0, Math.max(0, pages.length - KEPT))) loaded.delete(name);
  }

  /** The list of all features. */
  const index = () => load("index");

  /** The text of every feature's strongest examples, which is searched. */
  const passages = async () => (await load("passages")).passages;

  /** One feature's record, and the texts its tokens are places in; null if the site does not show it. */
  async function feature(number) {
    const { about } = await index();
    const first = number - (number % about.features_per_file);
    const file = await load("features-" + String(first).padStart(6, "0"));
    const record = file.features.find((one) => one.feature === number);
    return record ? { record, texts: file.vocabulary } : null;
  }

  /** The document of an example with the feature's activations; only a server of the tables has it. */
  function document_(feature, { document, context, position }) {
    return load(["document", feature, document, context, position].join("-"));
  }

  return { index, passages, feature, document: document_ };
})();
