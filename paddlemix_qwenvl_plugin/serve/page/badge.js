/** Badge with the number of a box in its colour, in the text of an answer; figure.js has the badges on the image. */

import { colour } from './boxes.js';
import { element } from './dom.js';

export function boxBadge(box) {
  const badge = element('span', { class: 'badge' }, String(box.number));
  colour(badge, box);
  return badge;
}
