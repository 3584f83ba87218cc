/** Language of the page: the user's choice, else the browser's preference. */

import { load, store } from './store.js';
import { en } from './words_en.js';
import { zh } from './words_zh.js';

const LANGUAGES = { en, zh };
const STORED_LANGUAGE = 'qwenvl-language';

// Texts of the page by their keys.
let words = LANGUAGES[load('localStorage', STORED_LANGUAGE)] ?? preferred();

function preferred() {
  const codes = navigator.languages.map((tag) => tag.slice(0, 2).toLowerCase());
  return LANGUAGES[codes.find((code) => code in LANGUAGES)] ?? en;
}

/** Text of a key in the page's language, with the values of its placeholders. */
export function textOf(key, values = {}) {
  const text = words[key];
  return typeof text === 'function' ? text(values) : text;
}

/**
 * Set a text of an element, which is translated again when the language changes.
 *
 * @param {Element} element
 * @param {string} role "text" (the content), "label" (for screen readers; an icon button's tooltip too), "alt" or
 *   "placeholder"
 * @param {string} key key of words_en.js
 * @param {object} [values] values of the text's placeholders
 */
export function setWords(element, role, key, values) {
  const name = { text: 'words', label: 'wordsLabel', alt: 'wordsAlt', placeholder: 'wordsPlaceholder' }[role];
  element.dataset[name] = key;
  if (values) element.dataset[`${name}Values`] = JSON.stringify(values);
  else delete element.dataset[`${name}Values`];
  translate(element);
}

/** Remove the content of an element that setWords has set. */
export function clearWords(element) {
  delete element.dataset.words;
  element.textContent = '';
}

/** Translate the texts of an element; its data attributes contain the keys and values. */
function translate(element) {
  const data = element.dataset;
  const textFor = (name) => textOf(data[name], data[`${name}Values`] && JSON.parse(data[`${name}Values`]));
  // In a live region, screen readers would announce an unchanged text again.
  if (data.words && element.textContent !== textFor('words')) element.textContent = textFor('words');
  if (data.wordsAlt) element.alt = textFor('wordsAlt');
  if (data.wordsPlaceholder) element.placeholder = textFor('wordsPlaceholder');
  if (data.wordsLabel) {
    element.setAttribute('aria-label', textFor('wordsLabel'));
    if (element.matches('.icon-only, .collapses')) element.title = textFor('wordsLabel');
  }
}

const TRANSLATED = '[data-words], [data-words-label], [data-words-alt], [data-words-placeholder]';

function translateAll() {
  document.documentElement.lang = words['language.code'];
  document.querySelectorAll(TRANSLATED).forEach(translate);
}

/** Insert all texts into the page and let `button` switch the language. */
export function startLanguage(button) {
  const labelButton = () => {
    button.textContent = words['language.other'];
    button.lang = words['language.other.code'];
  };
  button.addEventListener('click', () => {
    words = words === en ? zh : en;
    store('localStorage', STORED_LANGUAGE, words === en ? 'en' : 'zh');
    labelButton();
    translateAll();
  });
  labelButton();
  translateAll();
}
