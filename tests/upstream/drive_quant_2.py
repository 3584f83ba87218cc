"""Export the plugin's model with quantized weights, by PaddleNLP 3.0.0b4's calls; run by test_paddlenlp_wheels.py.

drive_quant_2.py FOLDER QUANT_TYPE OUTPUT
"""

from __future__ import annotations

import sys

from drive_generation_2 import create_model

folder, quant_type, output = sys.argv[1:]
_, model = create_model(folder, "float32", quant_type)
model.to_static(f"{output}/qwen", {"dtype": "float32", "export_precache": False, "cachekv_int8_type": None})
