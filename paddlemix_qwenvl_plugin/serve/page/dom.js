/** Creation of elements. Text is inserted as text nodes and attributes only, never as HTML. */

import { setWords } from './language.js';

const SVG = 'http://www.w3.org/2000/svg';

/**
 * Create an element.
 *
 * Properties are attributes, with two exceptions: `on…` is an event listener; `text`, `label`, `alt` and
 * `placeholder` are a key of words_en.js, or [key, values] (see setWords). An element with `text` has no children: a
 * change of the language replaces its content. Properties that are undefined, null or false, and children that are
 * null, are omitted.
 */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (['text', 'label', 'alt', 'placeholder'].includes(name)) setWords(node, name, ...[value].flat());
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Create an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Create an icon from a symbol `icon-NAME` of index.html. */
export function icon(name) {
  return svg('svg', { class: 'icon', 'aria-hidden': 'true' }, svg('use', { href: `#icon-${name}` }));
}

/** Create a button with an icon; `label` is a key of words_en.js. */
export function iconButton(name, label, onclick) {
  return element('button', { type: 'button', class: 'quiet icon-only', label, onclick }, icon(name));
}

export const byId = (id) => document.getElementById(id);
