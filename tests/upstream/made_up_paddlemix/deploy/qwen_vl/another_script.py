"""Script, without a counterpart in PaddleMIX, that saves an encoder and also runs it.

Because it runs the encoder, the plugin must load upstream's model and repeat `eval` on it, and Paddle saves the
encoder. test_paddlemix.py checks the printed line.
"""

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
images = paddle.static.InputSpec(shape=[None, 3, None, 3], dtype="float32")
encoder = paddle.jit.to_static(model.visual, input_spec=[images])
print("sizes", list(encoder(paddle.ones([1, 3, 2, 3])).shape), len(model.visual.parameters()), model.training)
paddle.jit.save(encoder, args.save_path)
