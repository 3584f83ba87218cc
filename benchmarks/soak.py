"""Soak test of the loop on the engine: 10,000 requests to the demo model, some cancelled or preempted.

Each answer, or the tokens generated before its cancellation, is compared with the answer to the same request run alone.
Prints the numbers of cancelled requests, of preemptions and of prompt tokens from the prefix cache, and the growth of
the process's memory since a fifth of the requests were started.
Run: python benchmarks/soak.py
Needs the plugin, pytest and a C++ compiler; takes a few minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import pytest

from paddlemix_qwenvl_plugin import QwenVL, export_language, export_vision
from paddlemix_qwenvl_plugin.demo.run import MODEL

TESTS = Path(__file__).resolve().parents[1] / "tests"


def main() -> None:
    sys.path.insert(0, str(TESTS))
    from soak import soak  # tests/soak.py

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        export_vision(MODEL, folder / "vision", "bfloat16")
        export_language(MODEL, folder, "qwen", "bfloat16", quant_type="weight_only_int8")
        model = QwenVL.from_exported(folder / "vision", folder / "qwen")
        model.load()
        print(soak(model, patch, arguments.requests))


if __name__ == "__main__":
    main()
