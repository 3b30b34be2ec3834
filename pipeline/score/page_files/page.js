"use strict";
// Draws a strip for each feature, a cell for each token, and colours the text by the feature chosen. Text only ever
// becomes a text node.

(() => {
  const { texts, features, largest } = JSON.parse(document.getElementById("data").textContent);
  const HOT = 0.65; // from this share on text on a dark page is black

  function made(name, className, text = "") {
    const element = document.createElement(name);
    element.className = className;
    element.textContent = text;
    return element;
  }

  const number = (value) => (value === null ? "not scored" : String(value).replace("-", "−"));

  function paint(element, kind, token, value) {
    const share = value === null || !largest ? 0 : Math.min(Math.abs(value) / largest, 1);
    const classes = [kind];
    if (value === null) classes.push("unscored");
    else if (share > 0) classes.push("fires", ...(value < 0 ? ["cold"] : []), ...(share >= HOT ? ["hot"] : []));
    element.className = classes.join(" ");
    element.style.setProperty("--share", share.toFixed(3));
    element.dataset.tip = `'${token}' ${number(value)}`;
  }

  function draw(section, { tokens, tips, values }) {
    const passage = section.querySelector(".passage");
    const spans = tokens.map((token) => made("span", "token", token));
    passage.append(...spans);
    const buttons = features.map((feature) => {
      const button = made("button", "", `Feature ${feature.label}`);
      button.type = "button";
      return button;
    });

    function choose(chosen) {
      buttons.forEach((button, place) => button.setAttribute("aria-pressed", String(place === chosen)));
      spans.forEach((span, place) => paint(span, "token", tips[place], values[chosen][place]));
    }

    features.forEach((feature, place) => {
      const strip = made("div", "strip");
      const head = made("div", "");
      const cells = made("div", "cells");
      const own = values[place];
      const most = own.reduce((best, value, token) => (Math.abs(value) > Math.abs(own[best]) ? token : best), 0);
      head.append(buttons[place], made("span", "most", own[most] ? `up to ${number(own[most])} at '${tips[most]}'` : "silent"));
      if (feature.href) {
        const link = made("a", "", "its page");
        link.href = feature.href;
        link.setAttribute("aria-label", `page of feature ${feature.label}`);
        head.append(link);
      }
      cells.append(...tokens.map((_, token) => {
        const cell = made("span", "cell");
        paint(cell, "cell", tips[token], values[place][token]);
        return cell;
      }));
      strip.append(head, cells);
      if (feature.note) strip.append(made("p", "note", feature.note));
      section.querySelector(".strips").append(strip);
      buttons[place].addEventListener("click", () => choose(place));
    });
    if (features.length) choose(0);
  }

  document.querySelectorAll("section").forEach((section, place) => draw(section, texts[place]));
})();
