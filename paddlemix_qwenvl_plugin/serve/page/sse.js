/** Parser of a stream of server-sent events. */

/**
 * Yield the data of each event as text. An event is one or several `data:` lines before an empty line.
 *
 * @param {ReadableStream<Uint8Array>} body
 */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let incompleteLine = '';
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (incompleteLine + value).split('\n');
      incompleteLine = lines.pop();
      for (const line of lines.map((text) => text.replace(/\r$/, ''))) {
        if (line.startsWith('data:')) data.push(line.slice(5).replace(/^ /, ''));
        else if (line === '' && data.length) {
          yield data.join('\n');
          data = [];
        }
      }
    }
  } finally {
    // Closes the connection if the caller stops iterating before the end.
    await reader.cancel().catch(() => {});
  }
}
