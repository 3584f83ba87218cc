"""Run as a process: the stock predictor script as a program; the picture it would download is a file here."""

from __future__ import annotations

import runpy
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import requests

script, picture, *arguments = sys.argv[1:]
requests.get = lambda url, **_: SimpleNamespace(raw=BytesIO(Path(picture).read_bytes()))
sys.argv = [script, *arguments]
sys.path[0] = str(Path(script).parent)
runpy.run_path(script, run_name="__main__")
