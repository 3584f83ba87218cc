"""Export FOLDER to OUTPUT with QUANT_TYPE like PaddleNLP 3.0.0b4; run as a process."""

from __future__ import annotations

import sys

from drive_generation_2 import create_model

_, model = create_model(sys.argv[1], "float32", sys.argv[2])
model.to_static(
    f"{sys.argv[3]}/qwen", {"dtype": "float32", "export_precache": False, "cachekv_int8_type": None}
)
