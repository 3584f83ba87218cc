"""Run as a process: ask generation 2 for FOLDER with QUANT_TYPE."""

from __future__ import annotations

import sys

from drive_generation_2 import create_model

create_model(sys.argv[1], "float32", sys.argv[2])
