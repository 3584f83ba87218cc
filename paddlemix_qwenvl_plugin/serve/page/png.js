/** Export of an image with its boxes as a PNG file. */

import { boundsOf, colourOf, cornersOf } from './boxes.js';
import { saveFile } from './save.js';

// In pixels. A smaller image is enlarged by an integer factor, since the labels would cover it.
const MIN_LONG_SIDE = 768;

/** Save the image with the outlines, numbers and words of the boxes. */
export async function saveWithBoxes(image, boxes) {
  const canvas = await draw(image, boxes);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, 'image/png'));
  saveFile(blob, `${image.name.replace(/\.[^.]*$/, '')}-boxes.png`);
}

async function draw(image, boxes) {
  const img = new Image();
  img.src = image.url;
  await img.decode();
  const scale = Math.ceil(MIN_LONG_SIDE / Math.max(image.width, image.height));
  const canvas = document.createElement('canvas');
  canvas.width = image.width * scale;
  canvas.height = image.height * scale;
  const context = canvas.getContext('2d');
  context.drawImage(img, 0, 0, canvas.width, canvas.height);
  for (const box of boxes) drawOutline(context, box);
  for (const box of boxes) drawLabel(context, box);
  return canvas;
}

function drawOutline(context, box) {
  const { width, height } = context.canvas;
  const { rgb, ink } = colourOf(box);
  const lineWidth = Math.max(3, Math.round(Math.max(width, height) / 250));
  context.beginPath();
  for (const [x, y] of cornersOf(box)) context.lineTo((x * width) / 1000, (y * height) / 1000);
  context.closePath();
  context.lineJoin = 'round';
  // The line in the box's colour, on a wider line that contrasts with it.
  for (const [style, strokeWidth] of [[`rgb(${ink} / 0.7)`, lineWidth + 2], [`rgb(${rgb})`, lineWidth]]) {
    context.strokeStyle = style;
    context.lineWidth = strokeWidth;
    context.stroke();
  }
}

function drawLabel(context, box) {
  const { width, height } = context.canvas;
  const { rgb, ink } = colourOf(box);
  const fontSize = Math.max(16, Math.round(Math.max(width, height) / 45));
  context.font = `600 ${fontSize}px system-ui, sans-serif`;
  context.textBaseline = 'middle';
  const maxTextWidth = width - fontSize;
  const words = box.ref ? `${box.number}  ${box.ref}` : String(box.number);
  const padding = fontSize * 0.4;
  const labelWidth = Math.min(context.measureText(words).width, maxTextWidth) + 2 * padding;
  const labelHeight = fontSize * 1.5;
  const [left, top] = boundsOf(box);
  // The label is above the box's top left corner, or below it if there is no room above; it stays inside the image.
  const x = Math.max(Math.min((left * width) / 1000, width - labelWidth), 0);
  const boxTop = (top * height) / 1000;
  const y = boxTop >= labelHeight ? boxTop - labelHeight : Math.min(boxTop, height - labelHeight);
  context.fillStyle = `rgb(${rgb})`;
  context.fillRect(x, y, labelWidth, labelHeight);
  context.fillStyle = `rgb(${ink})`;
  context.fillText(words, x + padding, y + labelHeight / 2, maxTextWidth);
}
