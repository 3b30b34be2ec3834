"use strict";
// Single keys that lead through the features, and the list of them. They do nothing while a text is typed.

const Keys = (() => {
  const { html } = Elements;
  const HELP = [
    ["/", "search"], ["J", "next feature"], ["K", "previous feature"], ["R", "a random feature"],
    ["C", "copy the link to this page"], ["?", "this list"], ["Enter", "on an example's number: the passage"],
    ["← →", "on an example's number: from token to token"], ["↑ ↓", "in the list: from row to row; also Page up, Page down, Home, End"],
    ["Esc", "close a definition, or this list"],
  ];
  let dialog = null;

  /** Show the list of keys. */
  function help() {
    if (!dialog) {
      const row = ([key, meaning]) => html("div", {}, html("dt", {}, html("kbd", {}, key)), html("dd", {}, meaning));
      dialog = html("dialog", { class: "keys", "aria-labelledby": "keys-title" },
        html("h2", { id: "keys-title" }, "Keys"), html("dl", {}, HELP.map(row)),
        html("form", { method: "dialog" }, html("button", { class: "action" }, "Close")));
      document.body.append(dialog);
    }
    if (!dialog.open) dialog.showModal();
  }

  /** Copy the address of this page, and say so on the button. */
  async function copyLink(button) {
    const isCopied = await copy(window.location.href);
    Tooltip.say(isCopied ? "Link copied" : "The browser does not allow to copy");
    if (!button) return;
    button.textContent = isCopied ? "copied ✓" : "not allowed";
    window.setTimeout(() => { button.textContent = "copy link"; }, 1600);
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return copySelected(text); // a page opened from disk may lack the clipboard
    }
  }

  function copySelected(text) {
    const field = html("textarea", { class: "spoken", "aria-hidden": "true" });
    const focused = document.activeElement;
    field.value = text;
    document.body.append(field);
    field.select();
    const isCopied = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return isCopied;
  }

  /** Buttons that every view has. */
  function buttons(isFeature) {
    const copier = isFeature ? html("button", { type: "button", class: "action copy", onclick: () => copyLink(copier) }, "copy link") : null;
    return [
      html("button", { type: "button", class: "action", onclick: () => Route.random() }, "random"), copier,
      html("button", { type: "button", class: "action keyboard", "aria-label": "keys", onclick: help }, "?"),
    ];
  }

  const ACTIONS = {
    "/": () => Route.search(),
    j: () => Route.step(1),
    k: () => Route.step(-1),
    r: () => Route.random(),
    c: () => copyLink(document.querySelector("#feature .copy")),
    "?": help,
  };

  document.addEventListener("keydown", (event) => {
    const action = Object.hasOwn(ACTIONS, event.key.toLowerCase()) ? ACTIONS[event.key.toLowerCase()] : null;
    const isTyping = event.target.matches("input:not([type=radio], [type=range]), textarea, select, [contenteditable]");
    if (!action || isTyping || dialog?.open || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    action();
  });

  return { buttons };
})();
