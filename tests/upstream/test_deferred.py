"""A deferred object is created at its first use, and is then equivalent to upstream's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import paddle
import pytest

from paddlemix_qwenvl_plugin.upstream.deferred import Deferred
from paddlemix_qwenvl_plugin.upstream.image_encoder import DeferredModel
from paddlemix_qwenvl_plugin.upstream.patching import undo_all


class Model(paddle.nn.Layer):
    made = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1
        self.visual = paddle.nn.Linear(3, 2)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.visual(x) + 1


@pytest.fixture
def model():
    Model.made = 0
    yield DeferredModel(Model, "a folder", "float32")
    undo_all()


USES: dict[str, Callable[[Any], Any]] = {
    "isinstance": lambda it: isinstance(it, Model),
    "call": lambda it: it(paddle.ones([1, 3])).shape == [1, 2],
    "attribute": lambda it: len(it.parameters()) == 2,
    "assignment": lambda it: setattr(it, "more", 1) or it.more == 1,
    "deletion": lambda it: delattr(it, "visual") or not hasattr(it, "visual"),
    "repr": lambda it: repr(it).startswith("Model("),
    "copy": lambda it: isinstance(copy.deepcopy(it), Model),
    "part": lambda it: isinstance(it.visual, paddle.nn.Linear),
    "part of a layer": lambda it: len(paddle.nn.LayerList([it.visual]).parameters()) == 2,
    "state of a part": lambda it: set(it.visual.state_dict()) == {"weight", "bias"},
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_any_use_creates_it_once(model, use):
    encoder = model.visual
    model.eval()
    assert encoder is model.visual
    assert Model.made == 0
    assert use(model)
    assert Model.made == 1
    assert model.training is False
    assert type(model) is Model


def test_parts_are_the_model_s(model):
    encoder = model.visual
    encoder.weight.set_value(paddle.full([3, 2], 2.0))
    assert model(paddle.ones([1, 3])).numpy().tolist() == [[7.0, 7.0]]
    assert Model.made == 1


def test_static_encoder_that_is_run_is_static(model):
    spec = paddle.static.InputSpec([None, 3], "float32")
    encoder = paddle.jit.to_static(model.visual, input_spec=[spec])
    assert Model.made == 0
    assert encoder(paddle.ones([4, 3])).shape == [4, 2]
    assert isinstance(model.visual.forward, paddle.jit.dy2static.program_translator.StaticFunction)


@pytest.mark.parametrize("error", [OSError, AttributeError])
@pytest.mark.parametrize("use", [USES["isinstance"], USES["attribute"]])
def test_a_failing_creation_raises_at_every_use(error, use):
    def fails() -> Any:
        raise error("no such weights")

    deferred = Deferred(fails)
    for _ in range(2):
        with pytest.raises((OSError, RuntimeError), match="no such weights"):
            use(deferred)
