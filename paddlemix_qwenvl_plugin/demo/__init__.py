"""What `qwenvl demo` does: the shipped model answers the bundled questions, on a page and on a contact sheet."""

from pathlib import Path

MODEL = Path(__file__).resolve().parent / "model"
"""The model folder that is shipped."""
