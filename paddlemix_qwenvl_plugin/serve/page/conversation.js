/** Conversation: turns of a question with images and its answer. */

import { parseAnswer } from './answer_text.js';

/**
 * A turn is { question: { text, images }, answer }, with images of image_file.js. An answer is
 * { text, state, error, finish, usage, seconds }: `state` is "running", "done", "stopped" or "failed", `error` a
 * ServerError or null, `finish` the finish reason and `usage` the server's token counts (null until they arrive),
 * `seconds` the duration (null while running).
 */
export class Conversation {
  turns = [];

  /** Add a turn with an empty answer. */
  add(question) {
    const turn = { question, answer: null };
    this.restart(turn);
    this.turns.push(turn);
    return turn;
  }

  /** Replace a turn's answer by an empty one that is running. */
  restart(turn) {
    turn.answer = { text: '', state: 'running', error: null, finish: null, usage: null, seconds: null };
  }

  /** Images of a turn and of all earlier ones, oldest first. The boxes of the turn's answer refer to the last image. */
  imagesUpTo(turn) {
    return this.turns.slice(0, this.turns.indexOf(turn) + 1).flatMap(({ question }) => question.images);
  }

  /**
   * Messages that request a turn's answer, in OpenAI's format.
   *
   * An earlier question whose answer has no text is omitted. Its images are sent with the next question: the user sees
   * them above that question.
   */
  messagesFor(turn) {
    const messages = [];
    let images = [];
    for (const { question, answer } of this.turns.slice(0, this.turns.indexOf(turn))) {
      images.push(...question.images);
      if (!answer.text) continue;
      messages.push(userMessage(images, question.text), { role: 'assistant', content: answer.text });
      images = [];
    }
    messages.push(userMessage([...images, ...turn.question.images], turn.question.text));
    return messages;
  }

  /** The whole conversation for export: messages in OpenAI's format, with the boxes of answers. */
  exported(model) {
    const messages = this.turns.flatMap((turn) => [
      userMessage(turn.question.images, turn.question.text),
      ...(turn.answer.text ? [this.#assistantMessage(turn)] : []),
    ]);
    return { model, messages };
  }

  #assistantMessage(turn) {
    const image = this.imagesUpTo(turn).at(-1);
    const toPixels = ([x, y]) => [(x * image.width) / 1000, (y * image.height) / 1000];
    const boxes = parseAnswer(turn.answer.text).boxes.map(({ kind, ref, points }) => ({
      kind,
      ref,
      points,
      pixels: image ? points.map(toPixels) : null,
    }));
    return { role: 'assistant', content: turn.answer.text, boxes };
  }
}

function userMessage(images, text) {
  if (!images.length) return { role: 'user', content: text };
  const parts = images.map(({ url }) => ({ type: 'image_url', image_url: { url } }));
  return { role: 'user', content: [...parts, { type: 'text', text }] };
}
