/** Scrolling that follows a growing answer. */

// Maximum distance in pixels from the end of the page at which the page counts as scrolled to its end.
const NEAR_END = 80;

export function scrollToEnd() {
  window.scrollTo({ top: document.documentElement.scrollHeight });
}

/** Change the page by `change()` and keep its end in view, unless the user has scrolled away. */
export function keepEndInView(change) {
  const atEnd = document.documentElement.scrollHeight - window.innerHeight - window.scrollY < NEAR_END;
  change();
  if (atEnd) scrollToEnd();
}
