"""Everything that knows PaddleNLP and PaddleMIX: their hooks, and what became of these in this process."""

from __future__ import annotations

import sys


def fired() -> dict[str, str]:
    """Upstream module -> "armed" (not imported so far), "fired" or "failed: ERROR".

    Empty where the activation is switched off (QWENVL_PLUGIN=0) or was not run in this process.
    """
    activation = sys.modules.get("_qwenvl_activate")
    return dict(activation.state) if activation is not None else {}
