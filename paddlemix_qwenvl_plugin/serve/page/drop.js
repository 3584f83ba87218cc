/** Drag and drop of image files, and pasting of them, anywhere on the page. */

import { byId } from './dom.js';

/** Pass dropped and pasted files to `attach`. */
export function handleDropAndPaste(attach) {
  const hasFiles = (transfer) => [...(transfer?.types ?? [])].includes('Files');
  const showTarget = (visible) => {
    byId('drop').hidden = !visible;
  };
  addEventListener('dragover', (event) => {
    if (!hasFiles(event.dataTransfer)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = 'copy';
    showTarget(true);
  });
  addEventListener('dragleave', (event) => {
    if (!event.relatedTarget) showTarget(false); // the pointer has left the page
  });
  addEventListener('drop', (event) => {
    if (!hasFiles(event.dataTransfer)) return;
    event.preventDefault();
    showTarget(false);
    attach([...event.dataTransfer.files]);
  });
  addEventListener('paste', (event) => {
    if (document.querySelector('dialog[open]') || !event.clipboardData.files.length) return;
    event.preventDefault();
    attach([...event.clipboardData.files]);
  });
}
