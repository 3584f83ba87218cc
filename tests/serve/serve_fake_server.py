"""Script that runs `qwenvl serve` with a CountingEngine: `python serve_fake_server.py ENGINE_JSON FLAG …`.

Tests run it as a server process (test_serve_lifecycle.py). ENGINE_JSON has the arguments of CountingEngine, and
optionally `start_error`, the message with which its start fails.
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
    start_error = arguments.pop("start_error", None)
    engine = CountingEngine(**arguments)
    engine.start_error = QwenVLError(start_error) if start_error else None

    def open_service(settings: Any, say: object) -> Any:
        return fake_service(engine, **settings.model_dump())

    # Modules that `qwenvl serve` imports, replaced by fakes without a model.
    modules: dict[str, Any] = {
        "paddlemix_qwenvl_plugin.serve.opening": SimpleNamespace(open_service=open_service),
        "paddlemix_qwenvl_plugin.serve.openai": SimpleNamespace(routes=SimpleNamespace(router=fake_router)),
    }
    sys.modules.update(modules)
    sys.argv[1:1] = ["serve", "--demo"]  # settings must name a model; the demo model needs no files
    main()
