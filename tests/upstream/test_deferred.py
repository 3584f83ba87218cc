"""Deferred models: created at their first use, and from then on equivalent to upstream's model."""

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
    n_created = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).n_created += 1
        self.visual = paddle.nn.Linear(3, 2)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.visual(x) + 1


@pytest.fixture
def model():
    Model.n_created = 0
    yield DeferredModel(load=Model, name_or_path="a folder", dtype="float32")
    undo_all()  # DeferredModel replaces paddle.jit.to_static and paddle.jit.save


# Uses of a model, each with a check of the result. setattr and delattr return None, so that `or` continues.
USES: dict[str, Callable[[Any], Any]] = {
    "isinstance": lambda model: isinstance(model, Model),
    "call": lambda model: model(paddle.ones([1, 3])).shape == [1, 2],
    "attribute": lambda model: len(model.parameters()) == 2,
    "assignment": lambda model: setattr(model, "more", 1) or model.more == 1,
    "deletion": lambda model: delattr(model, "visual") or not hasattr(model, "visual"),
    "repr": lambda model: repr(model).startswith("Model("),
    "copy": lambda model: isinstance(copy.deepcopy(model), Model),
    "sublayer": lambda model: isinstance(model.visual, paddle.nn.Linear),
    "sublayer in another layer": lambda model: len(paddle.nn.LayerList([model.visual]).parameters()) == 2,
    "state of a sublayer": lambda model: set(model.visual.state_dict()) == {"weight", "bias"},
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_creates_the_model_once(model, use):
    encoder = model.visual
    model.eval()
    assert encoder is model.visual
    assert Model.n_created == 0
    assert use(model)
    assert Model.n_created == 1
    # After isinstance(), which creates the model but does not turn the placeholder into it, this access does so.
    assert model.training is False
    assert type(model) is Model


def test_a_sublayer_shares_its_parameters_with_the_model(model):
    encoder = model.visual
    encoder.weight.set_value(paddle.full([3, 2], 2.0))
    assert model(paddle.ones([1, 3])).numpy().tolist() == [[7.0, 7.0]]
    assert Model.n_created == 1


def test_a_static_encoder_creates_the_model_when_it_is_run(model):
    spec = paddle.static.InputSpec([None, 3], "float32")
    encoder = paddle.jit.to_static(model.visual, input_spec=[spec])
    assert Model.n_created == 0
    assert encoder(paddle.ones([4, 3])).shape == [4, 2]
    assert isinstance(model.visual.forward, paddle.jit.dy2static.program_translator.StaticFunction)


@pytest.mark.parametrize("error", [OSError, AttributeError])
@pytest.mark.parametrize("use", [USES["isinstance"], USES["attribute"]])
def test_a_failing_creation_raises_at_every_use(error, use):
    def fail() -> Any:
        raise error("no such weights")

    deferred = Deferred(fail)
    for _ in range(2):
        # An AttributeError becomes a RuntimeError, because isinstance() and hasattr() would swallow it.
        with pytest.raises((OSError, RuntimeError), match="no such weights"):
            use(deferred)
