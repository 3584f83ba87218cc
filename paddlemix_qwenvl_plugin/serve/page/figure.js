/** Image with an answer's boxes drawn on it. */

import { boundsOf, boxAt, colour, cornersOf } from './boxes.js';
import { element, iconButton, svg } from './dom.js';
import { setWords } from './language.js';
import { saveWithBoxes } from './png.js';

export class BoxFigure {
  /**
   * @param {object} image of image_file.js
   * @param {number} number of the image in the conversation, from 1
   * @param {object} on as in text_view.js; `hover` and `focus` get one number, or none
   */
  constructor(image, number, on) {
    this.image = image;
    this.number = number;
    this.on = on;
    this.boxes = [];
    this.drawn = [];
    this.img = element('img', { src: image.url, width: image.width, height: image.height });
    this.shapes = svg('svg', { viewBox: '0 0 1000 1000', preserveAspectRatio: 'none', 'aria-hidden': 'true' });
    this.frame = element('div', { class: 'frame' }, this.img, this.shapes);
    this.frame.style.setProperty('--ratio', String(image.width / image.height));
    this.frame.addEventListener('pointermove', (event) => this.#point(event, on.hover));
    this.frame.addEventListener('pointerleave', () => on.hover([]));
    this.frame.addEventListener('click', (event) => this.#point(event, ([number]) => number && this.focus(number)));
    const save = iconButton('save', 'save.image', () => saveWithBoxes(this.image, this.boxes));
    const caption = element('span', { class: 'caption', text: ['figure.caption', { number, name: image.name }] });
    this.node = element('figure', {}, this.frame, element('figcaption', {}, caption, save));
  }

  /** Show boxes of answer_text.js; existing ones are kept unless the answer restarted. */
  update(boxes) {
    this.boxes = boxes;
    if (boxes.length < this.drawn.length) this.#clear();
    for (const box of boxes.slice(this.drawn.length)) this.#draw(box);
    const { number } = this;
    setWords(this.img, 'alt', 'figure.alt', { number, name: this.image.name, boxes: boxes.length });
  }

  light(numbers) {
    this.frame.classList.toggle('dimmed', numbers.length > 0);
    for (const { box, shape, badge } of this.drawn) {
      const lit = numbers.includes(box.number);
      shape.classList.toggle('lit', lit);
      badge.classList.toggle('lit', lit);
    }
  }

  /** Bring a box into view. */
  show(number) {
    this.drawn[number - 1].badge.scrollIntoView({ block: 'nearest' });
  }

  /** Move the focus to a box. */
  focus(number) {
    this.drawn[number - 1].badge.focus({ preventScroll: true });
    this.show(number);
  }

  #clear() {
    for (const { shape, badge } of this.drawn.splice(0)) {
      shape.remove();
      badge.remove();
    }
  }

  #draw(box) {
    const points = cornersOf(box).join(' ');
    const shape = svg('g', { class: 'box' }, svg('polygon', { class: 'halo', points }), svg('polygon', { class: 'line', points }));
    colour(shape, box);
    this.shapes.append(shape);
    const badge = this.#badge(box);
    this.frame.append(badge);
    this.drawn.push({ box, shape, badge });
  }

  /** Badge with the number at the top left corner; its words open towards the middle of the image. */
  #badge(box) {
    const { number, ref } = box;
    const label = ref ? ['box.words', { number, words: ref }] : ['box.bare', { number }];
    const badge = element('button', { type: 'button', class: 'box-badge', label }, element('span', { class: 'badge' }, String(number)));
    if (ref) badge.firstChild.append(element('span', { class: 'badge-words' }, ref));
    colour(badge, box);
    const [left, top] = boundsOf(box);
    badge.style.setProperty('--x', String(left / 1000));
    badge.style.setProperty('--y', String(top / 1000));
    badge.classList.toggle('right', left > 500);
    badge.addEventListener('focus', () => this.on.focus([number]));
    badge.addEventListener('blur', () => this.on.focus([]));
    badge.addEventListener('click', (event) => {
      event.stopPropagation();
      if (event.detail) badge.focus();
      else this.on.follow(number); // by keyboard: focus the words
    });
    return badge;
  }

  /** Report the box under the pointer: that of the badge, else the smallest box that contains the point. */
  #point(event, then) {
    const own = this.drawn.find(({ badge }) => badge.contains(event.target));
    const { left, top, width, height } = this.img.getBoundingClientRect();
    const x = ((event.clientX - left) / width) * 1000;
    const y = ((event.clientY - top) / height) * 1000;
    const box = own?.box ?? boxAt(this.boxes, x, y);
    then(box ? [box.number] : []);
  }
}
