"""Fake checkouts for the tests of the patches."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made_up import FakeCheckout, make

from paddlemix_qwenvl_plugin.upstream import patches, pins


@pytest.fixture(params=["paddlenlp", "paddlemix"])
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCheckout:
    """Fake checkout of an upstream; its pin and patches replace the real ones."""
    if shutil.which("git") is None:
        pytest.skip("git is not on PATH; install it")
    real_pins = pins.load()
    [real_upstream] = [upstream for upstream in real_pins.upstreams if upstream.name == request.param]
    checkout = make(tmp_path, real_upstream)
    upstreams = tuple(
        checkout.pinned if upstream is real_upstream else upstream for upstream in real_pins.upstreams
    )
    fake_pins = real_pins.model_copy(update={"upstreams": upstreams})
    monkeypatch.setattr(pins, "load", lambda: fake_pins)
    monkeypatch.setattr(patches, "shipped_dir", lambda: checkout.patches)
    return checkout
