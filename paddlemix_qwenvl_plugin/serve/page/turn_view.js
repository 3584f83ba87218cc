/** View of a turn: its question with images, its answer with boxes. */

import { parseAnswer } from './answer_text.js';
import { element, icon, iconButton } from './dom.js';
import { BoxFigure } from './figure.js';
import { TextView } from './text_view.js';
import { clearWords, setWords } from './language.js';

export class TurnView {
  /**
   * @param {object} turn see conversation.js
   * @param {number} number of the turn, from 1
   * @param {object[]} images images of this turn and of all earlier ones
   * @param {object} callbacks
   * @param {() => void} callbacks.edit, callbacks.retry, callbacks.copy, callbacks.key: actions of the buttons; `key`
   *   lets the user enter an API key
   */
  constructor(turn, number, images, callbacks) {
    this.turn = turn;
    this.callbacks = callbacks;
    this.images = images;
    this.highlighted = { hover: [], focus: [] }; // numbers of boxes under the pointer and with the focus
    const highlights = {
      hover: (numbers) => this.#highlight({ hover: numbers }),
      focus: (numbers) => this.#highlight({ focus: numbers }),
    };
    const show = (box) => this.figure?.show(box);
    this.text = new TextView({ ...highlights, show, follow: (box) => this.figure?.focus(box) });
    const image = images.at(-1);
    const figureCallbacks = { ...highlights, follow: (box) => this.text.focus(box) };
    this.figure = image ? new BoxFigure(image, images.length, figureCallbacks) : null;

    this.waiting = element('p', { class: 'waiting', text: 'answering' });
    this.problem = element('div', { class: 'problem', role: 'alert' });
    this.note = element('p', { class: 'note' });
    this.copy = iconButton('copy', 'copy', callbacks.copy);
    this.retry = iconButton('retry', 'retry', callbacks.retry);
    this.tools = element('div', { class: 'turn-tools' }, this.copy, this.retry, this.note);
    this.answerBody = element('div', { class: 'answer-body' }, this.waiting, this.text.node, this.problem, this.tools);
    this.answer = element('article', { class: 'answer' }, heading('heading.answer', number), this.answerBody);
    this.node = element('section', { class: 'turn' }, this.#question(number), this.answer);
    this.update();
  }

  /** Update the view; `isLast`: whether the turn is the last one, which may be retried. */
  update(isLast = true) {
    const { text, state, error } = this.turn.answer;
    const running = state === 'running';
    const { segments, boxes } = parseAnswer(text, !running);
    this.text.update(segments);
    this.text.node.hidden = !text;
    this.waiting.hidden = !running || Boolean(text);
    this.answer.classList.toggle('running', running);
    this.tools.hidden = running;
    this.copy.hidden = !text;
    this.retry.hidden = !isLast || error !== null; // an error has a button of its own
    if (!running) this.#showNote();
    if (error !== this.shownError) this.#showError(error);
    if (!this.figure) return;
    this.figure.update(boxes);
    if (boxes.length && !this.figure.node.isConnected) this.answer.append(this.figure.node);
    if (!boxes.length) this.figure.node.remove();
    this.answer.classList.toggle('grounded', boxes.length > 0);
  }

  #question(number) {
    const { text, images } = this.turn.question;
    const nEarlierImages = this.images.length - images.length;
    const thumbs = images.map((image, index) => {
      const alt = ['image.alt', { number: nEarlierImages + index + 1, name: image.name }];
      return element('img', { src: image.url, width: image.width, height: image.height, alt });
    });
    const edit = iconButton('edit', 'edit', this.callbacks.edit);
    return element(
      'article',
      { class: 'question' },
      heading('heading.question', number),
      thumbs.length ? element('div', { class: 'thumbs' }, ...thumbs) : null,
      element('div', { class: 'question-text' }, edit, element('p', { class: 'words', dir: 'auto' }, text)),
    );
  }

  /** Highlight the boxes under the pointer, or if there are none the boxes with the focus. */
  #highlight(change) {
    Object.assign(this.highlighted, change);
    const { hover, focus } = this.highlighted;
    const numbers = hover.length ? hover : focus;
    this.text.highlight(numbers);
    this.figure?.highlight(numbers);
  }

  /** Show the note below an ended answer: why it ended early, that it is empty, or its tokens and seconds. */
  #showNote() {
    const { state, finish, usage, seconds, text } = this.turn.answer;
    if (state === 'stopped') setWords(this.note, 'text', 'answer.stopped');
    else if (finish === 'length') setWords(this.note, 'text', 'answer.length');
    else if (state === 'done' && !text) setWords(this.note, 'text', 'answer.empty');
    else if (usage) setWords(this.note, 'text', 'answer.usage', { tokens: usage.completion_tokens, seconds: seconds.toFixed(1) });
    else clearWords(this.note);
  }

  #showError(error) {
    this.shownError = error;
    this.problem.replaceChildren();
    if (!error) return;
    const { kind, seconds } = error;
    const hasRetryTime = seconds > 0 && ['busy', 'unready'].includes(kind);
    const words = hasRetryTime ? [`error.${kind}.seconds`, { seconds }] : `error.${kind}`;
    const { key, retry } = this.callbacks;
    const [onclick, iconName, label] = kind === 'key' ? [key, 'key', 'key.enter'] : [retry, 'retry', 'retry'];
    const button = element('button', { type: 'button', onclick }, icon(iconName), element('span', { text: label }));
    this.problem.append(
      element('p', { text: words }),
      error.detail ? element('p', { class: 'detail', lang: 'en' }, error.detail) : '',
      button,
    );
  }
}

/** Create a heading for screen readers. */
function heading(key, number) {
  return element('h2', { class: 'visually-hidden', text: [key, { number }] });
}
