"""`qwenvl demo`: the shipped model answers the bundled questions; results as an HTML page and a contact sheet."""

from pathlib import Path

MODEL = Path(__file__).resolve().parent / "model"
"""Folder of the shipped demo model."""
