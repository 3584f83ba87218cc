"""What a user reads when Paddle is missing or too old."""

from __future__ import annotations

import pytest

from paddlemix_qwenvl_plugin import QwenVLError
from paddlemix_qwenvl_plugin.util import paddle_version


def test_missing(monkeypatch):
    monkeypatch.setattr(paddle_version.util, "find_spec", lambda name: None)
    with pytest.raises(QwenVLError, match="Paddle is not installed; run: pip install"):
        paddle_version.require_paddle()


def test_too_old(monkeypatch):
    monkeypatch.setattr(paddle_version.metadata, "version", lambda name: "2.6.2")
    with pytest.raises(QwenVLError, match=r"paddlepaddle 2\.6\.2 is too old; install 3\.0 or newer"):
        paddle_version.require_paddle()


def test_new_enough():
    paddle_version.require_paddle()
