"""Run the stock predictor script as a program, with a file in place of the image that it would download.

drive_stock_main.py SCRIPT IMAGE ARGUMENT…

test_paddlemix.py runs it with a checkout of PaddleMIX (QWENVL_PADDLEMIX_DIR) and all its requirements;
drive_stock_bare.py is for an environment without most of them.
"""

from __future__ import annotations

import runpy
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import requests

script, image, *arguments = sys.argv[1:]
requests.get = lambda url, **_: SimpleNamespace(raw=BytesIO(Path(image).read_bytes()))
sys.argv = [script, *arguments]
sys.path[0] = str(Path(script).parent)
runpy.run_path(script, run_name="__main__")
