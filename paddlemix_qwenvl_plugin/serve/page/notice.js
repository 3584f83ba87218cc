/** Notices above the question input, with a button. */

import { byId, element, iconButton } from './dom.js';

/**
 * Show a notice.
 *
 * @param {string | [string, object]} words key of words_en.js, or [key, values]
 * @param {{label: string, act: () => void} | null} action label (a key) and action of the notice's button; null: the
 *   button only closes the notice
 * @param {string} place id of the element for the notice: "notice" or "editing"
 */
export function notice(words, action = null, place = 'notice') {
  const close = () => closeNotice(place);
  const act = () => {
    close();
    action.act();
  };
  byId(place).replaceChildren(
    element('p', { text: words }),
    action ? element('button', { type: 'button', text: action.label, onclick: act }) : iconButton('close', 'dismiss', close),
  );
}

export function closeNotice(place = 'notice') {
  byId(place).replaceChildren();
}
