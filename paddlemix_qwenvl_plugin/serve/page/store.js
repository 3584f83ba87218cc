/** Values stored in `sessionStorage` or `localStorage`, or in this page if the browser forbids these. */

const inPage = new Map();

/** Return `sessionStorage` or `localStorage`, or null if the browser forbids it. */
function storageNamed(name) {
  try {
    return window[name];
  } catch {
    return null; // reading the property throws if the user blocks site data
  }
}

export function load(storage, name) {
  return inPage.get(name) ?? storageNamed(storage)?.getItem(name) ?? null;
}

export function store(storage, name, value) {
  inPage.set(name, value);
  try {
    const stored = storageNamed(storage);
    if (stored === null) return;
    stored.setItem(name, value);
    inPage.delete(name); // load() then also sees values of other tabs
  } catch {
    // The storage is full or read-only: the value remains in this page.
  }
}
