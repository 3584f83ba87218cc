"""Parser of the subset of PromQL that the dashboards use."""

from __future__ import annotations

import re
from typing import NamedTuple, Optional

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<name>[a-zA-Z_:][\w:]*)|(?P<text>\"[^\"]*\")"
    r"|(?P<range>\[(?:\d+[smhd]|\$__rate_interval|\$__range)\])|(?P<sign>=~|!~|!=|[-+*/(){},=]))"
)
# Name -> how many arguments; a range vector is the last one of those in _OF_RANGES.
_FUNCTIONS = {"rate": 1, "increase": 1, "histogram_quantile": 2, "clamp_min": 2}
_OF_RANGES = ("rate", "increase")
_AGGREGATIONS = ("sum", "max", "min", "avg", "count")


class Series(NamedTuple):
    """Metric of a query, whether as a range vector, and the labels of its selectors and sums."""

    name: str
    ranged: bool
    labels: tuple[str, ...]


def series(query: str) -> list[Series]:
    """Parsed query.

    Raises:
        ValueError: it is not well-formed.
    """
    parser = _Parser(query)
    parser.expression()
    if parser.peek() is not None:
        raise ValueError(f"{query}: unexpected {parser.peek()}")
    return parser.found


class _Parser:
    def __init__(self, query: str) -> None:
        self.found: list[Series] = []
        self._by: list[str] = []
        self._tokens: list[tuple[str, str]] = []
        self._at = 0
        position = 0
        while position < len(query.rstrip()):
            match = _TOKEN.match(query, position)
            if match is None:
                raise ValueError(f"{query}: unexpected character at {position}")
            self._tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
            position = match.end()

    def peek(self) -> Optional[str]:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else None

    def take(self, *wanted: str) -> str:
        """Consume the next token, which must be one of these texts or kinds."""
        kind, text = self._tokens[self._at] if self._at < len(self._tokens) else ("end", "end")
        if kind not in wanted and text not in wanted:
            raise ValueError(f"unexpected {text} where {' or '.join(wanted)} is wanted")
        self._at += 1
        return text

    def expression(self) -> None:
        self._term()
        while self.peek() in ("+", "-", "*", "/"):
            self._at += 1
            self._term()

    def _term(self) -> None:
        if self.peek() == "(":
            self.take("(")
            self.expression()
            self.take(")")
            return
        text = self.take("number", "name")
        if text[0].isdigit():
            return
        if text in _AGGREGATIONS:
            self._aggregation()
        elif self.peek() == "(":
            self._call(text)
        else:
            self._selector(text)

    def _aggregation(self) -> None:
        labels: list[str] = []
        if self.peek() == "by":
            self.take("by")
            labels = self._list()
        before = list(self._by)
        self._by += labels
        self.take("(")
        self.expression()
        self.take(")")
        self._by = before

    def _list(self) -> list[str]:
        self.take("(")
        names = [self.take("name")]
        while self.peek() == ",":
            self.take(",")
            names.append(self.take("name"))
        self.take(")")
        return names

    def _call(self, function: str) -> None:
        if function not in _FUNCTIONS:
            raise ValueError(f"no function {function}")
        self.take("(")
        n_before = len(self.found)
        for number in range(_FUNCTIONS[function]):
            if number:
                self.take(",")
            self.expression()
        self.take(")")
        if function in _OF_RANGES and not all(one.ranged for one in self.found[n_before:]):
            raise ValueError(f"{function} wants a range of time")

    def _selector(self, name: str) -> None:
        labels = list(self._by)
        if self.peek() == "{":
            self.take("{")
            while self.peek() != "}":
                labels.append(self.take("name"))
                self.take("=", "!=", "=~", "!~")
                self.take("text")
                if self.peek() == ",":
                    self.take(",")
            self.take("}")
        ranged = self.peek() is not None and str(self.peek()).startswith("[")
        if ranged:
            self.take("range")
        self.found.append(Series(name, ranged, tuple(labels)))
