"""The errors a user meets. Each carries one clear line: what is wrong, with what, and what to do."""

from __future__ import annotations


class QwenVLError(Exception):
    """The request was understood and could not be carried out (exit code 1)."""

    exit_code = 1


class UsageError(QwenVLError):
    """The request itself is wrong: a flag, a value, a recipe key, a path that is not there (exit code 2)."""

    exit_code = 2
