/** Notices above the question, with an action button. */

import { byId, element, iconButton } from './dom.js';

/**
 * Show a notice.
 *
 * @param {string | [string, object]} words a key, or [key, values]
 * @param {{label: string, act: () => void} | null} action its button; null: a button that closes it
 * @param {string} place "notice" or "editing"
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
