"""Answer texts with the model FOLDER like PaddleNLP 3.0.0b4's dynamic predictor, print the tokens; run as a process."""

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
rows = len(texts)
inputs["pre_ids"] = paddle.full([rows, MAX_LENGTH], -1, dtype="int64")
inputs["attention_mask"] = paddle.zeros([rows, 1, MAX_LENGTH, MAX_LENGTH])
inputs["tgt_generation_mask"] = paddle.ones([rows, 1, 1, MAX_LENGTH])
inputs = {name: paddle.to_tensor(value) for name, value in inputs.items()}
shapes = model.get_cache_kvs_shape(model.config, rows, MAX_LENGTH)
model.generate(**inputs, cache_kvs=[paddle.zeros(shape) for shape in shapes])
print(json.dumps(llm_utils.load_real_time_tokens().tolist()))
