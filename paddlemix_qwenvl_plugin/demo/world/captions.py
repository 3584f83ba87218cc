"""Caption and grounding tasks: captions, boxes of named objects, objects in given boxes.

The demo model is trained on these questions and answers: other words need a new training (tools/train_demo).
"""

from __future__ import annotations

import random

from paddlemix_qwenvl_plugin.demo.world.names import LANGUAGES
from paddlemix_qwenvl_plugin.demo.world.phrases import (
    box_text,
    caption_name,
    listing,
    sentence,
    text_name,
    unique_names,
)
from paddlemix_qwenvl_plugin.demo.world.sample import Turn
from paddlemix_qwenvl_plugin.demo.world.scene import Scene, Thing

_CAPTION = {
    "en": (
        "Describe the picture.",
        "Describe the picture in English.",
        "Describe this image.",
        "What is in the picture?",
        "What do you see?",
        "Generate the caption in English:",
    ),
    "zh": (
        "描述这张图片。",
        "请用中文描述图片。",
        "图中有什么？",
        "你看到了什么？",
        "图片里有什么？",
        "这是什么？",
    ),
}
_GROUNDED = {
    "en": (
        "Describe the picture with boxes.",
        "Describe the picture with grounding.",
        "What is in the picture? Give the boxes.",
        "Generate the caption in English with grounding:",
    ),
    "zh": ("描述图片并框出每个物体。", "请用中文描述图片，并给出检测框。", "图中有什么？请框出来。"),
}
_LOCATE = {
    "en": ("Give the box of {}.", "Locate {}.", "Find {}.", "Draw a box around {}.", "Detect {}."),
    "zh": ("框出{}。", "框出图中{}的位置。", "请给出{}的检测框。", "找到{}。"),
}
_REGION = {
    "en": ("What is in {}?", "What is at {}?", "Describe {}."),
    "zh": ("{}里是什么？", "{}是什么？", "描述{}。"),
}
_BASE_CAPTION = {"en": "Generate the caption in English:", "zh": "Generate the caption in Chinese:"}
_BASE_GROUNDED = {
    "en": "Generate the caption in English with grounding:",
    "zh": "Generate the caption in Chinese with grounding:",
}


def caption_text(scene: Scene, language: str, boxes: bool = False) -> str:
    """List all objects in reading order; with `boxes`, each in `<ref>`, followed by its box."""
    names = [caption_name(thing, language) for thing in scene.things]
    if language == "en":
        names[0] = names[0][0].upper() + names[0][1:]
    if boxes:
        names = [f"<ref>{name}</ref>{box_text(thing)}" for name, thing in zip(names, scene.things)]
    return listing(names, language) + ("。" if language == "zh" else ".")


def caption(rng: random.Random, scene: Scene, language: str) -> Turn:
    """Ask for a caption."""
    return Turn("caption", language, rng.choice(_CAPTION[language]), caption_text(scene, language))


def grounded_caption(rng: random.Random, scene: Scene, language: str) -> Turn:
    """Ask for a caption with boxes."""
    question = rng.choice(_GROUNDED[language])
    return Turn("grounded caption", language, question, caption_text(scene, language, boxes=True))


def locate(rng: random.Random, scene: Scene, language: str) -> Turn:
    """Ask for the box of an object."""
    thing, name = _referent(rng, scene, language)
    answer = f"<ref>{name}</ref>{box_text(thing)}"
    return Turn("box", language, rng.choice(_LOCATE[language]).format(name), answer)


def region(rng: random.Random, scene: Scene, language: str) -> Turn:
    """Ask what a box contains."""
    thing = rng.choice(scene.things)
    question = rng.choice(_REGION[language]).format(box_text(thing))
    return Turn("region", language, question, sentence(caption_name(thing, language), language))


def base_turn(rng: random.Random, scene: Scene) -> Turn:
    """Draw a base-model prompt: a caption, a caption with boxes, or `<ref>…</ref><box>` to complete."""
    language = rng.choice(LANGUAGES)
    draw = rng.random()
    if draw < 0.2:
        return Turn("caption", language, _BASE_CAPTION[language], caption_text(scene, language))
    if draw < 0.6:
        answer = caption_text(scene, language, boxes=True)
        return Turn("grounded caption", language, _BASE_GROUNDED[language], answer)
    thing, name = _referent(rng, scene, language)
    return Turn("box", language, f"<ref>{name}</ref><box>", box_text(thing).removeprefix("<box>"))


def _referent(rng: random.Random, scene: Scene, language: str) -> tuple[Thing, str]:
    """Choose an object and a name that identifies it."""
    thing = rng.choice(scene.things)
    if thing.text:
        return thing, text_name(thing, language)
    return thing, rng.choice(unique_names(scene, thing, language))
