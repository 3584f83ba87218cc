/** Copying of text to the clipboard. */

import { announce } from './announce.js';
import { setWords, textOf } from './language.js';
import { notice } from './notice.js';

const CONFIRMATION_MS = 2_000;

/** Copy text and confirm it on `button` for a moment. */
export async function copyText(text, button) {
  if (!(await copy(text))) {
    notice('copy.problem');
    return;
  }
  announce(textOf('copied'));
  setWords(button, 'label', 'copied');
  button.classList.add('done');
  setTimeout(() => {
    setWords(button, 'label', 'copy');
    button.classList.remove('done');
  }, CONFIRMATION_MS);
}

/** Copy text; return whether it was copied. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  // Over plain HTTP from another machine only the deprecated API is available.
  const field = document.createElement('textarea');
  field.value = text;
  field.className = 'visually-hidden';
  document.body.append(field);
  field.select();
  const copied = document.execCommand('copy');
  field.remove();
  return copied;
}
