/** Makes the elements that the player is built of. No import of ComfyUI. */

/** Outlines on a 16 by 16 grid. */
const ICONS = {
  play: "M4 2.5v11l9-5.5z",
  pause: "M4 3h3v10H4zM9 3h3v10H9z",
  loop: "M4 4.2h6.5V2L14 5l-3.5 3V5.8H5.6V9H4zM12 11.8H5.5V14L2 11l3.5-3v2.2h4.9V7H12z",
  full: "M2 2h5v1.6H3.6V7H2zM9 2h5v5h-1.6V3.6H9zM2 9h1.6v3.4H7V14H2zM12.4 9H14v5H9v-1.6h3.4z",
  figures:
    "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zm0 1.4a5.1 5.1 0 1 1 0 10.2A5.1 5.1 0 0 1 8 2.9z" +
    "M7.2 7h1.6v4.4H7.2zM7.2 4.6h1.6v1.5H7.2z",
  silent: "M2 6h2.6L8 3v10L4.6 10H2zM10 6l1-1 1.5 1.5L14 5l1 1-1.5 1.5L15 9l-1 1-1.5-1.5L11 10l-1-1 1.5-1.5z",
  sound: "M2 6h2.6L8 3v10L4.6 10H2zM10 5.2a4 4 0 0 1 0 5.6zM10 2.4a6.4 6.4 0 0 1 0 11.2v-1.5a5 5 0 0 0 0-8.2z",
};

/** @typedef {keyof typeof ICONS} Icon */

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string>} attributes
 * @param {(Node | string)[]} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** @param {string} name the class without the pack's own beginning @param {(Node | string)[]} children */
export function box(name, ...children) {
  return make("div", { class: `selfforcing-${name}` }, ...children);
}

/** @param {string} action @param {string} title @param {(Node | string)[]} children */
export function button(action, title, ...children) {
  return make("button", { type: "button", "data-action": action, title, "aria-label": title }, ...children);
}

/** @param {Icon} name */
export function icon(name) {
  const [svg, path] = ["svg", "path"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  svg.setAttribute("viewBox", "0 0 16 16");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with one picture and one explanation at a time. */
export class IconButton {
  /** @type {Icon | undefined} */
  #shown;

  /** @param {string} action @param {Icon} name @param {string} title */
  constructor(action, name, title) {
    this.element = button(action, title);
    this.show(name, title);
  }

  /** @param {Icon} name @param {string} title what a click will do */
  show(name, title) {
    if (this.#shown !== name) this.element.replaceChildren(icon(name));
    this.#shown = name;
    explain(this.element, title);
  }
}

/** Set a tooltip; an open one would close if it were set anew. @param {HTMLElement} element @param {string} title */
export function explain(element, title) {
  if (element.title !== title) Object.assign(element, { title, ariaLabel: title });
}

/** A place in a video as players write it: "0:03.2", "1:04:15.0". @param {number} seconds */
export function clock(seconds) {
  // 1e-6: a tenth of a second is no binary number, and may lie a little below its digit.
  const tenths = Math.floor(Math.max(seconds, 0) * 10 + 1e-6);
  const [hours, minutes] = [Math.floor(tenths / 36_000), Math.floor(tenths / 600) % 60];
  const rest = `${String(Math.floor((tenths % 600) / 10)).padStart(2, "0")}.${tenths % 10}`;
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}
