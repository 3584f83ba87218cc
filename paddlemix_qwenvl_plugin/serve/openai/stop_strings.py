"""Incremental detection of stop strings."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Incremental filter that passes text up to the first complete stop string.

    If several stop strings end at the same character, the longest counts, so the result does not depend on the chunks.
    Text that may be the beginning of a stop string is held back.

    Attributes:
        found: whether a stop string was found.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Set the stop strings, none of them empty."""
        self._strings = strings
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Add text and return the text that is ready; "" after a stop string."""
        if self.found or not self._strings:
            return "" if self.found else text
        held = self._held + text
        matches = ((held.find(string), string) for string in self._strings)
        ends = [(start + len(string), start) for start, string in matches if start >= 0]
        if ends:
            self.found = True
            self._held = ""
            return held[: min(ends)[1]]
        n_ready = min(self._before_partial(held, string) for string in self._strings)
        self._held = held[n_ready:]
        return held[:n_ready]

    def finish(self) -> str:
        """End the input and return the text held back."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _before_partial(text: str, string: str) -> int:
        """Length of the prefix of `text` that cannot begin `string`."""
        start = text.find(string[0], max(0, len(text) - len(string) + 1))
        while start >= 0 and not string.startswith(text[start:]):
            start = text.find(string[0], start + 1)
        return len(text) if start < 0 else start
