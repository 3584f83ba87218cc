/** Server state and model name in the page header. */

import { modelName, serverState } from './api.js';
import { byId } from './dom.js';
import { setWords } from './language.js';

// Milliseconds between queries, by the server's state.
const QUERY_INTERVALS = { ready: 20_000, starting: 2_000, unreachable: 4_000 };

export class ServerStatus {
  model = null;
  #timer = null;

  /** @param {() => void} onKeyRequired called if the server requires an API key */
  constructor(onKeyRequired) {
    this.onKeyRequired = onKeyRequired;
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
    if (state === 'ready' && !this.model) await this.findModel().catch((error) => error.kind === 'key' && this.onKeyRequired());
    clearTimeout(this.#timer); // of another call, which ended during this one
    if (!document.hidden) this.#timer = setTimeout(() => this.check(), QUERY_INTERVALS[state]);
  }

  /** Return the name of the model; request it if it is unknown. */
  async findModel() {
    if (!this.model) {
      this.model = await modelName();
      byId('model').textContent = this.model;
    }
    return this.model;
  }

  /** Forget the name of the model, which may change when the server restarts. */
  forgetModel() {
    this.model = null;
  }
}
