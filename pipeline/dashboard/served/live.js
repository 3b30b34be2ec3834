"use strict";
// What a page can do where a server of its tables runs on this machine: edit a label, a note and a star, and try a text.

(() => {
  const { html } = Elements;
  const token = document.querySelector("meta[name=token]").content;
  const root = document.getElementById("feature");
  const HOT = 0.65; // as for examples

  async function ask(name, asked) {
    const headers = { "Content-Type": "application/json", "X-Tailrace-Token": token };
    let response;
    try {
      response = await fetch(`/${name}`, { method: "POST", headers, body: JSON.stringify({ at: Sites.at(), ...asked }) });
    } catch {
      throw Object.assign(new Error("The server does not answer. Is it still running?"), { answer: {} });
    }
    const answer = await response.json();
    if (!response.ok) throw Object.assign(new Error(answer.error), { answer, isConflict: response.status === 409 });
    return answer;
  }

  root.addEventListener("drawn", ({ detail: { feature, record } }) => {
    root.querySelector(".top").after(html("div", { class: "live" }, labelForm(feature), tryForm(feature, record.statistics.max)));
  });

  function labelForm(feature) {
    let seen = null; // the edit that is shown
    const label = html("input", { id: "live-label", maxlength: 200, autocomplete: "off", placeholder: "in a few words" });
    const note = html("textarea", { id: "live-note", maxlength: 10000, rows: 2 });
    const star = html("button", { type: "button", class: "star", "aria-pressed": "false", "aria-label": "star", onclick: () => { press(!starred()); save(); } }, "☆");
    const said = html("p", { class: "said", role: "status" });
    const button = html("button", { type: "submit", class: "do" }, "Save");
    const fields = [label, note, star, button];
    for (const one of fields) one.disabled = true; // until what is there is known: an answer must not undo typing
    const starred = () => star.getAttribute("aria-pressed") === "true";

    function press(isStarred) {
      star.setAttribute("aria-pressed", String(isStarred));
      star.textContent = isStarred ? "★" : "☆";
    }

    function show(now) {
      seen = now.updated;
      label.value = now.label;
      note.value = now.note;
      press(now.starred);
    }

    async function save() {
      said.textContent = "saving…";
      try {
        const now = await ask("edit", { feature, label: label.value, note: note.value, starred: starred(), seen });
        show(now);
        said.textContent = "saved";
        await keep(now);
      } catch (error) {
        said.textContent = error.message;
        if (!error.isConflict) return;
        const theirs = error.answer;
        said.append(" ", html("button", { type: "button", class: "do", onclick: () => { show(theirs); said.textContent = `shown: as ${theirs.author} left it`; } }, "Show what is there now"));
      }
    }

    ask("label", { feature }).then((now) => {
      show(now);
      for (const one of fields) one.disabled = false;
      if (now.author) said.textContent = `last edited by ${now.author}`;
    }, (error) => { said.textContent = error.message; });
    return html("form", { class: "card", onsubmit: (event) => { event.preventDefault(); save(); } },
      html("h2", {}, "Label"),
      html("div", { class: "line" }, html("label", { class: "spoken", for: "live-label" }, "Label"), star, label, button),
      html("label", { for: "live-note", class: "quiet" }, "Note"), note, said);
  }

  /** Keep an edit in the list that is loaded, so that it is found and shown there. */
  async function keep({ feature, label, note, starred }) {
    const index = await Data.index();
    for (const [name, empty] of [["label", ""], ["note", ""], ["starred", 0]]) index[name] ??= index.feature.map(() => empty);
    const place = index.feature.indexOf(feature);
    [index.label[place], index.note[place], index.starred[place]] = [label, note, Number(starred)];
    List.redraw();
  }

  function tryForm(feature, largest) {
    const text = html("textarea", { id: "live-text", rows: 2, maxlength: 10000, placeholder: "any text" });
    const said = html("p", { class: "said", role: "status" });
    const shown = html("p", { class: "tried", lang: "", dir: "auto" });
    const button = html("button", { type: "submit", class: "do" }, "Try");

    async function run() {
      said.textContent = "reading…";
      button.disabled = true;
      try {
        const { tokens, values } = await ask("try", { feature, text: text.value });
        const top = Math.max(largest ?? 0, ...values.map((value) => value ?? 0));
        shown.replaceChildren(...tokens.map((one, place) => span(one, values[place], top)));
        const active = values.filter((value) => value > 0).length;
        const read = values.filter((value) => value !== null).length;
        const most = values.indexOf(Math.max(...values.map((value) => value ?? 0)));
        said.textContent = active ? `active on ${active} of ${Text.count(read)} tokens, most on ${Text.spoken(tokens[most])}: ${Text.number(values[most])}`
          : `active on none of ${Text.count(read)} tokens`;
      } catch (error) {
        said.textContent = error.message;
      } finally {
        button.disabled = false;
      }
    }

    return html("form", { class: "card", onsubmit: (event) => { event.preventDefault(); run(); } },
      html("h2", {}, html("label", { for: "live-text" }, "Try a text")), text, html("div", { class: "line" }, button, said), shown);
  }

  function span(text, value, largest) {
    const share = value > 0 && largest > 0 ? Math.min(1, value / largest) : 0;
    const names = ["token", share ? "fires" : null, share >= HOT ? "hot" : null, value === null ? "unseen" : null];
    return html("span", {
      class: names.filter(Boolean).join(" "), "--share": share ? Math.max(0.04, share).toFixed(3) : null,
      "data-tip": value === null ? "not scored" : Text.number(value),
    }, text);
  }
})();
