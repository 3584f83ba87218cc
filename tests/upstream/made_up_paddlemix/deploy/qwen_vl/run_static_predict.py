"""Fake of PaddleMIX's script of this name: a Predictor that gives both programs the inputs of PaddleMIX's.

Only MAX_LEN differs. drive_predictor.py imports the class, which the plugin adapts to its exports (stock_predictor.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import paddle
from paddlemix.processors.qwen_vl_processing import QwenVLProcessor
from utils import load_real_time_tokens

from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer

MAX_LEN = 600  # 1024 upstream


class Predictor:
    def __init__(self, args):
        self.args = args
        self.visual = json.loads(Path(args.model_name_or_path, "config.json").read_text())["visual"]
        self.tokenizer = QwenTokenizer.from_folder(Path(args.model_name_or_path))
        self.processor = QwenVLProcessor(self.tokenizer)
        self.first_predictor = self.create_predictor(args.first_model_path)
        self.second_predictor = self.create_predictor(args.second_model_path)

    def create_predictor(self, model_path):
        if not Path(model_path + ".pdmodel").exists():
            raise ValueError(f"upstream finds no {model_path}.pdmodel")
        config = paddle.inference.Config(model_path + ".pdmodel", model_path + ".pdiparams")
        return paddle.inference.create_predictor(config)

    def encode_images(self, pixels):
        return self.first_predictor.run([pixels])[0]

    def generate_with_image_features(self, features, ids):
        # As in upstream: the batch size is the number of images, although ids has one row. Number of layers, size of
        # the caches, dtype and stop token are constants.
        rows, width, dtype = features.shape[0], ids.shape[1], "float16"
        starts = paddle.where(ids == self.visual["image_start_id"])
        ends = paddle.where(ids == self.visual["image_start_id"] + 1)
        # `where` returns columns in older versions of Paddle, for which upstream is written. The plugin replaces
        # `paddle` in this module by a proxy whose `where` returns columns with every version.
        img_pos = paddle.concat([starts[0], starts[1], ends[1]], axis=1)
        mask = paddle.zeros([rows, 1, MAX_LEN, MAX_LEN], dtype)
        mask[:, 0, :width, :width] = paddle.tril(paddle.ones([width, width], dtype))

        def column(value, column_dtype):
            return paddle.full([rows, 1], value, column_dtype)

        # In the order of stock_inputs() in artifact/contract.py, a line of names per line of code:
        #   input_ids, image_features, img_pos, attention_mask, position_ids
        #   penalty_score, frequency_score, presence_score
        #   min_length, max_length
        #   temperature, top_p, eos_token_id
        #   seq_len_encoder, seq_len_decoder, step_idx, stop_flags
        #   tgt_ids (any value), tgt_pos, tgt_generation_mask
        #   pre_ids (any value), stop_nums
        #   a cache per layer
        feed = [ids, features, img_pos, mask, paddle.tile(paddle.arange(width), [rows, 1])]
        feed += [column(1.0, "float32"), column(0.0, "float32"), column(0.0, "float32")]
        feed += [column(1, "int64"), column(MAX_LEN - width, "int64")]
        feed += [column(1.0, "float32"), column(0.0, "float32"), paddle.to_tensor([151643])]
        feed += [column(width, "int32"), column(width, "int32"), column(0, "int64"), column(False, "bool")]
        feed += [column(-123, "int64"), column(width - 1, "int64"), paddle.ones([rows, 1, 1, MAX_LEN], dtype)]
        feed += [paddle.full([rows, MAX_LEN], -100, "int64"), paddle.to_tensor([rows])]
        feed += [paddle.rand([2, rows, 32, MAX_LEN, 128], dtype) for _ in range(32)]
        self.second_predictor.run(feed)
        return load_real_time_tokens().tolist(), None
