"""Questions about two images. A function returns None if the scenes, or its random choices, allow no question.

The demo model is trained on these questions and answers: other words need a new training (tools/train_demo).
"""

from __future__ import annotations

import random
from typing import Optional

from paddlemix_qwenvl_plugin.demo.world.captions import caption_text
from paddlemix_qwenvl_plugin.demo.world.names import COLOURS, SHAPES
from paddlemix_qwenvl_plugin.demo.world.phrases import sentence, shape_name
from paddlemix_qwenvl_plugin.demo.world.questions import count_answer
from paddlemix_qwenvl_plugin.demo.world.sample import Turn
from paddlemix_qwenvl_plugin.demo.world.scene import Scene

_TASK = "two images"
_DESCRIBE = {
    "en": ("Describe Picture {}.", "What is in Picture {}?"),
    "zh": ("描述第{}张图片。", "第{}张图片里有什么？"),
}
_WHICH = {"en": ("Which picture has {}?", "In which picture is {}?"), "zh": ("哪张图片里有{}？",)}
_MORE = {"en": ("Which picture has more shapes?",), "zh": ("哪张图片里的图形更多？",)}
_TOTAL = {
    "en": "How many shapes are there in the two pictures?",
    "zh": "两张图片里一共有多少个图形？",
}
_COLOUR = {"en": "What colour is {} in Picture {}?", "zh": "第{1}张图片里的{0}是什么颜色？"}


def describe(rng: random.Random, scenes: tuple[Scene, Scene], language: str) -> Turn:
    """Ask for a caption of one of the images."""
    number = rng.randint(1, 2)
    question = rng.choice(_DESCRIBE[language]).format(number)
    return Turn(_TASK, language, question, caption_text(scenes[number - 1], language))


def which(rng: random.Random, scenes: tuple[Scene, Scene], language: str) -> Optional[Turn]:
    """Ask which image contains a shape, or text, that the other lacks."""
    number = rng.randint(1, 2)
    scene, other = scenes[number - 1], scenes[2 - number]
    if scene.texts and not other.texts and rng.random() < 0.5:
        name = "文字" if language == "zh" else "text"
    else:
        if not scene.shapes:
            return None
        thing = rng.choice(scene.shapes)
        properties = rng.choice(((), ("colour",)))
        if any(
            shape.kind == thing.kind and all(getattr(shape, p) == getattr(thing, p) for p in properties)
            for shape in other.shapes
        ):
            return None
        name = shape_name(thing, language, properties)
        if language == "en":
            name = f"an {name}" if name.startswith("orange") else f"a {name}"
    return Turn(_TASK, language, rng.choice(_WHICH[language]).format(name), _image_answer(number, language))


def more(rng: random.Random, scenes: tuple[Scene, Scene], language: str) -> Optional[Turn]:
    """Ask which image has more shapes."""
    first, second = (len(scene.shapes) for scene in scenes)
    if first == second:
        return None
    answer = _image_answer(1 if first > second else 2, language)
    return Turn(_TASK, language, rng.choice(_MORE[language]), answer)


def total(rng: random.Random, scenes: tuple[Scene, Scene], language: str) -> Turn:
    """Ask for the number of shapes in both images."""
    number = sum(len(scene.shapes) for scene in scenes)
    word = "图形" if language == "zh" else "shape"
    return Turn(_TASK, language, _TOTAL[language], count_answer(number, word, language))


def colour(rng: random.Random, scenes: tuple[Scene, Scene], language: str) -> Optional[Turn]:
    """Ask for the colour of a shape in one of the images."""
    number = rng.randint(1, 2)
    scene = scenes[number - 1]
    if not scene.shapes:
        return None
    thing = rng.choice(scene.shapes)
    # Named by kind, which must be unique in this image only: the question has the number of the image.
    name = SHAPES[thing.kind][language]
    if sum(shape.kind == thing.kind for shape in scene.shapes) > 1:
        return None
    word = COLOURS[thing.colour][language]
    question = _COLOUR[language].format(name if language == "zh" else f"the {name}", number)
    answer = f"{name}是{word}的" if language == "zh" else f"the {name} is {word}"
    return Turn(_TASK, language, question, sentence(answer, language))


def _image_answer(number: int, language: str) -> str:
    return f"第{number}张图片。" if language == "zh" else f"Picture {number}."
