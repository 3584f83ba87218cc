"""The shipped demo model: size, accuracy, and the same logits as its trainer."""

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
def exported(tmp_path_factory: pytest.TempPathFactory) -> QwenVL:
    folder = tmp_path_factory.mktemp("demo")
    export_vision(FOLDER, folder / "vision" / "vision")
    export_language(FOLDER, folder / "text", "qwen")
    return QwenVL.from_exported(folder / "vision" / "vision", folder / "text" / "qwen")


def test_the_folder_opens_and_is_small() -> None:
    checkpoint = Checkpoint(FOLDER)
    tokenizer = QwenTokenizer.from_folder(FOLDER)
    assert tokenizer.img_start_id == checkpoint.config.visual.image_start_id
    assert tokenizer.n_vocab <= checkpoint.config.vocab_size
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 12_000_000


def test_picture_label_is_that_of_the_training(exported: QwenVL) -> None:
    """It was trained without a space after the colon, unlike Qwen-VL, and its exports record that."""
    assert QwenTokenizer.from_folder(FOLDER).picture_label == "Picture {}:"
    assert exported.tokenizer.picture_label == "Picture {}:"
    prompt = base_prompt(exported.tokenizer, [{"image": "a.png"}])
    assert exported.tokenizer.decode(prompt.input_ids) == "Picture 1:<img>a.png</img>\n"


def test_it_uses_the_image(exported: QwenVL) -> None:
    marks = []
    for number in range(5000, 5040):
        sample = held_out(number)
        images = [draw(scene) for scene in sample.scenes]
        answer = exported.generate(sample.parts(images), chat=sample.form == "chat", max_new_tokens=200)
        marks.append(mark(sample, answer.text))
    rates = score(marks)
    # Far below its accuracy (docs/demo-model.md) and far above that of a model without the image.
    assert rates["words"].value > 0.85
    assert rates["boxes"].value > 0.8


def test_another_image_gives_wrong_answers(exported: QwenVL) -> None:
    """The answers depend on the image: with another image they are wrong."""
    samples = [sample for sample in map(held_out, range(6000, 6100)) if sample.turns[0].task == "caption"][:6]
    assert len(samples) == 6
    right = 0
    for sample, other in zip(samples, [*samples[1:], samples[0]]):
        parts = sample.parts([draw(other.scenes[0])])
        answer = exported.generate(parts, chat=sample.form == "chat", max_new_tokens=120)
        right += mark(sample, answer.text).words_right
    assert right == 0


def test_the_trainer_computes_the_same_logits() -> None:
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    import paddle

    from paddlemix_qwenvl_plugin.modeling.weights import load_language, load_vision
    from tools.train_demo.model import QwenVL as Trained

    checkpoint = Checkpoint(FOLDER)
    trained = Trained(json.loads((FOLDER / "config.json").read_text("utf-8")))
    # From Paddle's layout to PyTorch's.
    specs = {**checkpoint.language, **checkpoint.vision}
    weights = {
        name: torch.from_numpy(np.ascontiguousarray(values.T if specs[name].linear else values))
        for name, values in checkpoint.tensors(specs, "float32")
    }
    trained.load_state_dict(weights)
    tokenizer = QwenTokenizer.from_folder(FOLDER)
    scenes = [random_scene(random.Random(i)) for i in range(2)]
    images = [draw(scene) for scene in scenes]
    prompt = chat_prompt(tokenizer, [*({"image": image} for image in images), {"text": "What do you see?"}])
    pixels = np.stack([preprocess(image, 128) for image in images])
    ids = np.array([prompt.input_ids])
    starts = np.nonzero(ids[0] == tokenizer.img_start_id)[0]
    with torch.no_grad():
        features = trained.visual.features(torch.from_numpy(pixels))
        hidden = trained.hidden(torch.from_numpy(ids), features, torch.from_numpy(starts[None]))
        ours = trained.lm_head(hidden[:, -1]).numpy()
    with paddle.no_grad():
        vision, language = load_vision(checkpoint), load_language(checkpoint)
        seen = vision(paddle.to_tensor(pixels))
        img_pos = paddle.to_tensor([[0, int(start), int(start) + 257] for start in starts])
        length = paddle.to_tensor([[ids.shape[1]]])
        embeddings = language.embed(paddle.to_tensor(ids), seen, img_pos)
        theirs, _ = language(embeddings, paddle.arange(ids.shape[1]).unsqueeze(0), length, length)
    np.testing.assert_allclose(features.numpy(), seen.numpy(), rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=5e-3)


def test_training_rows_are_the_chat_prompts() -> None:
    pytest.importorskip("torch", reason=NO_TORCH)
    from tools.train_demo.conversation import conversation
    from tools.train_demo.rows import NAME, ONE, make_row

    tokenizer = QwenTokenizer.from_folder(FOLDER)
    scene = random_scene(random.Random("rows"))
    turns = conversation(random.Random("rows"), (scene,), 4)
    assert len(turns) > 2
    row = make_row(tokenizer, Sample((scene,), turns, "chat"), ONE)
    query = [{"image": NAME}, {"text": turns[0].question}]
    history = [(query, turns[0].answer), *((turn.question, turn.answer) for turn in turns[1:-1])]
    expected = [
        *chat_prompt(tokenizer, turns[-1].question, history).input_ids,
        *tokenizer.encode(turns[-1].answer),
        tokenizer.im_end_id,
    ]
    assert row.ids[: len(expected)].tolist() == expected
    assert set(row.ids[len(expected) :].tolist()) == {tokenizer.eod_id}
    learned = [int(row.ids[at + 1]) for at in row.at if at >= 0]
    assert learned == [
        token for turn in turns for token in [*tokenizer.encode(turn.answer), tokenizer.im_end_id]
    ]
