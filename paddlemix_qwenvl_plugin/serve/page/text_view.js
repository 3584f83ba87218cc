/** Text of an answer. Words that have boxes are marked, and highlighted together with their boxes. */

import { boxBadge } from './badge.js';
import { colour } from './boxes.js';
import { element } from './dom.js';

// Word joiner: a box's number stays on the line of its words.
const NO_BREAK = '\u2060';

export class TextView {
  /**
   * @param {object} callbacks
   * @param {(numbers: number[]) => void} callbacks.hover, callbacks.focus: called with the numbers of the boxes whose
   *   words are under the pointer or have the focus, or with []
   * @param {(number: number) => void} callbacks.show: bring a box into view
   * @param {(number: number) => void} callbacks.follow: move the focus to a box
   */
  constructor(callbacks) {
    this.callbacks = callbacks;
    this.node = element('p', { class: 'words' });
    // { node, isMark } for each segment. A mark, the part of a <ref> or a box, also has words, badges and numbers.
    this.parts = [];
  }

  /** Show the segments of an answer (see answer_text.js). Unchanged nodes are kept, with their focus and selection. */
  update(segments) {
    segments.forEach((segment, index) => {
      const part = this.parts[index];
      const isMark = segment.isRef || segment.boxes.length > 0;
      if (part && part.isMark === isMark) {
        if (isMark) this.#updateMark(part, segment);
        else if (part.node.data !== segment.text) part.node.data = segment.text;
        return;
      }
      const newPart = isMark ? this.#createMark(segment) : { node: document.createTextNode(segment.text) };
      this.parts[index] = { ...newPart, isMark };
      if (part) part.node.replaceWith(newPart.node);
      else this.node.append(newPart.node);
    });
    for (const { node } of this.parts.splice(segments.length)) node.remove();
    // The language of the answer, for a screen reader's voice and for glyphs; the page's may be another one.
    this.node.lang = /\p{Script=Han}/u.test(this.node.textContent) ? 'zh-Hans' : '';
  }

  /** Highlight the words of the boxes with these numbers. */
  highlight(numbers) {
    for (const part of this.parts) {
      if (part.isMark) part.node.classList.toggle('highlighted', part.numbers.some((number) => numbers.includes(number)));
    }
  }

  /** Move the focus to the words of a box. */
  focus(number) {
    const mark = this.parts.find(({ isMark, numbers }) => isMark && numbers.includes(number));
    mark?.node.focus({ preventScroll: true });
    mark?.node.scrollIntoView({ block: 'nearest' });
  }

  #createMark(segment) {
    const words = document.createTextNode('');
    const badges = element('span', { class: 'badges' }, NO_BREAK);
    const mark = { node: element('span', { class: 'ref' }, words, badges), words, badges, numbers: [] };
    this.#updateMark(mark, segment);
    return mark;
  }

  #updateMark(mark, { text, boxes }) {
    if (mark.words.data !== text) mark.words.data = text;
    if (!mark.numbers.length && boxes.length) this.#makeButton(mark, boxes[0]);
    for (const box of boxes.slice(mark.numbers.length)) {
      mark.numbers.push(box.number);
      mark.badges.append(boxBadge(box));
    }
  }

  /** Turn a mark into a button that leads to its first box. */
  #makeButton(mark, box) {
    const { node } = mark;
    const follow = () => this.callbacks.follow(box.number);
    node.tabIndex = 0;
    node.setAttribute('role', 'button');
    node.classList.add('has-boxes');
    colour(node, box);
    node.addEventListener('pointerenter', () => this.callbacks.hover(mark.numbers));
    node.addEventListener('pointerleave', () => this.callbacks.hover([]));
    node.addEventListener('focus', () => this.callbacks.focus(mark.numbers));
    node.addEventListener('blur', () => this.callbacks.focus([]));
    // A pointer's click only brings the box into view. A screen reader's click (detail 0) moves the focus to it, as a
    // key does.
    node.addEventListener('click', (event) => (event.detail ? this.callbacks.show(box.number) : follow()));
    node.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' && event.key !== ' ') return;
      event.preventDefault();
      follow();
    });
  }
}
