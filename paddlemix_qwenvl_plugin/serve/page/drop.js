/** Drag and drop and pasting of images, anywhere on the page. */

import { byId } from './dom.js';

/** Pass dropped and pasted files to `attach`. */
export function takeDroppedAndPasted(attach) {
  const hasFiles = (transfer) => [...(transfer?.types ?? [])].includes('Files');
  const show = (shown) => {
    byId('drop').hidden = !shown;
  };
  addEventListener('dragover', (event) => {
    if (!hasFiles(event.dataTransfer)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = 'copy';
    show(true);
  });
  addEventListener('dragleave', (event) => {
    if (!event.relatedTarget) show(false);
  });
  addEventListener('drop', (event) => {
    if (!hasFiles(event.dataTransfer)) return;
    event.preventDefault();
    show(false);
    attach([...event.dataTransfer.files]);
  });
  addEventListener('paste', (event) => {
    if (document.querySelector('dialog[open]') || !event.clipboardData.files.length) return;
    event.preventDefault();
    attach([...event.clipboardData.files]);
  });
}
