"""Stop strings, in text that comes bit by bit."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Text in, text out, up to the first stop string that is complete.

    Of several that are complete with the same character, the longest counts. So where the text ends does not depend on
    how it is cut into bits. What may be the beginning of a stop string is held back.

    Attributes:
        found: whether the text has ended.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """`strings` are not empty."""
        self._strings = strings
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is ready with this one; nothing after the end."""
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
        """The text that was held back: no more is coming."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _before_partial(text: str, string: str) -> int:
        """How much of `text` cannot be the beginning of `string`."""
        start = text.find(string[0], max(0, len(text) - len(string) + 1))
        while start >= 0 and not string.startswith(text[start:]):
            start = text.find(string[0], start + 1)
        return len(text) if start < 0 else start
