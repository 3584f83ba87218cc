/**
 * Parser of the model's tags in an answer: `<ref>a dog</ref><box>(1,2),(3,4)</box>`. The server's `boxes` do not say
 * where in the text they belong, so the page parses the text itself, by the rules of processing/boxes.py.
 */

const TAG = /<(\/?)(ref|box|quad)>/g;
const POINT = String.raw`\(\s*(-?[0-9]{1,6})\s*,\s*(-?[0-9]{1,6})\s*\)`;
const POINTS = {
  box: new RegExp(`^\\s*${[POINT, POINT].join('\\s*,\\s*')}\\s*$`),
  quad: new RegExp(`^\\s*${[POINT, POINT, POINT, POINT].join('\\s*,\\s*')}\\s*$`),
};
// Coordinates to omit after an opening tag without its closing tag, as in the last box of a streamed answer.
const COORDINATES = /[\s0-9(),-]*/y;
const TAGS = ['<ref>', '</ref>', '<box>', '</box>', '<quad>', '</quad>'];

/**
 * Parse an answer.
 *
 * A segment is { text, isRef, boxes }: text between tags, or the text of a `<ref>` with its boxes. A box without a
 * ref is a segment with empty text.
 *
 * A box is { number, kind, points, ref }. `number` counts the boxes of the answer from 1; `kind` is "box" or "quad";
 * `points` are [x, y] in thousandths of the image's width and height; `ref` is the text of its `<ref>`, or null.
 *
 * @param {string} text with tags
 * @param {boolean} complete false: more text may follow, and an incomplete tag at the end is omitted
 * @returns {{segments: object[], boxes: object[]}}
 */
export function parseAnswer(text, complete = true) {
  const source = complete ? text : withoutIncompleteTag(text);
  const segments = [];
  const boxes = [];
  let ref = null; // segment of the <ref> to which the next box belongs
  const addText = (words) => {
    if (!words) return;
    const last = segments.at(-1);
    if (last && !last.isRef && !last.boxes.length) last.text += words;
    else segments.push({ text: words, isRef: false, boxes: [] });
  };
  const tags = [...source.matchAll(TAG)];
  let position = 0;
  let next = 0;
  while (next < tags.length) {
    const tag = tags[next++];
    const textBefore = source.slice(position, tag.index);
    addText(textBefore);
    if (textBefore.trim()) ref = null;
    position = tag.index + tag[0].length;
    const [, closing, kind] = tag;
    const end = tags[next];
    if (closing || end?.[0] !== `</${kind}>`) { // no pair of an opening and a closing tag: omitted
      ref = null;
      if (!closing && kind !== 'ref') {
        COORDINATES.lastIndex = position;
        position += COORDINATES.exec(source)[0].length;
      }
      continue;
    }
    next++;
    const content = source.slice(position, end.index);
    position = end.index + end[0].length;
    if (kind === 'ref') {
      ref = content.trim() ? { text: content, isRef: true, boxes: [] } : null;
      if (ref) segments.push(ref);
      else addText(content);
      continue;
    }
    const values = POINTS[kind].exec(content)?.slice(1).map(Number);
    if (!values) continue;
    const box = { number: boxes.length + 1, kind, points: pointsOf(kind, values), ref: ref ? ref.text.trim() : null };
    boxes.push(box);
    if (ref) ref.boxes.push(box);
    else segments.push({ text: '', isRef: false, boxes: [box] });
  }
  addText(source.slice(position));
  return { segments, boxes };
}

/** Text of an answer without tags and boxes. */
export function plainText(text) {
  return parseAnswer(text).segments.map((segment) => segment.text).join('').trim();
}

function withoutIncompleteTag(text) {
  const start = text.lastIndexOf('<');
  if (start < 0) return text;
  const end = text.slice(start);
  const isIncompleteTag = TAGS.some((tag) => tag.startsWith(end) && tag !== end);
  return isIncompleteTag ? text.slice(0, start) : text;
}

/** Points clamped to the image; for a box the top left and the bottom right corner, for a quad all in their order. */
function pointsOf(kind, values) {
  const clamped = values.map((value) => Math.min(Math.max(value, 0), 1000));
  const points = [];
  for (let i = 0; i < clamped.length; i += 2) points.push([clamped[i], clamped[i + 1]]);
  if (kind === 'quad') return points;
  const [[x1, y1], [x2, y2]] = points;
  return [
    [Math.min(x1, x2), Math.min(y1, y2)],
    [Math.max(x1, x2), Math.max(y1, y2)],
  ];
}
