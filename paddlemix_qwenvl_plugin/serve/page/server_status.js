/** Server state and model name in the page header. */

import { modelName, serverState } from './api.js';
import { byId } from './dom.js';
import { setWords } from './language.js';

const MS_BETWEEN = { ready: 20_000, starting: 2_000, unreachable: 4_000 };

export class ServerStatus {
  model = null;
  #timer = null;

  /** @param {() => void} onKey called if the server requires an API key for its model name */
  constructor(onKey) {
    this.onKey = onKey;
    document.addEventListener('visibilitychange', () => document.hidden || this.check());
    addEventListener('online', () => this.check());
    addEventListener('offline', () => this.check());
  }

  /** Query the server now, and periodically while the page is visible. */
  async check() {
    clearTimeout(this.#timer);
    const state = await serverState();
    byId('status').dataset.state = state;
    setWords(byId('state'), 'text', `state.${state}`);
    if (state === 'ready' && !this.model) await this.findModel().catch((error) => error.kind === 'key' && this.onKey());
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.check(), MS_BETWEEN[state]);
  }

  /** Name of the model, requested until known. */
  async findModel() {
    if (!this.model) {
      this.model = await modelName();
      byId('model').textContent = this.model;
    }
    return this.model;
  }

  /** Request the name again next time: the model may change with a restart. */
  forgetModel() {
    this.model = null;
  }
}
