"""Short-answer questions about one image.

A function returns None if the scene, or its random choices, allow no question. The demo model is trained on these
questions and answers: other words need a new training (tools/train_demo).
"""

from __future__ import annotations

import random
from typing import Optional

from paddlemix_qwenvl_plugin.demo.world.names import COLOURS, PLACES, SHAPES, SIZES
from paddlemix_qwenvl_plugin.demo.world.phrases import listing, sentence, unique_names
from paddlemix_qwenvl_plugin.demo.world.sample import Turn
from paddlemix_qwenvl_plugin.demo.world.scene import Scene, Thing

_TEXT_NAME = {"en": "the text", "zh": "文字"}
_KIND = {"en": ("What shape is {}?", "Which shape is {}?"), "zh": ("{}是什么形状？", "{}是什么形状的？")}
# Questions about a property of an object, and the template of the answer.
_PROPERTIES: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "colour": {
        "en": (("What colour is {}?", "What color is {}?"), "{} is {}"),
        "zh": (("{}是什么颜色？", "{}是什么颜色的？"), "{}是{}的"),
    },
    "size": {
        "en": (("Is {} large or small?", "Is {} small or large?", "How big is {}?"), "{} is {}"),
        "zh": (("{}是大的还是小的？", "{}有多大？"), "{}是{}"),
    },
    "place": {
        "en": (("Where is {}?", "Where in the picture is {}?"), "{} is {}"),
        "zh": (("{}在哪里？", "{}在图中的什么位置？"), "{}在{}"),
    },
}
_EXISTS = {"en": ("Is there a {}?", "Do you see a {}?"), "zh": ("图中有{}吗？", "有{}吗？")}
_COUNT = {"en": ("How many {} are there?", "Count the {}."), "zh": ("有多少个{}？", "图中有几个{}？")}
_READ = {
    "en": ("What does the text say?", "Read the text.", "What is written in the picture?"),
    "zh": ("图中写了什么？", "读出图中的文字。", "文字是什么？"),
}
_LARGER = {"en": ("Which is larger, {} or {}?", "Which is bigger, {} or {}?"), "zh": ("{}和{}哪个更大？",)}
_SIDES = {
    "left": {"en": "to the left of", "zh": "左边"},
    "right": {"en": "to the right of", "zh": "右边"},
    "above": {"en": "above", "zh": "上面"},
    "below": {"en": "below", "zh": "下面"},
}
# Up to the shapes of two images, four each (pairs.py).
_NUMBERS = {
    "en": ("no", "one", "two", "three", "four", "five", "six", "seven", "eight"),
    "zh": ("没有", "一个", "两个", "三个", "四个", "五个", "六个", "七个", "八个"),
}


def colour(rng: random.Random, scene: Scene, language: str) -> Optional[Turn]:
    """Ask for the colour of a shape or of the text."""
    if len(scene.texts) == 1 and (not scene.shapes or rng.random() < 0.2):
        return _property(rng, language, "colour", (scene.texts[0], _TEXT_NAME[language]))
    return _property(rng, language, "colour", _shape_hiding(rng, scene, language, "colour"))


def size(rng: random.Random, scene: Scene, language: str) -> Optional[Turn]:
    """Ask for the size of a shape."""
    return _property(rng, language, "size", _shape_hiding(rng, scene, language, "size"))


def place(rng: random.Random, scene: Scene, language: str) -> Optional[Turn]:
    """Ask for the place of a shape."""
    return _property(rng, language, "place", _shape_hiding(rng, scene, language, "place"))


def kind(rng: random.Random, scene: Scene, language: str) -> Optional[Turn]:
    """Ask for the kind of a shape that its colour or place identifies: "What shape is the red shape?"."""
    if not scene.shapes:
        return None
    thing = rng.choice(scene.shapes)
    names = [
        f"{PLACES[thing.cell]['zh']}的图形" if language == "zh" else f"the shape {PLACES[thing.cell]['en']}"
    ]
    if sum(other.colour == thing.colour for other in scene.shapes) == 1:
        word = COLOURS[thing.colour][language]
        names.append(f"{word}的图形" if language == "zh" else f"the {word} shape")
    word = SHAPES[thing.kind][language]
    answer = f"它是{word}" if language == "zh" else f"it is a {word}"
    question = rng.choice(_KIND[language]).format(rng.choice(names))
    return Turn("shape", language, question, sentence(answer, language))


def exists(rng: random.Random, scene: Scene, language: str) -> Turn:
    """Ask whether a shape exists; if the scene has shapes, the answer is yes with a probability of at least 0.5."""
    real = rng.choice(scene.shapes) if scene.shapes and rng.random() < 0.5 else None
    kind_name = real.kind if real else rng.choice(list(SHAPES))
    colour_name = real.colour if real else rng.choice(list(COLOURS))
    # A near miss of an existing shape is harder than a random shape.
    if real is None and scene.shapes and rng.random() < 0.6:
        near = rng.choice(scene.shapes)
        kind_name, colour_name = rng.choice(((near.kind, colour_name), (kind_name, near.colour)))
    with_colour = rng.random() < 0.7
    found = any(
        other.kind == kind_name and (not with_colour or other.colour == colour_name) for other in scene.shapes
    )
    name = (f"{COLOURS[colour_name][language]} " if with_colour else "") + SHAPES[kind_name][language]
    if language == "zh":
        question = rng.choice(_EXISTS["zh"]).format(name.replace(" ", ""))
        return Turn("yes or no", language, question, "有。" if found else "没有。")
    question = rng.choice(_EXISTS["en"]).format(name).replace("a orange", "an orange")
    return Turn("yes or no", language, question, "Yes, there is." if found else "No, there is not.")


