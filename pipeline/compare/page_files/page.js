"use strict";
// The list of pairs: one direction and one measure at a time, searched, ordered, in parts. Text only ever becomes a
// text node.

(() => {
  const { names, measures, sides } = JSON.parse(document.getElementById("data").textContent);
  const STEP = 200; // rows that are shown at once
  const byId = (id) => document.getElementById(id);
  const chosen = { side: 0, measure: 0, shown: STEP };

  function made(name, className, ...children) {
    const element = document.createElement(name);
    element.className = className;
    element.append(...children);
    return element;
  }

  function feature(side, number) {
    const about = sides[side].about[number];
    return [made("span", "id", String(number)), ...(about ? [" ", made("span", "about", about)] : [])];
  }

  function bar(value, state, chance) {
    const fill = made("span", state ? "matched" : "");
    fill.style.setProperty("--share", Math.min(Math.max(value, 0), 1).toFixed(3));
    const box = made("div", "bar", fill);
    if (chance !== null) {
      const line = made("i", "");
      line.style.setProperty("--chance", Math.min(Math.max(chance, 0), 1).toFixed(3));
      box.append(line);
    }
    box.dataset.tip = `${value.toFixed(3)}${chance === null ? "" : `; by chance 1 % are above ${chance.toFixed(3)}`}`;
    return box;
  }

  function row(number) {
    const { feature: other, value, state } = sides[chosen.side].similar[chosen.measure];
    const own = made("td", "", ...feature(chosen.side, number));
    if (other[number] === null) {
      const none = made("td", "about", "none: it fires too rarely, or writes nothing");
      none.colSpan = 2;
      return made("tr", "unmatched", own, none);
    }
    const chance = measures[chosen.measure].chance[chosen.side];
    const said = ["not matched", "matched", "matched both ways"][state[number]];
    const middle = made("td", "", made("span", "value", value[number].toFixed(3)), " ", made("span", "both", said), bar(value[number], state[number], chance));
    return made("tr", state[number] ? "" : "unmatched", own, middle, made("td", "", ...feature(1 - chosen.side, other[number])));
  }

  function found() {
    const own = sides[chosen.side];
    const { feature: other, value, state } = own.similar[chosen.measure];
    const text = byId("search").value.trim().toLowerCase();
    const kept = byId("kept").value;
    const order = byId("order").value;
    const isKept = { all: () => true, matched: (one) => state[one] > 0, mutual: (one) => state[one] === 2, unmatched: (one) => state[one] === 0 }[kept];
    const has = (side, number) => number !== null && (String(number) === text || sides[side].about[number].toLowerCase().includes(text));
    const numbers = own.about.map((_, one) => one).filter((one) => isKept(one) && (!text || has(chosen.side, one) || has(1 - chosen.side, other[one])));
    if (order === "number") return numbers;
    const sign = order === "down" ? -1 : 1;
    const known = (one) => value[one] ?? sign * Infinity; // those without any come last
    return numbers.sort((a, b) => (known(a) === known(b) ? a - b : sign * (known(a) - known(b))));
  }

  function draw() {
    const numbers = found();
    byId("own").textContent = `feature of ${names[chosen.side]}`;
    byId("other").textContent = `most similar of ${names[1 - chosen.side]}`;
    byId("pairs").tBodies[0].replaceChildren(...numbers.slice(0, chosen.shown).map(row));
    byId("count").textContent = `${numbers.length.toLocaleString("en")} of ${sides[chosen.side].about.length.toLocaleString("en")} features`;
    byId("more").hidden = numbers.length <= chosen.shown;
  }

  function choice(group, key, labels) {
    const buttons = labels.map((label, index) => {
      const button = made("button", "", label);
      button.type = "button";
      button.addEventListener("click", () => choose(index));
      return button;
    });
    function choose(index) {
      Object.assign(chosen, { [key]: index, shown: STEP });
      buttons.forEach((button, at) => button.setAttribute("aria-pressed", String(at === index)));
      draw();
    }
    byId(group).append(...buttons);
    buttons[0].setAttribute("aria-pressed", "true");
    buttons.slice(1).forEach((button) => button.setAttribute("aria-pressed", "false"));
  }

  choice("sides", "side", names.map((name, side) => `${name} → ${names[1 - side]}`));
  choice("measures", "measure", measures.map((measure) => measure.name));
  for (const id of ["kept", "order"]) byId(id).addEventListener("change", () => { chosen.shown = STEP; draw(); });
  byId("search").addEventListener("input", () => { chosen.shown = STEP; draw(); });
  byId("more").addEventListener("click", () => { chosen.shown += STEP; draw(); });
  draw();
})();
