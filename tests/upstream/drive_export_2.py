"""Export models as export_model.py of PaddleNLP 3.0.0b4 (generation 2) does; run by test_paddlenlp_wheels.py.

drive_export_2.py (DTYPE FOLDER OUTPUT)…
"""

from __future__ import annotations

import sys

from drive_generation_2 import create_model

arguments = iter(sys.argv[1:])
for dtype, folder, output in zip(arguments, arguments, arguments):
    tokenizer, model = create_model(folder, dtype)
    model.to_static(
        f"{output}/qwen",
        {"dtype": dtype, "export_precache": False, "cachekv_int8_type": None, "speculate_method": None},
    )
    model.config.infer_model_dtype = dtype
    model.config.save_pretrained(output)
    model.generation_config.save_pretrained(output)
    tokenizer.save_pretrained(output)
