/** Language of the page: the user's choice, else the browser's preference. */

import { load, keep } from './store.js';
import { en } from './words_en.js';
import { zh } from './words_zh.js';

const LANGUAGES = { en, zh };
const STORED = 'qwenvl-language';

let words = LANGUAGES[load('localStorage', STORED)] ?? preferred();

function preferred() {
  const wanted = navigator.languages.map((tag) => tag.slice(0, 2).toLowerCase());
  return LANGUAGES[wanted.find((code) => code in LANGUAGES)] ?? en;
}

/** Text of `key` with its values. */
export function say(key, values = {}) {
  const found = words[key];
  return typeof found === 'function' ? found(values) : found;
}

/** Give an element words that follow the language: "text", "label" (with a tooltip), "alt", "placeholder". */
export function setWords(element, role, key, values) {
  const name = { text: 'words', label: 'wordsLabel', alt: 'wordsAlt', placeholder: 'wordsPlaceholder' }[role];
  element.dataset[name] = key;
  if (values) element.dataset[`${name}Values`] = JSON.stringify(values);
  else delete element.dataset[`${name}Values`];
  apply(element);
}

/** Remove the words of an element. */
export function clearWords(element) {
  delete element.dataset.words;
  element.textContent = '';
}

function apply(element) {
  const data = element.dataset;
  const of = (name) => say(data[name], data[`${name}Values`] && JSON.parse(data[`${name}Values`]));
  // Rewriting unchanged words would announce them again in a live region.
  if (data.words && element.textContent !== of('words')) element.textContent = of('words');
  if (data.wordsAlt) element.alt = of('wordsAlt');
  if (data.wordsPlaceholder) element.placeholder = of('wordsPlaceholder');
  if (data.wordsLabel) {
    element.setAttribute('aria-label', of('wordsLabel'));
    if (element.matches('.icon-only, .collapses')) element.title = of('wordsLabel');
  }
}

const MARKED = '[data-words], [data-words-label], [data-words-alt], [data-words-placeholder]';

function applyAll() {
  document.documentElement.lang = words['language.code'];
  document.querySelectorAll(MARKED).forEach(apply);
}

/** Insert all words and let `button` switch the language. */
export function startLanguage(button) {
  const label = () => {
    button.textContent = words['language.other'];
    button.lang = words['language.other.code'];
  };
  button.addEventListener('click', () => {
    words = words === en ? zh : en;
    keep('localStorage', STORED, words === en ? 'en' : 'zh');
    label();
    applyAll();
  });
  label();
  applyAll();
}
