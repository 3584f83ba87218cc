"""The demo model: size, accuracy, and the same logits and prompts as in its training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from paddlemix_qwenvl_plugin import QwenVL, export_language, export_vision
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.demo.score import mark, score
from paddlemix_qwenvl_plugin.demo.world.draw import draw
from paddlemix_qwenvl_plugin.demo.world.sample import Sample
from paddlemix_qwenvl_plugin.demo.world.scene import random_scene
from paddlemix_qwenvl_plugin.demo.world.tasks import held_out
from paddlemix_qwenvl_plugin.processing.images import preprocess
from paddlemix_qwenvl_plugin.processing.prompts import base_prompt, chat_prompt
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer

FOLDER = Path(__file__).resolve().parents[3] / "paddlemix_qwenvl_plugin" / "demo" / "model"
NO_TORCH = "PyTorch is not installed; `pip install torch` to compare the trainer's model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QwenVL:
    folder = tmp_path_factory.mktemp("demo")
    export_vision(FOLDER, folder / "vision" / "vision")
    export_language(FOLDER, folder / "text", "qwen")
    return QwenVL.from_exported(folder / "vision" / "vision", folder / "text" / "qwen")


def test_the_checkpoint_is_valid_and_small() -> None:
    checkpoint = Checkpoint(FOLDER)
    tokenizer = QwenTokenizer.from_folder(FOLDER)
    assert tokenizer.img_start_id == checkpoint.config.visual.image_start_id
    assert tokenizer.n_vocab <= checkpoint.config.vocab_size
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 12_000_000


def test_picture_label_is_that_of_the_training(model: QwenVL) -> None:
    """Unlike Qwen-VL, the model was trained without a space after the colon; its exported stages record this."""
    assert QwenTokenizer.from_folder(FOLDER).picture_label == "Picture {}:"
    assert model.tokenizer.picture_label == "Picture {}:"
    prompt = base_prompt(model.tokenizer, [{"image": "a.png"}])
    assert model.tokenizer.decode(prompt.input_ids) == "Picture 1:<img>a.png</img>\n"


def test_accuracy(model: QwenVL) -> None:
    marks = []
    for number in range(5000, 5040):
        sample = held_out(number)
        images = [draw(scene) for scene in sample.scenes]
        answer = model.generate(sample.parts(images), chat=sample.form == "chat", max_new_tokens=200)
        marks.append(mark(sample, answer.text))
    rates = score(marks)
    # Far below the model's accuracy (docs/demo-model.md), far above the accuracy of a model that ignores the image.
    assert rates["words"].value > 0.85
    assert rates["boxes"].value > 0.8


def test_with_another_image_all_answers_are_wrong(model: QwenVL) -> None:
    """The answers depend on the image."""
    samples = [sample for sample in map(held_out, range(6000, 6100)) if sample.turns[0].task == "caption"][:6]
    assert len(samples) == 6
    n_right = 0
    for sample, other_sample in zip(samples, [*samples[1:], samples[0]]):
        parts = sample.parts([draw(other_sample.scenes[0])])
        answer = model.generate(parts, chat=sample.form == "chat", max_new_tokens=120)
        n_right += mark(sample, answer.text).words_right
    assert n_right == 0


def test_the_trainer_computes_the_same_logits() -> None:
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    import paddle

    from paddlemix_qwenvl_plugin.modeling.weights import load_language, load_vision
    from tools.train_demo.model import QwenVL as TorchModel

    checkpoint = Checkpoint(FOLDER)
    torch_model = TorchModel(json.loads((FOLDER / "config.json").read_text("utf-8")))
    # From Paddle's layout of linear weights, [in, out], to PyTorch's, [out, in].
    specs = {**checkpoint.language, **checkpoint.vision}
    weights = {
        name: torch.from_numpy(np.ascontiguousarray(values.T if specs[name].linear else values))
        for name, values in checkpoint.tensors(specs, "float32")
    }
    torch_model.load_state_dict(weights)
    tokenizer = QwenTokenizer.from_folder(FOLDER)
    scenes = [random_scene(random.Random(i)) for i in range(2)]
    images = [draw(scene) for scene in scenes]
    prompt = chat_prompt(tokenizer, [*({"image": image} for image in images), {"text": "What do you see?"}])
    pixels = np.stack([preprocess(image, 128) for image in images])
    ids = np.array([prompt.input_ids])
    starts = np.nonzero(ids[0] == tokenizer.img_start_id)[0]
    with torch.no_grad():
        torch_features = torch_model.visual.features(torch.from_numpy(pixels))
        hidden = torch_model.hidden(torch.from_numpy(ids), torch_features, torch.from_numpy(starts[None]))
        torch_logits = torch_model.lm_head(hidden[:, -1])
    with paddle.no_grad():
        vision, language = load_vision(checkpoint), load_language(checkpoint)
        features = vision(paddle.to_tensor(pixels))
        # Row, index of <img>, index of </img>: 256 image slots are between them.
        img_pos = paddle.to_tensor([[0, int(start), int(start) + 257] for start in starts])
        length = paddle.to_tensor([[ids.shape[1]]])
        embeddings = language.embed(paddle.to_tensor(ids), features, img_pos)
        logits, _ = language(embeddings, paddle.arange(ids.shape[1]).unsqueeze(0), length, length)
    np.testing.assert_allclose(torch_features.numpy(), features.numpy(), rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(torch_logits.numpy(), logits.numpy(), rtol=1e-3, atol=5e-3)


def test_training_rows_are_chat_prompts() -> None:
    """A training row is the prompt of a conversation and its last answer; all answers and their ends are learned."""
    pytest.importorskip("torch", reason=NO_TORCH)
    from tools.train_demo.conversation import conversation
    from tools.train_demo.rows import NAME, ONE, make_row

    tokenizer = QwenTokenizer.from_folder(FOLDER)
    scene = random_scene(random.Random("rows"))
    turns = conversation(random.Random("rows"), (scene,), n_turns=4)
    assert len(turns) > 2
    row = make_row(tokenizer, Sample((scene,), turns, "chat"), ONE)  # the size of rows with one image
    query = [{"image": NAME}, {"text": turns[0].question}]
    history = [(query, turns[0].answer), *((turn.question, turn.answer) for turn in turns[1:-1])]
    expected = [
        *chat_prompt(tokenizer, turns[-1].question, history).input_ids,
        *tokenizer.encode(turns[-1].answer),
        tokenizer.im_end_id,
    ]
    assert row.ids[: len(expected)].tolist() == expected
    assert set(row.ids[len(expected) :].tolist()) == {tokenizer.eod_id}  # padding
    # row.at: positions whose next token is learned; -1 is padding.
    learned = [int(row.ids[position + 1]) for position in row.at if position >= 0]
    answers = [[*tokenizer.encode(turn.answer), tokenizer.im_end_id] for turn in turns]
    assert learned == [token for answer in answers for token in answer]
