"use strict";
// One tooltip for everything that carries data-tip; it is spoken where the keyboard asked for it.

const Tooltip = (() => {
  const box = document.getElementById("tooltip");
  const voice = document.getElementById("spoken");

  function show(element) {
    box.textContent = element.dataset.tip;
    box.hidden = false;
    const target = element.getBoundingClientRect();
    const own = box.getBoundingClientRect();
    const left = Math.min(Math.max(4, target.left + target.width / 2 - own.width / 2), window.innerWidth - own.width - 4);
    const top = target.top - own.height - 6;
    box.style.left = `${left}px`;
    box.style.top = `${top < 4 ? target.bottom + 6 : top}px`;
  }

  function hide() {
    box.hidden = true;
  }

  /** Say a sentence to a screen reader. */
  function say(sentence) {
    voice.textContent = sentence;
  }

  document.addEventListener("mouseover", (event) => {
    const target = event.target.closest("[data-tip]");
    if (target) show(target);
    else hide();
  });
  document.addEventListener("focusin", (event) => {
    const target = event.target.closest("[data-tip]");
    if (target && event.target.matches(":focus-visible")) show(target);
    else hide();
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, true);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });

  return { show, hide, say };
})();
