/** Input of a question: text, images, send and stop. */

import { byId, element, iconButton } from './dom.js';
import { readImage } from './image_file.js';
import { setWords } from './language.js';
import { closeNotice, notice } from './notice.js';

const form = byId('composer');
const field = byId('question');

export class Composer {
  /**
   * @param {object} callbacks
   * @param {(question: {text: string, images: object[]}) => void} callbacks.send images: results of readImage()
   * @param {() => void} callbacks.stop
   */
  constructor(callbacks) {
    this.callbacks = callbacks;
    this.images = [];
    this.running = false;
    this.reading = Promise.resolve(); // resolved once all attached files are read
    form.addEventListener('submit', (event) => {
      event.preventDefault();
      this.send();
    });
    field.addEventListener('input', () => this.#show());
    field.addEventListener('keydown', (event) => {
      // While an input method composes a character (as for Chinese), Enter accepts its suggestion. Some browsers
      // report this as key code 229 only.
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      this.send();
    });
    byId('stop').addEventListener('click', callbacks.stop);
    byId('attach').addEventListener('click', () => byId('files').click());
    // On a phone the camera button opens `capture` (camera.js).
    for (const input of [byId('files'), byId('capture')]) {
      input.addEventListener('change', () => {
        this.attach([...input.files]);
        input.value = '';
      });
    }
  }

  /** Attach image files to the question, in order. */
  attach(files) {
    for (const file of files) {
      this.reading = this.reading.then(() => this.#read(file));
    }
  }

  /** Send the question, once its images are read; no effect without text or while an answer is running. */
  async send() {
    await this.reading;
    const text = field.value.trim();
    if (!text || this.running) return;
    const question = { text, images: this.images };
    this.fill({ text: '', images: [] });
    closeNotice();
    // On a phone the keyboard would cover the answer.
    if (matchMedia('(pointer: coarse)').matches) field.blur();
    this.callbacks.send(question);
  }

  /** Replace the question's text and images. */
  fill({ text, images }) {
    field.value = text;
    this.images = [...images];
    this.#show();
  }

  /** The text and images that have not been sent. */
  get draft() {
    return { text: field.value, images: this.images };
  }

  /** Set whether an answer is running; meanwhile the send button is replaced by a stop button. */
  setRunning(running) {
    const hadFocus = document.activeElement === byId('send') || document.activeElement === byId('stop');
    this.running = running;
    byId('send').hidden = running;
    byId('stop').hidden = !running;
    if (hadFocus) field.focus(); // the focused button may be hidden now
  }

  focus() {
    field.focus();
  }

  async #read(file) {
    try {
      this.images.push(await readImage(file));
      this.#show();
    } catch {
      // The notice has no reason, since browsers give none.
      notice(['image.problem', { name: file.name }]);
    }
  }

  #remove(image) {
    this.images = this.images.filter((other) => other !== image);
    this.#show();
    field.focus();
  }

  #show() {
    byId('send').disabled = !field.value.trim();
    const list = byId('attached');
    list.hidden = !this.images.length;
    list.replaceChildren(
      ...this.images.map((image) => {
        const button = iconButton('close', 'dismiss', () => this.#remove(image));
        setWords(button, 'label', 'remove', { name: image.name }); // iconButton() takes no values
        const thumbnail = element('img', { src: image.url });
        thumbnail.alt = image.name; // not an argument of element(), which would look it up among the page's texts
        return element('li', {}, thumbnail, button);
      }),
    );
    // The field grows with its text up to the limit of the style sheet.
    field.style.height = 'auto';
    field.style.height = `${field.scrollHeight}px`;
  }
}
