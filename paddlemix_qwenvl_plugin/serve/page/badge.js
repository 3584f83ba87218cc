/** Badge with the number of a box in its colour. */

import { colour } from './boxes.js';
import { element } from './dom.js';

export function boxBadge(box) {
  const badge = element('span', { class: 'badge' }, String(box.number));
  colour(badge, box);
  return badge;
}
