/** Figure of an answer: the last image of the conversation so far, to which its boxes refer, with the boxes drawn. */

import { boundsOf, boxAt, colour, cornersOf } from './boxes.js';
import { element, iconButton, svg } from './dom.js';
import { setWords } from './language.js';
import { saveWithBoxes } from './png.js';

export class BoxFigure {
  /**
   * @param {object} image see readImage of image_file.js
   * @param {number} number of the image in the conversation, from 1
   * @param {object} callbacks
   * @param {(numbers: number[]) => void} callbacks.hover, callbacks.focus: called with [number] of the box that is under
   *   the pointer or has the focus, or with []
   * @param {(number: number) => void} callbacks.follow: move the focus to the words of a box
   */
  constructor(image, number, callbacks) {
    this.image = image;
    this.number = number;
    this.callbacks = callbacks;
    this.boxes = [];
    this.drawn = []; // { box, shape, badge } of each drawn box
    this.img = element('img', { src: image.url, width: image.width, height: image.height });
    this.shapes = svg('svg', { viewBox: '0 0 1000 1000', preserveAspectRatio: 'none', 'aria-hidden': 'true' });
    this.frame = element('div', { class: 'frame' }, this.img, this.shapes);
    this.frame.style.setProperty('--ratio', String(image.width / image.height));
    this.frame.addEventListener('pointermove', (event) => this.#reportBoxAt(event, callbacks.hover));
    this.frame.addEventListener('pointerleave', () => callbacks.hover([]));
    this.frame.addEventListener('click', (event) => this.#reportBoxAt(event, ([box]) => box && this.focus(box)));
    const save = iconButton('save', 'save.image', () => saveWithBoxes(this.image, this.boxes));
    const caption = element('span', { class: 'caption', text: ['figure.caption', { number, name: image.name }] });
    this.node = element('figure', {}, this.frame, element('figcaption', {}, caption, save));
  }

  /** Show the boxes of an answer (see answer_text.js). Drawn boxes are kept, unless the answer has restarted. */
  update(boxes) {
    this.boxes = boxes;
    if (boxes.length < this.drawn.length) this.#clear();
    for (const box of boxes.slice(this.drawn.length)) this.#draw(box);
    const { number } = this;
    setWords(this.img, 'alt', 'figure.alt', { number, name: this.image.name, boxes: boxes.length });
  }

  /** Highlight the boxes with these numbers and dim the other ones; with no numbers, show all alike. */
  highlight(numbers) {
    this.frame.classList.toggle('dimmed', numbers.length > 0);
    for (const { box, shape, badge } of this.drawn) {
      const isHighlighted = numbers.includes(box.number);
      shape.classList.toggle('highlighted', isHighlighted);
      badge.classList.toggle('highlighted', isHighlighted);
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

  /** Create the badge at a box's top left corner. If highlighted, it also shows the words, towards the image's middle. */
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
    badge.addEventListener('focus', () => this.callbacks.focus([number]));
    badge.addEventListener('blur', () => this.callbacks.focus([]));
    badge.addEventListener('click', (event) => {
      event.stopPropagation();
      if (event.detail) badge.focus(); // a pointer's click
      else this.callbacks.follow(number); // the keyboard's click
    });
    return badge;
  }

  /**
   * Call `report` with the number of the box under the pointer, in a list, or with []. It is the box whose badge is
   * under the pointer, else the smallest box whose bounds contain the point.
   */
  #reportBoxAt(event, report) {
    const withBadge = this.drawn.find(({ badge }) => badge.contains(event.target));
    const { left, top, width, height } = this.img.getBoundingClientRect();
    const x = ((event.clientX - left) / width) * 1000;
    const y = ((event.clientY - top) / height) * 1000;
    const box = withBadge?.box ?? boxAt(this.boxes, x, y);
    report(box ? [box.number] : []);
  }
}
