"""Requests of serve.py on the loop, in one process without a server, as the baseline for the server's overhead.

Started by serve_targets.py with the prefixes of both exported stages as arguments. Reads a line of JSON per run from
standard input: `bodies`, as for serve_client.py, with token ids as the prompt, and `clients`, the maximum number of
concurrent requests. Writes a line of JSON per run: `seconds` and `tokens`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
from paddlemix_qwenvl_plugin.runtime.loop import Loop


def run(model: QwenVL, loop: Loop, bodies: list[dict[str, Any]], clients: int) -> dict[str, float]:
    """Run all requests, at most `clients` concurrently; return the time in seconds and the number of new tokens."""
    waiting = iter(bodies)
    active = []
    n_tokens = 0
    begin = time.perf_counter()
    while True:
        while len(active) < clients and (body := next(waiting, None)) is not None:
            options = GenerationOptions(max_new_tokens=body["max_tokens"])
            generation = model.generation(body["prompt"], [], [model.tokenizer.eod_id], options)
            loop.submit(generation)
            active.append(generation)
        if not active:
            return {"seconds": time.perf_counter() - begin, "tokens": n_tokens}
        loop.step()
        n_tokens += sum(len(generation.tokens) for generation in active if generation.finished)
        active = [generation for generation in active if not generation.finished]


def main() -> None:
    model = QwenVL.from_exported(sys.argv[1], sys.argv[2])
    loop = model.open_loop()
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(run(model, loop, task["bodies"], task["clients"])), flush=True)


if __name__ == "__main__":
    main()
