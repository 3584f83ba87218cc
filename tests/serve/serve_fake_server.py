"""`qwenvl serve` around a counting engine: `python serve_fake_server.py ENGINE_JSON FLAG …`.

ENGINE_JSON has the arguments of CountingEngine, and `fails`, a line with which it does not start.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from serve_service_helpers import CountingEngine, fake_router, fake_service

from paddlemix_qwenvl_plugin.cli.main import main
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

if __name__ == "__main__":
    arguments = json.loads(sys.argv.pop(1))
    fails = arguments.pop("fails", None)
    engine = CountingEngine(**arguments)
    engine.fails = QwenVLError(fails) if fails else None

    def open_service(settings: Any, say: object) -> Any:
        return fake_service(engine, **settings.model_dump())

    modules: dict[str, Any] = {
        "paddlemix_qwenvl_plugin.serve.opening": SimpleNamespace(open_service=open_service),
        "paddlemix_qwenvl_plugin.serve.openai": SimpleNamespace(routes=SimpleNamespace(router=fake_router)),
    }
    sys.modules.update(modules)
    sys.argv[1:1] = ["serve", "--demo"]
    main()
