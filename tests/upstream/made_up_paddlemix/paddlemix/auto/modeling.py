"""Fake of PaddleMIX's module of this name: AutoModelMIX, with a small model that prints that it is loaded.

The line tells the tests that the plugin's hook has left a model to upstream.
"""

from __future__ import annotations

import paddle


class Upstream(paddle.nn.Layer):
    """Stand-in for upstream's model class."""

    def __init__(self, folder: str, dtype: str) -> None:
        super().__init__()
        print(f"upstream loads {folder} as {dtype}")
        self.visual = paddle.nn.Linear(3, 3)


class AutoModelMIX:
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        return Upstream(pretrained_model_name_or_path, kwargs["dtype"])
