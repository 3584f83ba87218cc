/** Dialog for the API key. */

import { modelName, setKey } from './api.js';
import { byId } from './dom.js';
import { clearWords, setWords } from './language.js';

/** Set up the dialog; `onAccepted` is called when the server has accepted a key. */
export function startKeyDialog(onAccepted) {
  const dialog = byId('key-dialog');
  byId('key-cancel').addEventListener('click', () => dialog.close());
  byId('key-button').addEventListener('click', openKeyDialog);
  byId('key-form').addEventListener('submit', async (event) => {
    event.preventDefault();
    setKey(byId('key').value.trim());
    try {
      await modelName(); // a request that requires the key
    } catch (error) {
      setWords(byId('key-error'), 'text', error.kind === 'key' ? 'key.wrong' : `error.${error.kind}`);
      byId('key').select();
      return;
    }
    dialog.close();
    onAccepted();
  });
}

export function openKeyDialog() {
  const dialog = byId('key-dialog');
  if (dialog.open) return;
  byId('key-button').hidden = false; // the server requires a key, which the user may change later
  byId('key').value = '';
  clearWords(byId('key-error'));
  dialog.showModal();
}
