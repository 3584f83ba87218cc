"""Integration with PaddleNLP and PaddleMIX: hooks, patches, pins."""

from __future__ import annotations

import sys


def hook_states() -> dict[str, str]:
    """States of hooks and stand-ins: upstream module -> "armed" (has not run), "fired" (has run) or "failed: ERROR".

    Empty if the activation is switched off (QWENVL_PLUGIN=0) or did not run in this process.
    """
    activation = sys.modules.get("_qwenvl_activate")  # in activation/; usually imported when Python starts
    return dict(activation.state) if activation is not None else {}
