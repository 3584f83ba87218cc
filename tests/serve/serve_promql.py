"""Parser of the subset of PromQL, Prometheus' query language, that the dashboard in deploy/grafana uses."""

from __future__ import annotations

import re
from typing import NamedTuple, Optional

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<name>[a-zA-Z_:][\w:]*)|(?P<text>\"[^\"]*\")"
    r"|(?P<range>\[(?:\d+[smhd]|\$__rate_interval|\$__range)\])|(?P<sign>=~|!~|!=|[-+*/(){},=]))"
)
# Function -> number of arguments.
_FUNCTIONS = {"rate": 1, "increase": 1, "histogram_quantile": 2, "clamp_min": 2}
# Functions whose argument is a range vector, such as `name[5m]`.
_RANGE_FUNCTIONS = ("rate", "increase")
_AGGREGATIONS = ("sum", "max", "min", "avg", "count")


class Series(NamedTuple):
    """Metric in a query.

    Attributes:
        name: name of the metric.
        is_range: whether it is a range vector, as in `name[5m]`.
        labels: labels in its selector and in the `by` of the enclosing aggregations.
    """

    name: str
    is_range: bool
    labels: tuple[str, ...]


def series(query: str) -> list[Series]:
    """The metrics of a query.

    Raises:
        ValueError: the query is not in this subset of PromQL.
    """
    parser = _Parser(query)
    parser.expression()
    if parser.peek() is not None:
        raise ValueError(f"{query}: unexpected {parser.peek()}")
    return parser.found


class _Parser:
    """Recursive-descent parser; `found` lists the metrics so far, `_by` the labels of the enclosing aggregations."""

    def __init__(self, query: str) -> None:
        self.found: list[Series] = []
        self._by: list[str] = []
        self._tokens: list[tuple[str, str]] = []
        self._next = 0  # index in _tokens
        position = 0
        while position < len(query.rstrip()):
            match = _TOKEN.match(query, position)
            if match is None:
                raise ValueError(f"{query}: unexpected character at {position}")
            self._tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
            position = match.end()

    def peek(self) -> Optional[str]:
        """The text of the next token; None at the end."""
        return self._tokens[self._next][1] if self._next < len(self._tokens) else None

    def take(self, *expected: str) -> str:
        """Consume the next token, which must have one of these texts or kinds, and return its text."""
        kind, text = self._tokens[self._next] if self._next < len(self._tokens) else ("end", "end")
        if kind not in expected and text not in expected:
            raise ValueError(f"unexpected {text}, expected {' or '.join(expected)}")
        self._next += 1
        return text

    def expression(self) -> None:
        self._term()
        while self.peek() in ("+", "-", "*", "/"):
            self._next += 1
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
            labels = self._label_list()
        enclosing = list(self._by)
        self._by += labels
        self.take("(")
        self.expression()
        self.take(")")
        self._by = enclosing

    def _label_list(self) -> list[str]:
        self.take("(")
        names = [self.take("name")]
        while self.peek() == ",":
            self.take(",")
            names.append(self.take("name"))
        self.take(")")
        return names

    def _call(self, function: str) -> None:
        if function not in _FUNCTIONS:
            raise ValueError(f"unknown function {function}")
        self.take("(")
        n_before = len(self.found)
        for index in range(_FUNCTIONS[function]):
            if index > 0:
                self.take(",")
            self.expression()
        self.take(")")
        arguments = self.found[n_before:]
        if function in _RANGE_FUNCTIONS and not all(argument.is_range for argument in arguments):
            raise ValueError(f"{function} requires a range vector")

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
        is_range = self.peek() is not None and str(self.peek()).startswith("[")
        if is_range:
            self.take("range")
        self.found.append(Series(name, is_range, tuple(labels)))
