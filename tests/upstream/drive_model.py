"""Encode images with AutoModelMIX as PaddleMIX's scripts do: drive_model.py FOLDER IMAGES.npy FEATURES.npy.

Run by test_paddlemix.py with a checkout of PaddleMIX (QWENVL_PADDLEMIX_DIR). The assertions hold for PaddleMIX's model,
and with the plugin for its stand-in, which becomes the model when it is used.
"""

from __future__ import annotations

import sys

import numpy as np
import paddle
from paddlemix.auto import AutoModelMIX
from paddlenlp.transformers.model_utils import PretrainedModel

folder, images, out = sys.argv[1:]
model = AutoModelMIX.from_pretrained(folder, dtype="float32")
model.eval()
assert isinstance(model, PretrainedModel)
assert not model.training
assert type(model).__name__ == "QWenLMHeadModel"
with paddle.no_grad():
    np.save(out, model.visual(paddle.to_tensor(np.load(images))).numpy())
