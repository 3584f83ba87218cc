/** Persistent values in `sessionStorage` or `localStorage`; kept in this page only if the browser forbids both. */

const inPage = new Map();

function allowed(name) {
  try {
    return window[name];
  } catch {
    return null; // reading the property throws if the user blocks site data
  }
}

export function load(storage, name) {
  return allowed(storage)?.getItem(name) ?? inPage.get(name) ?? null;
}

export function keep(storage, name, value) {
  inPage.set(name, value);
  try {
    allowed(storage)?.setItem(name, value);
  } catch {
    // The storage is full or read-only: the value is kept in this page.
  }
}
