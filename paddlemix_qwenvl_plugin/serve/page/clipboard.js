/** Copying of text. */

import { announce } from './announce.js';
import { say, setWords } from './language.js';
import { notice } from './notice.js';

const MS_SHOWN = 2_000;

/** Copy text and confirm it on `button` for a moment. */
export async function copyText(text, button) {
  if (!(await written(text))) {
    notice('copy.problem');
    return;
  }
  announce(say('copied'));
  setWords(button, 'label', 'copied');
  button.classList.add('done');
  setTimeout(() => {
    setWords(button, 'label', 'copy');
    button.classList.remove('done');
  }, MS_SHOWN);
}

async function written(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  // Over plain HTTP from another machine only the deprecated API is available.
  const field = document.createElement('textarea');
  field.value = text;
  field.className = 'visually-hidden';
  document.body.append(field);
  field.select();
  const done = document.execCommand('copy');
  field.remove();
  return done;
}
