"use strict";
// One tooltip for everything that carries data-tip. It opens by pointing, by a tap
// and by the keyboard, and is spoken where the keyboard asked for it.

const Tooltip = (() => {
  const box = document.getElementById("tooltip");
  const voice = document.getElementById("spoken");
  let untitled = null; // what is pointed at, whose title waits: the browser would show it as well

  function show(element) {
    box.textContent = element.dataset.tip;
    box.hidden = false;
    const target = element.getBoundingClientRect();
    const own = box.getBoundingClientRect();
    const left = Math.max(4, Math.min(target.left + target.width / 2 - own.width / 2, window.innerWidth - own.width - 4));
    const top = target.top - own.height - 6;
    box.style.left = `${left}px`;
    box.style.top = `${top < 4 ? target.bottom + 6 : top}px`;
  }

  function hide() {
    box.hidden = true;
    if (untitled) untitled.title = untitled.dataset.tip;
    untitled = null;
  }

  function point(element) {
    hide();
    show(element);
    if (!element.title) return;
    element.removeAttribute("title");
    untitled = element;
  }

  /** Say a sentence to a screen reader. */
  function say(sentence) {
    voice.textContent = sentence;
  }

  const marked = (event) => event.target.closest("[data-tip]");

  document.addEventListener("mouseover", (event) => {
    const target = marked(event);
    if (target) point(target);
    else hide();
  });
  document.addEventListener("focusin", (event) => {
    const target = marked(event);
    if (target && event.target.matches(":focus-visible")) show(target);
    else hide();
  });
  document.addEventListener("click", (event) => {
    const target = marked(event);
    if (target?.isConnected) show(target); // a tap: what it focuses has closed the tooltip by now
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, true);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });

  return { show, hide, say };
})();
