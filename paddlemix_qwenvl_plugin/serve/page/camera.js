/** Images from the camera, taken with the phone's camera app, or in a dialog on a desktop. */

import { byId } from './dom.js';
import { LONG_SIDE } from './image_file.js';
import { notice } from './notice.js';

/**
 * Set up the camera button. `attach` is called with a list of one image file from the dialog; a file from the camera
 * app is attached by composer.js.
 */
export function startCamera(attach) {
  const button = byId('camera');
  const dialog = byId('camera-dialog');
  const viewfinder = byId('viewfinder');
  const shutter = byId('shutter');
  let stream = null;

  const touch = matchMedia('(pointer: coarse)').matches;
  if (touch) {
    button.addEventListener('click', () => byId('capture').click());
    return;
  }
  if (!navigator.mediaDevices) {
    button.hidden = true; // browsers give no camera access to a page of another machine over plain HTTP
    return;
  }
  button.addEventListener('click', async () => {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: LONG_SIDE } } });
    } catch {
      notice('camera.problem'); // no camera, in use, or permission denied
      return;
    }
    shutter.disabled = true;
    dialog.showModal();
    viewfinder.srcObject = stream;
    await viewfinder.play();
    shutter.disabled = false;
    shutter.focus();
  });
  shutter.addEventListener('click', async () => {
    const canvas = document.createElement('canvas');
    canvas.width = viewfinder.videoWidth;
    canvas.height = viewfinder.videoHeight;
    canvas.getContext('2d').drawImage(viewfinder, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, 'image/jpeg', 0.95));
    dialog.close();
    attach([new File([blob], 'camera.jpg', { type: 'image/jpeg' })]);
  });
  byId('camera-cancel').addEventListener('click', () => dialog.close());
  dialog.addEventListener('close', () => {
    for (const track of stream.getTracks()) track.stop();
    viewfinder.srcObject = null;
  });
}
