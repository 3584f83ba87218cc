/** Images from the camera: the phone's camera app, or a dialog on a desktop. */

import { byId } from './dom.js';
import { notice } from './notice.js';

/** Connect the camera button to `attach`. */
export function startCamera(attach) {
  const button = byId('camera');
  const dialog = byId('camera-dialog');
  const view = byId('viewfinder');
  const shutter = byId('shutter');
  let stream = null;

  const touch = matchMedia('(pointer: coarse)').matches;
  if (touch) {
    button.addEventListener('click', () => byId('capture').click());
    return;
  }
  if (!navigator.mediaDevices) {
    button.hidden = true; // plain HTTP from another machine: no camera access
    return;
  }
  button.addEventListener('click', async () => {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1344 } } });
    } catch {
      notice('camera.problem'); // no camera, in use, or permission denied
      return;
    }
    shutter.disabled = true;
    dialog.showModal();
    view.srcObject = stream;
    await view.play();
    shutter.disabled = false;
    shutter.focus();
  });
  shutter.addEventListener('click', async () => {
    const canvas = document.createElement('canvas');
    canvas.width = view.videoWidth;
    canvas.height = view.videoHeight;
    canvas.getContext('2d').drawImage(view, 0, 0);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, 'image/jpeg', 0.95));
    dialog.close();
    attach([new File([blob], 'camera.jpg', { type: 'image/jpeg' })]);
  });
  byId('camera-cancel').addEventListener('click', () => dialog.close());
  dialog.addEventListener('close', () => {
    for (const track of stream.getTracks()) track.stop();
    view.srcObject = null;
  });
}
