"""Export models as export_model.py of PaddleNLP 3.0.0b0 (generation 1) does; run by test_paddlenlp_wheels.py.

drive_export_1.py (DTYPE FOLDER OUTPUT)…
"""

from __future__ import annotations

import sys
from typing import NoReturn

import paddle
from paddlenlp.transformers import AutoConfig, AutoTokenizer

MAX_LENGTH = 512


def validate_pdmodel(model_path: str, model_prefix: str, device: str) -> NoReturn:
    """Fail: the plugin must skip upstream's function of this name, which works only with legacy programs on a GPU."""
    raise SystemExit("upstream's validation, which works on a GPU with legacy programs only, was called")


def export(dtype: str, folder: str, output: str) -> None:
    paddle.set_default_dtype(dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.tensor_parallel_degree, config.tensor_parallel_rank = 1, 0
    config.weight_only_quant_bits, config.quant_type = -1, None
    # Imported here, as by upstream.
    from paddlenlp.experimental.transformers import QWenForQWenVLInferenceModel

    model = QWenForQWenVLInferenceModel.from_pretrained(folder, config=config, dtype=dtype)
    model.eval()
    shapes = model.get_cache_kvs_shape(model.config, 1, MAX_LENGTH)
    caches = [paddle.zeros(shape, dtype=dtype) for shape in shapes]
    assert caches[0].shape[-3] == config.num_attention_heads  # where upstream's predictor reads it
    paddle.arange(MAX_LENGTH, dtype=dtype)  # as upstream; without the plugin, half types fail on a CPU
    model.eval()  # again, as upstream
    model.to_static(f"{output}/qwen", {"dtype": dtype, "export_precache": False, "use_cachekv_int8": "None"})
    model.config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    validate_pdmodel(output, "qwen", "gpu")


arguments = iter(sys.argv[1:])
for dtype, folder, output in zip(arguments, arguments, arguments):
    export(dtype, folder, output)
