/** Export of an image with its boxes as a PNG file. */

import { boundsOf, colourOf, cornersOf } from './boxes.js';
import { saveFile } from './save.js';

// Labels would cover a small image: it is enlarged by an integer factor.
const LEAST_LONG_SIDE = 768;

/** Draw the image with outlines, numbers and words, and save it. */
export async function saveWithBoxes(image, boxes) {
  const canvas = await drawn(image, boxes);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, 'image/png'));
  saveFile(blob, `${image.name.replace(/\.[^.]*$/, '')}-boxes.png`);
}

async function drawn(image, boxes) {
  const img = new Image();
  img.src = image.url;
  await img.decode();
  const scale = Math.ceil(LEAST_LONG_SIDE / Math.max(image.width, image.height));
  const canvas = document.createElement('canvas');
  canvas.width = image.width * scale;
  canvas.height = image.height * scale;
  const context = canvas.getContext('2d');
  context.drawImage(img, 0, 0, canvas.width, canvas.height);
  for (const box of boxes) outline(context, box);
  for (const box of boxes) label(context, box);
  return canvas;
}

function outline(context, box) {
  const { width, height } = context.canvas;
  const { rgb, ink } = colourOf(box);
  const line = Math.max(3, Math.round(Math.max(width, height) / 250));
  context.beginPath();
  for (const [x, y] of cornersOf(box)) context.lineTo((x * width) / 1000, (y * height) / 1000);
  context.closePath();
  context.lineJoin = 'round';
  for (const [style, thickness] of [[`rgb(${ink} / 0.7)`, line + 2], [`rgb(${rgb})`, line]]) {
    context.strokeStyle = style;
    context.lineWidth = thickness;
    context.stroke();
  }
}

function label(context, box) {
  const { width, height } = context.canvas;
  const { rgb, ink } = colourOf(box);
  const size = Math.max(16, Math.round(Math.max(width, height) / 45));
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textBaseline = 'middle';
  const room = width - size;
  const words = box.ref ? `${box.number}  ${box.ref}` : String(box.number);
  const patch = [Math.min(context.measureText(words).width, room) + size * 0.8, size * 1.5];
  const [left, top] = boundsOf(box);
  const x = Math.min((left * width) / 1000, width - patch[0]);
  const above = (top * height) / 1000 - patch[1];
  const y = above >= 0 ? above : Math.min((top * height) / 1000, height - patch[1]);
  context.fillStyle = `rgb(${rgb})`;
  context.fillRect(Math.max(x, 0), y, ...patch);
  context.fillStyle = `rgb(${ink})`;
  context.fillText(words, Math.max(x, 0) + size * 0.4, y + patch[1] / 2, room);
}
