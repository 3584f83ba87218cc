/** Geometry and colours of boxes, and hit testing. */

/**
 * Colours of consecutive boxes: the palette of Okabe and Ito, distinguishable with any kind of colour vision. `rgb`
 * is the colour; `ink` is readable on it, and outlines the box on the image.
 */
const COLOURS = [
  { rgb: '0 114 178', ink: '255 255 255' },
  { rgb: '230 159 0', ink: '0 0 0' },
  { rgb: '0 158 115', ink: '0 0 0' },
  { rgb: '204 121 167', ink: '0 0 0' },
  { rgb: '213 94 0', ink: '0 0 0' },
  { rgb: '86 180 233', ink: '0 0 0' },
  { rgb: '240 228 66', ink: '0 0 0' },
];

export function colourOf(box) {
  return COLOURS[(box.number - 1) % COLOURS.length];
}

/** Give an element the colours of a box as --box and --box-ink. */
export function colour(element, box) {
  const { rgb, ink } = colourOf(box);
  element.style.setProperty('--box', rgb);
  element.style.setProperty('--box-ink', ink);
}

/** Corners in order around the shape, in thousandths. */
export function cornersOf({ kind, points }) {
  if (kind === 'quad') return points;
  const [[left, top], [right, bottom]] = points;
  return [
    [left, top],
    [right, top],
    [right, bottom],
    [left, bottom],
  ];
}

/** Left, top, right and bottom in thousandths. */
export function boundsOf({ points }) {
  const xs = points.map(([x]) => x);
  const ys = points.map(([, y]) => y);
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}

function areaOf(box) {
  const [left, top, right, bottom] = boundsOf(box);
  return (right - left) * (bottom - top);
}

/** Smallest box whose bounds contain the point (in thousandths), or null. */
export function boxAt(boxes, x, y) {
  const hits = boxes.filter((box) => {
    const [left, top, right, bottom] = boundsOf(box);
    return left <= x && x <= right && top <= y && y <= bottom;
  });
  return hits.sort((a, b) => areaOf(a) - areaOf(b))[0] ?? null;
}