def count(rng: random.Random, scene: Scene, language: str) -> Turn:
    """Ask for the number of all shapes, or of a kind or colour, which the scene may lack."""
    draw = rng.random()  # up to 0.35 all shapes, up to 0.7 those of a colour, above those of a kind
    word = "图形" if language == "zh" else "shape"
    counted = list(scene.shapes)
    if draw > 0.35:
        shown = rng.choice(scene.shapes) if scene.shapes and rng.random() < 0.85 else None
        if draw > 0.7:
            kind_name = shown.kind if shown else rng.choice(list(SHAPES))
            counted = [other for other in scene.shapes if other.kind == kind_name]
            word = SHAPES[kind_name][language]
        else:
            colour_name = shown.colour if shown else rng.choice(list(COLOURS))
            counted = [other for other in scene.shapes if other.colour == colour_name]
            word = COLOURS[colour_name][language] + ("的图形" if language == "zh" else " shape")
    plural = word if language == "zh" else _plural(word)
    answer = count_answer(len(counted), word, language)
    return Turn("count", language, rng.choice(_COUNT[language]).format(plural), answer)


def count_answer(number: int, word: str, language: str) -> str:
    """Answer of a counting question: "There are two circles.", "有两个圆形。"."""
    name = _NUMBERS[language][number]
    if language == "zh":
        return f"{name}{word}。" if number == 0 else f"有{name}{word}。"
    return f"There {'is' if number == 1 else 'are'} {name} {word if number == 1 else _plural(word)}."


def read(rng: random.Random, scene: Scene, language: str) -> Turn:
    """Ask for the texts of the image."""
    question = rng.choice(_READ[language])
    words = [thing.text for thing in scene.texts]
    if not words:
        return Turn("reading", language, question, "没有文字。" if language == "zh" else "There is no text.")
    answer = (
        f"写的是{listing(words, language)}" if language == "zh" else f"it says {listing(words, language)}"
    )
    return Turn("reading", language, question, sentence(answer, language), text=" ".join(words))


def larger(rng: random.Random, scene: Scene, language: str) -> Optional[Turn]:
    """Ask which of two shapes of different size is larger."""
    shapes = _two_shapes(rng, scene)
    if shapes is None or shapes[0].size == shapes[1].size:
        return None
    names = [_name_hiding(rng, scene, thing, language, "size") for thing in shapes]
    if not all(names):
        return None
    winner = names[0] if shapes[0].size == "large" else names[1]
    answer = f"{winner}更大" if language == "zh" else f"{winner} is larger"
    question = rng.choice(_LARGER[language]).format(*names)
    return Turn("relation", language, question, sentence(answer, language))


def side(rng: random.Random, scene: Scene, language: str) -> Optional[Turn]:
    """Ask whether a shape is on a side of another, in another column or row: "Is the red circle above the star?"."""
    shapes = _two_shapes(rng, scene)
    if shapes is None:
        return None
    columns, rows = ([thing.cell % 3 for thing in shapes], [thing.cell // 3 for thing in shapes])
    chosen = rng.choice(list(_SIDES))
    first, second = columns if chosen in ("left", "right") else rows
    if first == second:
        return None
    is_true = first < second if chosen in ("left", "above") else first > second
    a, b = (_name_hiding(rng, scene, thing, language, "place") for thing in shapes)
    if not a or not b:
        return None
    word = _SIDES[chosen][language]
    where, other = (PLACES[thing.cell][language] for thing in shapes)
    # Places first, verdict last: generating the places helps the model reach the verdict.
    if language == "zh":
        answer = f"{a}在{where}，{b}在{other}，所以{'是的' if is_true else '不是'}。"
        return Turn("relation", language, f"{a}在{b}的{word}吗？", answer)
    answer = sentence(f"{a} is {where} and {b} is {other}, so {'yes' if is_true else 'no'}", language)
    return Turn("relation", language, f"Is {a} {word} {b}?", answer)


def _property(
    rng: random.Random, language: str, prop: str, named: Optional[tuple[Thing, str]]
) -> Optional[Turn]:
    """Ask about a property of an object with a name; None if `named` is None."""
    if named is None:
        return None
    thing, name = named
    questions, answer = _PROPERTIES[prop][language]
    text = answer.format(name, _word(thing, prop, language))
    return Turn(prop, language, rng.choice(questions).format(name), sentence(text, language))


def _word(thing: Thing, prop: str, language: str) -> str:
    """Word for an object's place, colour or size."""
    if prop == "place":
        return PLACES[thing.cell][language]
    return (COLOURS[thing.colour] if prop == "colour" else SIZES[thing.size])[language]


def _shape_hiding(rng: random.Random, scene: Scene, language: str, prop: str) -> Optional[tuple[Thing, str]]:
    """Choose a shape, and a name by `_name_hiding`; None if the scene has no shape, or the shape no such name."""
    thing = rng.choice(scene.shapes) if scene.shapes else None
    name = thing and _name_hiding(rng, scene, thing, language, prop)
    return (thing, name) if thing and name else None


def _name_hiding(rng: random.Random, scene: Scene, thing: Thing, language: str, prop: str) -> str:
    """Choose a unique name that does not reveal the property `prop`; "" if none exists."""
    hidden = _word(thing, prop, language)
    names = [name for name in unique_names(scene, thing, language) if hidden not in name]
    return rng.choice(names) if names else ""


def _two_shapes(rng: random.Random, scene: Scene) -> Optional[list[Thing]]:
    return rng.sample(scene.shapes, 2) if len(scene.shapes) > 1 else None


def _plural(word: str) -> str:
    return f"{word}es" if word.endswith("s") else f"{word}s"
