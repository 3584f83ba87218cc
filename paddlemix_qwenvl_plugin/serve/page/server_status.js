/** The server's state and model in the head of the page. */

import { modelName, serverState } from './api.js';
import { byId } from './dom.js';
import { setWords } from './language.js';

const MS_BETWEEN = { ready: 20_000, starting: 2_000, unreachable: 4_000 };

export class ServerStatus {
  model = null;
  #timer = null;

  /** @param {() => void} onKey called where the server wants an API key before it names its model */
  constructor(onKey) {
    this.onKey = onKey;
    document.addEventListener('visibilitychange', () => document.hidden || this.check());
    addEventListener('online', () => this.check());
    addEventListener('offline', () => this.check());
  }

  /** Ask the server now, and from then on again and again while the page is seen. */
  async check() {
    clearTimeout(this.#timer);
    const state = await serverState();
    byId('status').dataset.state = state;
    setWords(byId('state'), 'text', `state.${state}`);
    if (state === 'ready' && !this.model) await this.findModel().catch((error) => error.kind === 'key' && this.onKey());
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.check(), MS_BETWEEN[state]);
  }

  /** The model's name, asked for until it is known. */
  async findModel() {
    if (!this.model) {
      this.model = await modelName();
      byId('model').textContent = this.model;
    }
    return this.model;
  }

  /** Ask for the model again next time: another one may be served after a restart. */
  forgetModel() {
    this.model = null;
  }
}
