"""Incremental detection of stop strings."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Incremental filter that passes text up to the first complete stop string.

    The stop string that ends first counts; of those that end at the same character, the longest. So the result does not
    depend on how the text is divided among the calls. Text that may be the beginning of a stop string is held back.

    Attributes:
        found: whether a stop string was found.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Set the stop strings, none of which may be ""; without any, all text passes."""
        self._strings = strings
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Add text and return the text that is not held back; "" after a stop string."""
        if self.found or not self._strings:
            return "" if self.found else text
        text = self._held + text
        starts = ((text.find(string), string) for string in self._strings)
        matches = [(start + len(string), start) for start, string in starts if start >= 0]
        if matches:
            _, start = min(matches)  # the first end; for equal ends the first start
            self.found = True
            self._held = ""
            return text[:start]
        n_ready = min(self._before_partial(text, string) for string in self._strings)
        self._held = text[n_ready:]
        return text[:n_ready]

    def finish(self) -> str:
        """End the input and return the text held back so far."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _before_partial(text: str, string: str) -> int:
        """Number of characters before the longest suffix of `text` that is a prefix of `string`; all if none is."""
        # `string` is not in `text`, so a suffix is shorter than `string`.
        start = text.find(string[0], max(0, len(text) - len(string) + 1))
        while start >= 0 and not string.startswith(text[start:]):
            start = text.find(string[0], start + 1)
        return len(text) if start < 0 else start
