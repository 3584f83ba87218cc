"""The requests of serve.py on the loop alone, in one process: what is left of them is the cost of the server around it.

Reads lines of JSON, a run each, from standard input: `bodies`, as for serve_load.py, and `clients`. Writes a line for
each: seconds and tokens. serve.py runs it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
from paddlemix_qwenvl_plugin.runtime.loop import Loop


def run(model: QwenVL, loop: Loop, bodies: list[dict[str, Any]], clients: int) -> dict[str, float]:
    """All requests, `clients` at once: each that ends is followed by the next one."""
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
        for generation in [generation for generation in active if generation.finished]:
            active.remove(generation)
            n_tokens += len(generation.tokens)


def main() -> None:
    model = QwenVL.from_exported(sys.argv[1], sys.argv[2])
    loop = model.open_loop()
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(run(model, loop, task["bodies"], task["clients"])), flush=True)


if __name__ == "__main__":
    main()
