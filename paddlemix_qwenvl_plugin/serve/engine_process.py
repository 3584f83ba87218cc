"""The engine process: `python -m paddlemix_qwenvl_plugin.serve.engine_process FD`, started by the front.

It opens the model and runs its loop. It reads requests from the socket FD and sends one message with all results
after each step (messages.py). It ends when the socket is closed, at SIGTERM, and when the front dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Optional

from paddlemix_qwenvl_plugin.runtime.generation import Generation, ImageInput
from paddlemix_qwenvl_plugin.runtime.loop import Loop, NotFiniteError
from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL
from paddlemix_qwenvl_plugin.runtime.statistics import LoopStatistics
from paddlemix_qwenvl_plugin.serve.messages import Unpacker, pack, tokens_since, unpack_request
from paddlemix_qwenvl_plugin.util.debug import print_traceback_if_debugging
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, line_of

_STATISTICS_SECONDS = 1.0

# Wait for requests that arrive together, as a share of the last step's time: a request that misses a step waits for
# all of it, and its prompt then reads the weights again.
_GATHER_SHARE = 0.03
_GATHER_SECONDS = 0.02

# Timeout of the shutdown, which a step or the cleanup of an engine build may delay.
_END_SECONDS = 2.0

_PR_SET_PDEATHSIG = 1


class _Request:
    """A request in the loop and the number of its tokens already sent."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.n_sent = 0


class EngineProcess:
    """Event loop of the engine process: requests in, one message of results per step out.

    The main thread runs steps and sends. A second thread reads, so that requests and the front's exit are noticed
    during a step.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # guards _requests and _refused
        self._requests: dict[int, _Request] = {}
        self._refused: list[tuple[int, str]] = []
        self._wake = threading.Event()
        self._reported = LoopStatistics()
        self._report_at = 0.0

    def run(self) -> None:
        """Open the model named by the first message and serve requests until the front exits."""
        messages = _read(self._connection)
        settings = next(messages)[0]
        threading.Thread(target=self._receive, args=[messages], name="messages", daemon=True).start()
        try:
            self._model = QwenVL.from_exported(
                settings["first_model_path"],
                settings["second_model_path"],
                settings["model_name_or_path"],
                settings["device"],
                verify=settings["verify"],
                gpu_memory=settings["gpu_memory"],
                adapters=settings["adapters"],
            )
            self._loop = self._model.open_loop()
            _install_signal_handlers()  # again: Paddle may have been imported
            _die_with_parent()
            self._send({"kind": "ready"})
            self._run_steps(self._loop)
        except (QwenVLError, OSError, MemoryError) as error:
            print_traceback_if_debugging()
            code = getattr(error, "exit_code", 1)
            self._send({"kind": "broken", "line": line_of(error), "exit_code": code})
            sys.exit(code)

    def _run_steps(self, loop: Loop) -> None:
        seconds = 0.0
        while True:
            self._wake.clear()
            start = time.monotonic()
            busy = loop.step()
            if busy:
                seconds = time.monotonic() - start
            ended = self._send_updates(loop)
            wait = self._report(loop.statistics)
            if ended or (not busy and self._wake.wait(wait)):
                self._gather(seconds)  # a client whose request has ended often sends the next one immediately

    def _gather(self, step_seconds: float) -> None:
        """Wait for requests that are about to arrive."""
        end = time.monotonic() + min(_GATHER_SHARE * step_seconds, _GATHER_SECONDS)
        while (left := end - time.monotonic()) > 0:
            self._wake.wait(left)
            self._wake.clear()

    def _send_updates(self, loop: Loop) -> bool:
        """Send new tokens, ends and failures, if any; return whether a request has ended."""
        with self._lock:
            requests = list(self._requests.items())
            failed, self._refused = self._refused, []
        tokens, ended, broken = [], [], False
        for number, request in requests:
            generation = request.generation
            finished = generation.finished  # read before the tokens: the last token is appended first
            if len(generation.tokens) > request.n_sent:
                n_cached = generation.n_cached or 0
                tokens.append([number, tokens_since(generation, request.n_sent), n_cached])
                request.n_sent = len(generation.tokens)
            if not finished:
                continue
            if generation.error is not None:
                failed.append((number, line_of(generation.error)))
                broken |= not isinstance(generation.error, NotFiniteError)
            else:
                ended.append([number, generation.finish_reason, generation.n_cached or 0])
            with self._lock:
                del self._requests[number]
        if tokens or ended or failed:
            self._send({"kind": "step", "tokens": tokens, "ended": ended, "failed": failed})
        if broken:
            loop.check_device()  # raises if the device is lost: every later request would fail
        return bool(ended)

    def _report(self, statistics: LoopStatistics) -> Optional[float]:
        """Send changed statistics, at most once a second; return the seconds until then, None if unchanged or sent."""
        if statistics == self._reported:
            return None
        now = time.monotonic()
        if now < self._report_at:
            return self._report_at - now
        self._send({"kind": "statistics", **asdict(statistics)})
        self._reported, self._report_at = statistics, now + _STATISTICS_SECONDS
        return None

    def _send(self, header: dict[str, Any]) -> None:
        try:
            self._connection.sendall(pack(header))
        except OSError:  # the front has exited
            sys.exit(0)

    def _receive(self, messages: Iterator[tuple[dict[str, Any], bytes]]) -> None:
        """Receive requests and cancellations until the front exits; then end the process."""
        try:
            with contextlib.suppress(OSError):
                for header, content in messages:
                    if header["kind"] == "submit":
                        self._submit(header, content)
                    else:
                        self._cancel(header["number"])
                    self._wake.set()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # lets an engine build clean up
            time.sleep(_END_SECONDS)
            os._exit(1)  # in the middle of a step

    def _cancel(self, number: int) -> None:
        with self._lock:
            request = self._requests.get(number)
        if request is not None:
            self._loop.cancel(request.generation)

    def _submit(self, header: dict[str, Any], content: bytes) -> None:
        number = header["number"]
        try:
            request = unpack_request(header, content)
            generation = self._model.generation(
                request.prompt,
                [ImageInput.of(image) for image in request.images],
                request.stop_token_ids,
                request.options,
                request.generated,
                request.n_logprobs,
                request.adapter,
            )
        except QwenVLError as error:
            with self._lock:
                self._refused.append((number, line_of(error)))
            return
        with self._lock:
            self._requests[number] = _Request(generation)
        self._loop.submit(generation)


def _read(connection: socket.socket) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the messages of a connection until it is closed."""
    unpacker = Unpacker()
    while data := connection.recv(1 << 20):
        yield from unpacker.feed(data)


def _die_with_parent() -> None:
    """On Linux, have the kernel kill this process when its parent dies; elsewhere the closed socket ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _install_signal_handlers() -> None:
    """End at SIGTERM and ignore SIGINT: Ctrl-C is handled by the front."""
    if "paddle" in sys.modules:  # its handlers print a traceback
        sys.modules["paddle"].base.core.disable_signal_handler()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
    sys.exit(128 + number)


def main() -> None:
    """Run the process. Its one argument is the file descriptor of the socket."""
    _install_signal_handlers()
    EngineProcess(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
