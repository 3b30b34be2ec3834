"use strict";
// Elements made from names and text. Text only ever becomes a text node: nothing here reads a string as markup.

const Elements = (() => {
  const SVG = "http://www.w3.org/2000/svg";

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name.startsWith("--")) element.style.setProperty(name, value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return element;
  }

  /** Make an HTML element; attributes named on… are listeners, those named --… style properties. */
  function html(name, attributes, ...children) {
    return fill(document.createElement(name), attributes, children);
  }

  /** Make an SVG element. */
  function svg(name, attributes, ...children) {
    return fill(document.createElementNS(SVG, name), attributes, children);
  }

  return { html, svg };
})();
