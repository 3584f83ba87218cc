"""The engine process: `python -m paddlemix_qwenvl_plugin.serve.engine_process FD`, started by the front.

On a Ray cluster an engine replica (cluster/serve/engine.py) starts it instead, and is what this file calls the front.

The process opens the model and runs its loop. It reads requests from the socket FD and sends one message with all
results after each step (messages.py). It ends when the socket is closed, at SIGTERM, when the front dies, and after an
error that concerns all requests: the model cannot be opened, or the device is lost.
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
from paddlemix_qwenvl_plugin.serve.messages import Unpacker, encode_tokens, pack, unpack_request
from paddlemix_qwenvl_plugin.util.debug import print_traceback_if_debugging
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, line_of

_STATISTICS_SECONDS = 1.0

# After the end of a completion or an idle time, the next step begins after a short wait for further requests. Without
# the wait, a request that arrives just after a step has begun would wait for the end of that step, and its prefill
# would read all weights in a later step. The wait is 3 % of the last step's duration, at most 20 ms.
_GATHER_SHARE = 0.03
_MAX_GATHER_SECONDS = 0.02

# After the front's exit: time from this process's SIGTERM to itself until its forced exit, in case a step or the
# cleanup of an engine build delays the regular exit.
_END_SECONDS = 2.0

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Request:
    """A request in the loop and the number of its tokens already sent."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.n_sent = 0


class EngineProcess:
    """State of the engine process, which receives requests and sends one message of results after each step.

    The main thread runs steps and sends. A second thread receives, so that requests and the front's exit are noticed
    during a step.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()  # guards _requests and _refused
        self._requests: dict[int, _Request] = {}
        # (request number, error) of requests that could not be submitted to the loop.
        self._refused: list[tuple[int, str]] = []
        self._wake = threading.Event()
        self._sent_statistics = LoopStatistics()
        self._next_report = 0.0

    def run(self) -> None:
        """Open the model named by the first message and serve requests until the front exits.

        If the model cannot be opened or the device is lost, send the error to the front and exit with the error's code.
        """
        messages = _read(self._connection)
        settings = next(messages)[0]
        # Started before the model is opened, to notice the front's exit; requests arrive only after "ready".
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
            _install_signal_handlers()  # again: if the model has imported Paddle, Paddle has replaced them
            _die_with_parent()  # not earlier: SIGKILL during an engine build would leave its compilers running
            self._send({"kind": "ready"})
            self._run_steps(self._loop)
        except (QwenVLError, OSError, MemoryError) as error:
            print_traceback_if_debugging()
            code = getattr(error, "exit_code", 1)
            self._send({"kind": "broken", "line": line_of(error), "exit_code": code})
            sys.exit(code)

    def _run_steps(self, loop: Loop) -> None:
        step_seconds = 0.0
        while True:
            self._wake.clear()
            start = time.monotonic()
            busy = loop.step()
            if busy:
                step_seconds = time.monotonic() - start
            ended = self._send_updates(loop)
            seconds_to_report = self._report(loop.statistics)
            # A client whose request has ended often sends the next one immediately.
            if ended or (not busy and self._wake.wait(seconds_to_report)):
                self._gather(step_seconds)

    def _gather(self, step_seconds: float) -> None:
        """Wait for requests that are about to arrive."""
        end = time.monotonic() + min(_GATHER_SHARE * step_seconds, _MAX_GATHER_SECONDS)
        while (remaining := end - time.monotonic()) > 0:
            self._wake.wait(remaining)
            self._wake.clear()

    def _send_updates(self, loop: Loop) -> bool:
        """Send the new tokens, ends and failures, if any; return whether a completion has ended without an error."""
        with self._lock:
            requests = list(self._requests.items())
            failed, self._refused = self._refused, []
        tokens, ended, check_device = [], [], False
        for number, request in requests:
            generation = request.generation
            # Read before the tokens: when it is set, the last token has been appended.
            finished = generation.finished
            if len(generation.tokens) > request.n_sent:
                n_cached = generation.n_cached or 0
                tokens.append([number, encode_tokens(generation, request.n_sent), n_cached])
                request.n_sent = len(generation.tokens)
            if not finished:
                continue
            if generation.error is not None:
                failed.append((number, line_of(generation.error)))
                # A NotFiniteError concerns one request only; another error may mean that the device is lost.
                check_device |= not isinstance(generation.error, NotFiniteError)
            else:
                ended.append([number, generation.finish_reason, generation.n_cached or 0])
            with self._lock:
                del self._requests[number]
        if tokens or ended or failed:
            self._send({"kind": "step", "tokens": tokens, "ended": ended, "failed": failed})
        if check_device:
            loop.check_device()  # raises if the device is lost: the process ends, since later requests would fail
        return bool(ended)

    def _report(self, statistics: LoopStatistics) -> Optional[float]:
        """Send the statistics if they have changed, at most once a second.

        Returns:
            Seconds until the changed statistics may be sent; None if the front has the present ones.
        """
        if statistics == self._sent_statistics:
            return None
        now = time.monotonic()
        if now < self._next_report:
            return self._next_report - now
        self._send({"kind": "statistics", **asdict(statistics)})
        self._sent_statistics, self._next_report = statistics, now + _STATISTICS_SECONDS
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
            os.kill(os.getpid(), signal.SIGTERM)  # ends the main thread; an engine build cleans up first
            time.sleep(_END_SECONDS)
            os._exit(1)  # the main thread has not ended: it computes a long step or cleans up

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
    """Let SIGTERM end the process, and ignore SIGINT: the front handles Ctrl-C."""
    if "paddle" in sys.modules:  # Paddle's handlers print a traceback
        sys.modules["paddle"].base.core.disable_signal_handler()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    """Handle a signal: end the process."""
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
    sys.exit(128 + number)


def main() -> None:
    """Run the engine process; the only command-line argument is the file descriptor of the socket."""
    _install_signal_handlers()
    EngineProcess(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
