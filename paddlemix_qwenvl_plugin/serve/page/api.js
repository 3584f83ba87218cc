/** Client of the server's API: state, model, streamed answers. */

import { events } from './sse.js';
import { load, store } from './store.js';

const STORED_KEY = 'qwenvl-api-key';

/**
 * Failed request. The page shows a text by its `kind` (`error.…` in words_en.js) and `detail`, the server's message, if
 * any. `seconds` is the time after which the server allows a retry, or null.
 */
export class ServerError extends Error {
  constructor(kind, { detail = '', seconds = null } = {}) {
    super(detail || kind);
    this.kind = kind;
    this.detail = detail;
    this.seconds = seconds;
  }
}

// Error kinds by HTTP status, and by error type for the error events of a stream, which have no status.
const STATUS_KINDS = { 401: 'key', 429: 'busy', 502: 'unready', 503: 'unready', 504: 'unready' };
const STREAM_KINDS = { invalid_request_error: 'refused', rate_limit_error: 'busy' };

function kindOf(status, code) {
  // A proxy sends 504, too, for a server that does not respond.
  if (status === 504 && code === 'timeout') return 'failed';
  return STATUS_KINDS[status] ?? (status < 500 ? 'refused' : 'failed');
}

async function errorOf(response) {
  const body = await response.json().catch(() => null); // a proxy's error page is not JSON
  const seconds = Number.parseInt(response.headers.get('Retry-After'), 10);
  return new ServerError(kindOf(response.status, body?.error?.code), {
    detail: body?.error?.message ?? '',
    seconds: Number.isNaN(seconds) ? null : seconds,
  });
}

async function request(path, options = {}) {
  const key = load('sessionStorage', STORED_KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: 'no-store' });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ServerError('network');
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

export function setKey(key) {
  store('sessionStorage', STORED_KEY, key);
}

/** State of the server: "ready", "starting" or "unreachable". */
export async function serverState() {
  try {
    await request('health/ready');
    return 'ready';
  } catch (error) {
    return error.kind === 'unready' ? 'starting' : 'unreachable';
  }
}

/** Name of the served model; in the list, the names of its adapters follow. */
export async function modelName() {
  const response = await request('v1/models');
  return (await response.json()).data[0].id;
}

/**
 * Stream an answer as deltas { text, finish, usage }. `finish` is the finish reason or null; `usage` may be missing.
 *
 * @throws {ServerError}, or an AbortError once `signal` is aborted
 */
export async function* answer(model, messages, signal) {
  const response = await request('v1/chat/completions', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ model, messages, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === '[DONE]') return;
      const { error, choices, usage } = JSON.parse(data);
      if (error) throw new ServerError(STREAM_KINDS[error.type] ?? 'failed', { detail: error.message });
      yield { text: choices[0]?.delta.content ?? '', finish: choices[0]?.finish_reason ?? null, usage };
    }
  } catch (error) {
    if (error.name === 'AbortError' || error instanceof ServerError) throw error;
    throw new ServerError('cut');
  }
  throw new ServerError('cut');
}
