"""Common part of the drive_*_2.py scripts: tokenizer and model, created as in PaddleNLP 3.0.0b4's create_predictor."""

from __future__ import annotations

import argparse
from typing import Any

import paddle
from paddlenlp.transformers import AutoConfig, AutoInferenceModelForCausalLM, AutoTokenizer
from paddlenlp.trl import llm_utils

MAX_LENGTH = 512


def create_model(folder: str, dtype: str, quant_type: str = "") -> tuple[Any, Any]:
    """Create the tokenizer and the model, which is the plugin's QWenForQWenVLInferenceModel in place of upstream's."""
    paddle.set_default_dtype(dtype)
    predictor_args = argparse.Namespace(
        model_name_or_path=folder,
        dtype=dtype,
        device="gpu",  # upstream's default
        mode="dynamic",
        inference_model=True,
        quant_type=quant_type,
        total_max_length=MAX_LENGTH,
        block_attn=False,
        append_attn=False,
        speculate_method=None,
        cachekv_int8_type=None,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    llm_utils.init_chat_template(tokenizer, folder, None)
    config = AutoConfig.from_pretrained(folder)
    # Upstream's create_predictor requires this, and allocates caches of the shapes below.
    assert llm_utils.get_model_max_position_embeddings(config) >= MAX_LENGTH
    rank, degree = llm_utils.init_dist_env()
    model = AutoInferenceModelForCausalLM.from_pretrained(
        folder,
        config=config,
        predictor_args=predictor_args,
        model_args=argparse.Namespace(model_type="qwen-img2txt"),
        dtype=dtype,
        tensor_parallel_degree=degree,
        tensor_parallel_rank=rank,
    )
    # The predictor allocates the KV caches by this method, here the plugin's.
    shapes = model.get_cache_kvs_shape(model.config, 1, MAX_LENGTH)
    assert shapes == [[2, 1, config.num_attention_heads, MAX_LENGTH, 128]] * config.num_hidden_layers
    return tokenizer, model
