/**
 * Parser of the model's tags in an answer: `<ref>a dog</ref><box>(1,2),(3,4)</box>`. It follows the rules of
 * processing/boxes.py, so that the boxes equal the server's `boxes`, which lack the assignment to words.
 */

const TAG = /<(\/?)(ref|box|quad)>/g;
const POINT = String.raw`\(\s*(-?[0-9]{1,6})\s*,\s*(-?[0-9]{1,6})\s*\)`;
const POINTS = {
  box: new RegExp(`^\\s*${[POINT, POINT].join('\\s*,\\s*')}\\s*$`),
  quad: new RegExp(`^\\s*${[POINT, POINT, POINT, POINT].join('\\s*,\\s*')}\\s*$`),
};
// Incomplete box at the end of a streamed answer.
const COORDINATES = /[\s0-9(),-]*/y;
const TAGS = ['<ref>', '</ref>', '<box>', '</box>', '<quad>', '</quad>'];

/**
 * Parse an answer.
 *
 * A segment is { text, isRef, boxes }: text between tags, or the text of a `<ref>` with its boxes; a
 * box without ref is a segment with empty text. A box is { number, kind, points, ref }: its index in the answer
 * from 1, "box" or "quad", [x, y] in thousandths of the image's width and height, its words or null.
 *
 * @param {string} text with tags
 * @param {boolean} whole false: more text may follow, and an incomplete tag is omitted
 * @returns {{segments: object[], boxes: object[]}}
 */
export function parseAnswer(text, whole = true) {
  const known = whole ? text : withoutTagBegun(text);
  const segments = [];
  const boxes = [];
  let ref = null;
  const addText = (words) => {
    if (!words) return;
    const last = segments.at(-1);
    if (last && !last.isRef && !last.boxes.length) last.text += words;
    else segments.push({ text: words, isRef: false, boxes: [] });
  };
  const tags = [...known.matchAll(TAG)];
  let position = 0;
  let next = 0;
  while (next < tags.length) {
    const tag = tags[next++];
    const between = known.slice(position, tag.index);
    addText(between);
    if (between.trim()) ref = null;
    position = tag.index + tag[0].length;
    const [, closing, kind] = tag;
    const end = tags[next];
    if (closing || end?.[0] !== `</${kind}>`) {
      ref = null;
      if (!closing && kind !== 'ref') {
        COORDINATES.lastIndex = position;
        position += COORDINATES.exec(known)[0].length;
      }
      continue;
    }
    next++;
    const content = known.slice(position, end.index);
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
  addText(known.slice(position));
  return { segments, boxes };
}

/** Text of an answer without tags and boxes. */
export function plainText(text) {
  return parseAnswer(text).segments.map((segment) => segment.text).join('').trim();
}

function withoutTagBegun(text) {
  const start = text.lastIndexOf('<');
  return start >= 0 && TAGS.some((tag) => tag.startsWith(text.slice(start))) && !TAGS.includes(text.slice(start))
    ? text.slice(0, start)
    : text;
}

/** Corners, clamped to the image; those of a box ordered, top left first. */
function pointsOf(kind, values) {
  const inside = values.map((value) => Math.min(Math.max(value, 0), 1000));
  const points = [];
  for (let i = 0; i < inside.length; i += 2) points.push([inside[i], inside[i + 1]]);
  if (kind === 'quad') return points;
  const [[x1, y1], [x2, y2]] = points;
  return [
    [Math.min(x1, x2), Math.min(y1, y2)],
    [Math.max(x1, x2), Math.max(y1, y2)],
  ];
}
