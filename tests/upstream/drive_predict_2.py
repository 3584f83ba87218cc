"""Answer texts as PaddleNLP 3.0.0b4's dynamic predictor does, and print the tokens; run by test_paddlenlp_wheels.py.

The model is the plugin's (drive_generation_2.py).

drive_predict_2.py FOLDER N_TOKENS TEXT…
"""

from __future__ import annotations

import json
import sys

import paddle
from drive_generation_2 import MAX_LENGTH, create_model
from paddlenlp.trl import llm_utils

folder, n_tokens, *texts = sys.argv[1:]
tokenizer, model = create_model(folder, "float32")
inputs = llm_utils.dybatch_preprocess(
    tokenizer,
    texts,
    MAX_LENGTH - int(n_tokens),
    int(n_tokens),
    model.config.architectures[0].lower(),
    top_p=0.0,
    temperature=1.0,
    eos_token_id=llm_utils.get_eos_token_id(tokenizer, model.generation_config),
)
batch_size = len(texts)
inputs["pre_ids"] = paddle.full([batch_size, MAX_LENGTH], -1, dtype="int64")
inputs["attention_mask"] = paddle.zeros([batch_size, 1, MAX_LENGTH, MAX_LENGTH])
inputs["tgt_generation_mask"] = paddle.ones([batch_size, 1, 1, MAX_LENGTH])
inputs = {name: paddle.to_tensor(value) for name, value in inputs.items()}
shapes = model.get_cache_kvs_shape(model.config, batch_size, MAX_LENGTH)
model.generate(**inputs, cache_kvs=[paddle.zeros(shape) for shape in shapes])
print(json.dumps(llm_utils.load_real_time_tokens().tolist()))
