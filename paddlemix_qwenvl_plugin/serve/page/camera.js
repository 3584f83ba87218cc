/** Photos: by the phone's camera app, or by the camera of a desk through a dialog. */

import { byId } from './dom.js';
import { notice } from './notice.js';

/** Let the camera's button hand files to `attach`. */
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
    button.hidden = true; // a page that came by plain HTTP from another machine
    return;
  }
  button.addEventListener('click', async () => {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1344 } } });
    } catch {
      notice('camera.problem'); // there is none, it is in use, or the user said no
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
    attach([new File([blob], 'photo.jpg', { type: 'image/jpeg' })]);
  });
  byId('camera-cancel').addEventListener('click', () => dialog.close());
  dialog.addEventListener('close', () => {
    for (const track of stream.getTracks()) track.stop();
    view.srcObject = null;
  });
}
