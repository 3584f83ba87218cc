/** Screen reader announcements: complete answers, not single tokens. */

import { parseAnswer, plainText } from './answer_text.js';
import { byId } from './dom.js';
import { say } from './language.js';

export function announce(text) {
  byId('announcer').textContent = text;
}

/** Announce the end of an answer of conversation.js. */
export function announceEnd({ state, text }) {
  if (state === 'failed') announce(''); // its error is an alert
  else if (state === 'stopped') announce(say('answer.stopped'));
  else {
    const { length } = parseAnswer(text).boxes;
    const words = plainText(text) || say('answer.empty');
    announce(length ? say('answer.boxes', { boxes: length, text: words }) : say('answer.announced', { text: words }));
  }
}
