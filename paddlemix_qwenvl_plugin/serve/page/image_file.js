/** Images as the page sends them: redrawn, at most LONG_SIDE pixels long, without metadata such as a place. */

// Three times what the model sees; boxes are in thousandths, so they stay where they are.
const LONG_SIDE = 1344;
// A longer PNG is sent as a JPEG.
const PNG_CHARACTERS = 2_000_000;
const JPEG_QUALITY = 0.9;

/**
 * Read an image file: { url, width, height, name }, `url` a data URL.
 *
 * @param {File} file
 * @throws what the browser says if it cannot open it
 */
export async function readImage(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: 'from-image' });
  const scale = Math.min(1, LONG_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext('2d');
  // What is transparent shows as white here, so that the model sees it as the user does.
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
  return png.length <= PNG_CHARACTERS ? png : jpeg();
}
