/** Scrolling that follows a growing answer. */

const NEAR = 80; // pixels

export function scrollToEnd() {
  window.scrollTo({ top: document.documentElement.scrollHeight });
}

/** Change the page and keep its end in view, unless the user has scrolled away. */
export function following(change) {
  const atEnd = document.documentElement.scrollHeight - window.innerHeight - window.scrollY < NEAR;
  change();
  if (atEnd) scrollToEnd();
}
