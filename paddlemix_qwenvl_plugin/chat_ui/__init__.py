"""The `qwenvl chat` command: lines in, answers on a terminal or in a pipe out."""
