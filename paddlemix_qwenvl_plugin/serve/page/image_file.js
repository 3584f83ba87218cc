/** Image files prepared for sending: longer side at most LONG_SIDE pixels, no metadata such as a location. */

// Three times the input size of Qwen-VL; boxes are in thousandths and unaffected.
export const LONG_SIDE = 1344;
// Maximum length of a PNG's data URL; a longer one is replaced by a JPEG.
const MAX_PNG_CHARACTERS = 2_000_000;
const JPEG_QUALITY = 0.9;

/**
 * Read an image file as { url, width, height, name }. `url` is a data URL.
 *
 * @param {File} file
 * @throws the browser's error if it cannot decode the file
 */
export async function readImage(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: 'from-image' });
  const scale = Math.min(1, LONG_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext('2d');
  // Transparency becomes white, as on the server; in a JPEG it would become black.
  context.fillStyle = '#fff';
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = 'high';
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return { url: urlOf(canvas, file.type), width: canvas.width, height: canvas.height, name: file.name };
}

function urlOf(canvas, type) {
  const jpeg = () => canvas.toDataURL('image/jpeg', JPEG_QUALITY);
  if (type === 'image/jpeg') return jpeg();
  const png = canvas.toDataURL('image/png');
  return png.length <= MAX_PNG_CHARACTERS ? png : jpeg();
}
