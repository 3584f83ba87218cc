/** Values that outlive a reload: in `sessionStorage` or `localStorage`, or only in this page where a browser forbids both. */

const inPage = new Map();

function allowed(name) {
  try {
    return window[name];
  } catch {
    return null; // reading the property itself throws where the user blocks site data
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
    // The storage is full or read-only: the value stays in this page.
  }
}
