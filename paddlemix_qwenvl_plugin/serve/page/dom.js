/** Creation of elements. Text is only inserted as text nodes and attributes, never as HTML. */

import { setWords } from './language.js';

const SVG = 'http://www.w3.org/2000/svg';

/**
 * Create an element.
 *
 * Properties are attributes, except `on…` (a listener), and `text`, `label`, `alt`, `placeholder`, which are keys of
 * the page's words, or [key, values].
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (['text', 'label', 'alt', 'placeholder'].includes(name)) setWords(made, name, ...[value].flat());
    else made.setAttribute(name, value === true ? '' : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Create an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Create an icon from index.html's symbols. */
export function icon(name) {
  return svg('svg', { class: 'icon', 'aria-hidden': 'true' }, svg('use', { href: `#icon-${name}` }));
}

/** Create a button with an icon, labelled by a key of the page's words. */
export function iconButton(name, label, onclick) {
  return element('button', { type: 'button', class: 'quiet icon-only', label, onclick }, icon(name));
}

export const byId = (id) => document.getElementById(id);
