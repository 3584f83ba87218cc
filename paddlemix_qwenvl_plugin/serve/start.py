"""Start of the server on this machine from its settings; for `--ray`, see cluster/serve/start.py."""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
from collections.abc import Callable, Sequence
from typing import Optional

from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS
from paddlemix_qwenvl_plugin.serve.api_keys import check_exposure
from paddlemix_qwenvl_plugin.serve.app import create_app
from paddlemix_qwenvl_plugin.serve.json_log import start_logging
from paddlemix_qwenvl_plugin.serve.listening import bound_socket, url_of
from paddlemix_qwenvl_plugin.serve.server import run
from paddlemix_qwenvl_plugin.serve.service import Service
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.util.errors import UsageError


def start(settings: ServeSettings, signals: Sequence[int], say: Callable[[str], None]) -> Optional[int]:
    """Run the server until a signal ends it.

    Args:
        signals: signals that end the server.
        say: called with each line that the user shall see.

    Returns:
        The second signal, if one arrived before the server had ended; else None.

    Raises:
        UsageError: invalid settings or two that conflict, or a missing file.
        QwenVLError: the model cannot be opened, the engine cannot be started, or the port cannot be bound.
    """
    check_model(settings)
    listener = bound_socket(settings.host, settings.port, settings.reuse_port)
    with listener.socket:
        check_exposure(settings, listener.socket.getsockname()[0], listener.inherited)
        start_logging(settings.log_level)
        # Imported here, so that errors of settings and port are reported before the slow imports.
        from paddlemix_qwenvl_plugin.serve.opening import open_service

        service = open_service(settings, say)
        app = create_app(service)
        return asyncio.run(
            run(service, app, listener, signals, lambda: _announce(service, listener.socket, say))
        )


def check_model(settings: ServeSettings) -> None:
    """Raise UsageError unless the settings name either two exported stages or the demo model; also for `--ray`."""
    stages = (settings.first_model_path, settings.second_model_path)
    if settings.demo and (any(stages) or settings.model_name_or_path):
        raise UsageError("--demo: serves the bundled model; leave out the paths, or --demo")
    if not settings.demo and not all(stages):
        raise UsageError("nothing to serve: give --first_model_path and --second_model_path, or --demo")


def _announce(service: Service, listener: socket.socket, say: Callable[[str], None]) -> None:
    """Say that the server is ready, with an example request for the demo model."""
    url = url_of(listener)
    say(f"Serving {service.model_name} on {service.settings.device} at {url}")
    if service.settings.demo:
        say("Ask it, in another terminal:\n\n" + _example(url, service.model_name))


def _example(url: str, model: str) -> str:
    """Write a question of the demo as a curl command, portable across shells and base64 versions."""
    question = next(question for question in QUESTIONS if question.name == "locate")
    image = f"data:image/png;base64,$(base64 < {shlex.quote(str(question.images[0]))} | tr -d '\\n')"
    text = json.dumps(question.turn.question)
    return f"""curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d @- <<END
{{"model": "{model}", "messages": [{{"role": "user", "content": [
  {{"type": "image_url", "image_url": {{"url": "{image}"}}}},
  {{"type": "text", "text": {text}}}
]}}]}}
END"""
