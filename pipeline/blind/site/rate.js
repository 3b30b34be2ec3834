"use strict";
// Shows one item after the other and keeps what is said of each.
const FACTS = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const place = `blind-ratings-${FACTS.draw}`;
const ratings = JSON.parse(localStorage.getItem(place) || "{}");
let current = 1;

function keep() {
  const checked = document.querySelector("input[name=interpretable]:checked");
  ratings[current] = {
    interpretable: checked ? checked.value : "",
    context_free: byId("context_free").checked ? "yes" : "",
    note: byId("note").value,
  };
  localStorage.setItem(place, JSON.stringify(ratings));
  count();
}

function count() {
  const n = Object.values(ratings).filter((rating) => rating.interpretable).length;
  byId("done").textContent = `${n} of ${FACTS.n_items} rated`;
}

function show(item) {
  current = Math.min(Math.max(item, 1), FACTS.n_items);
  const rating = ratings[current] || {};
  byId("number").textContent = current;
  byId("page").src = `items/${String(current).padStart(4, "0")}.html`;
  for (const radio of document.querySelectorAll("input[name=interpretable]")) {
    radio.checked = radio.value === rating.interpretable;
  }
  byId("context_free").checked = rating.context_free === "yes";
  byId("note").value = rating.note || "";
  byId("back").disabled = current === 1;
  byId("next").disabled = current === FACTS.n_items;
  count();
}

function cell(text) {
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function save() {
  const lines = [FACTS.columns.join(",")];
  for (let item = 1; item <= FACTS.n_items; item += 1) {
    const rating = ratings[item] || {};
    lines.push([String(item), ...FACTS.columns.slice(1).map((name) => cell(rating[name] || ""))].join(","));
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${lines.join("\n")}\n`], { type: "text/csv" }));
  link.download = FACTS.file;
  link.click();
  URL.revokeObjectURL(link.href);
}

byId("total").textContent = FACTS.n_items;
byId("rating").addEventListener("input", keep);
byId("rating").addEventListener("submit", (event) => event.preventDefault());
byId("back").addEventListener("click", () => show(current - 1));
byId("next").addEventListener("click", () => show(current + 1));
byId("save").addEventListener("click", save);
document.addEventListener("keydown", (event) => {
  if (event.target.matches("textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const verdict = { y: "yes", m: "maybe", n: "no" }[event.key];
  if (verdict) document.querySelector(`input[value=${verdict}]`).checked = true;
  else if (event.key === "c") byId("context_free").checked = !byId("context_free").checked;
  else return;
  event.preventDefault();
  keep();
});
show(1);
