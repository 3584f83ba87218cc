/** Text of an answer, with marked words that are highlighted together with their boxes. */

import { boxBadge } from './badge.js';
import { colour } from './boxes.js';
import { element } from './dom.js';

// Keeps a number on the line of its words.
const NO_BREAK = '\u2060';

export class TextView {
  /**
   * @param {object} on
   * @param {(numbers: number[]) => void} on.hover, on.focus: boxes under the pointer or focus, or []
   * @param {(number: number) => void} on.show: bring a box into view
   * @param {(number: number) => void} on.follow: move the focus to a box
   */
  constructor(on) {
    this.on = on;
    this.node = element('p', { class: 'words' });
    this.shown = [];
  }

  /** Show segments of answer_text.js. Unchanged nodes are kept, with focus and selection. */
  update(segments) {
    segments.forEach((segment, index) => {
      const there = this.shown[index];
      const isMark = segment.isRef || segment.boxes.length > 0;
      if (there && there.isMark === isMark) {
        if (isMark) this.#updateMark(there, segment);
        else if (there.node.data !== segment.text) there.node.data = segment.text;
        return;
      }
      const made = isMark ? this.#mark(segment) : { node: document.createTextNode(segment.text) };
      this.shown[index] = { ...made, isMark };
      if (there) there.node.replaceWith(made.node);
      else this.node.append(made.node);
    });
    for (const { node } of this.shown.splice(segments.length)) node.remove();
    // Chinese voice and glyphs, independent of the page's language.
    this.node.lang = /\p{Script=Han}/u.test(this.node.textContent) ? 'zh-Hans' : '';
  }

  light(numbers) {
    for (const { isMark, node, numbers: own } of this.shown) {
      if (isMark) node.classList.toggle('lit', own.some((number) => numbers.includes(number)));
    }
  }

  /** Move the focus to the words of a box. */
  focus(number) {
    const mark = this.shown.find(({ isMark, numbers }) => isMark && numbers.includes(number));
    mark?.node.focus({ preventScroll: true });
    mark?.node.scrollIntoView({ block: 'nearest' });
  }

  #mark(segment) {
    const words = document.createTextNode('');
    const badges = element('span', { class: 'badges' }, NO_BREAK);
    const made = { node: element('span', { class: 'ref' }, words, badges), words, badges, numbers: [] };
    this.#updateMark(made, segment);
    return made;
  }

  #updateMark(mark, { text, boxes }) {
    if (mark.words.data !== text) mark.words.data = text;
    if (!mark.numbers.length && boxes.length) this.#makeButton(mark, boxes[0]);
    for (const box of boxes.slice(mark.numbers.length)) {
      mark.numbers.push(box.number);
      mark.badges.append(boxBadge(box));
    }
  }

  #makeButton(mark, box) {
    const { node } = mark;
    const follow = () => this.on.follow(box.number);
    node.tabIndex = 0;
    node.setAttribute('role', 'button');
    node.classList.add('linked');
    colour(node, box);
    node.addEventListener('pointerenter', () => this.on.hover(mark.numbers));
    node.addEventListener('pointerleave', () => this.on.hover([]));
    node.addEventListener('focus', () => this.on.focus(mark.numbers));
    node.addEventListener('blur', () => this.on.focus([]));
    // Pointer clicks keep the focus; a screen reader's click moves it to the box, as a key does.
    node.addEventListener('click', (event) => (event.detail ? this.on.show(box.number) : follow()));
    node.addEventListener('keydown', (event) => {
      if (event.key !== 'Enter' && event.key !== ' ') return;
      event.preventDefault();
      follow();
    });
  }
}
