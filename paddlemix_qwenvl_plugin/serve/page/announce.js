/** Announcements for screen readers: answers when they have ended (not single tokens), and events such as a copy. */

import { parseAnswer, plainText } from './answer_text.js';
import { byId } from './dom.js';
import { textOf } from './language.js';

export function announce(text) {
  byId('announcer').textContent = text;
}

/** Announce an answer (see conversation.js) that has ended. */
export function announceEnd({ state, text }) {
  if (state === 'failed') announce(''); // the error is announced as an alert
  else if (state === 'stopped') announce(textOf('answer.stopped'));
  else {
    const boxes = parseAnswer(text).boxes.length;
    const words = plainText(text) || textOf('answer.empty');
    announce(boxes ? textOf('answer.boxes', { boxes, text: words }) : textOf('answer.announced', { text: words }));
  }
}
