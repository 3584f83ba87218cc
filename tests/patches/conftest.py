from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made_up import MadeUp, make

from paddlemix_qwenvl_plugin.upstream import patches, pins


@pytest.fixture(params=["paddlenlp", "paddlemix"])
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    """A fake checkout, whose commit is the pinned one in changed pins."""
    if shutil.which("git") is None:
        pytest.skip("git is not on PATH; install it")
    real = pins.load()
    [upstream] = [one for one in real.upstreams if one.name == request.param]
    made = make(tmp_path, upstream)
    others = tuple(made.pinned if one.name == upstream.name else one for one in real.upstreams)
    faked = real.model_copy(update={"upstreams": others})
    monkeypatch.setattr(pins, "load", lambda: faked)
    monkeypatch.setattr(patches, "shipped_dir", lambda: made.patches)
    return made
