"""Fake of PaddleMIX's script of this name: exports the vision stage, by the same calls of PaddleMIX and Paddle."""

from __future__ import annotations

import argparse

import paddle
from paddlemix.auto.modeling import AutoModelMIX

parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path")
parser.add_argument("--save_path")
args = parser.parse_args()

model = AutoModelMIX.from_pretrained(args.model_name_or_path, dtype="float16")
model.eval()
images = paddle.static.InputSpec(shape=[None, 3, None, None], dtype="float32")
paddle.jit.save(paddle.jit.to_static(model.visual, input_spec=[images]), args.save_path)
