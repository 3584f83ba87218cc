"""Names of objects in sentences, and the names that are unique in a scene."""

from __future__ import annotations

from collections.abc import Sequence

from paddlemix_qwenvl_plugin.demo.world.names import COLOURS, PLACES, SHAPES, SIZES
from paddlemix_qwenvl_plugin.demo.world.scene import Scene, Thing

# Sets of properties that a name mentions besides the kind. A name with "cell" is always unique: a cell contains at
# most one shape.
_PROPERTY_SETS = ((), ("colour",), ("size",), ("size", "colour"), ("cell",), ("colour", "cell"))


def shape_name(thing: Thing, language: str, properties: Sequence[str] = ("size", "colour")) -> str:
    """Name of a shape with some of `size`, `colour` and `cell`: "small red circle at the top left"."""
    size = SIZES[thing.size][language] if "size" in properties else ""
    colour = COLOURS[thing.colour][language] if "colour" in properties else ""
    place = PLACES[thing.cell][language] if "cell" in properties else ""
    kind = SHAPES[thing.kind][language]
    if language == "zh":
        return f"{place}的{size}{colour}{kind}" if place else f"{size}{colour}{kind}"
    return " ".join(word for word in (size, colour, kind, place) if word)


def text_name(thing: Thing, language: str) -> str:
    """Name of a text: `the word "CAT"` or `the number "42"`."""
    is_number = thing.text.isdigit()
    if language == "zh":
        return f"{'数字' if is_number else '单词'}“{thing.text}”"
    return f'the {"number" if is_number else "word"} "{thing.text}"'


def caption_name(thing: Thing, language: str) -> str:
    """Name of an object in a caption: "a small red circle", "一个小的红色圆形"."""
    if thing.text:
        return text_name(thing, language)
    return f"{'一个' if language == 'zh' else 'a '}{shape_name(thing, language)}"


def unique_names(scene: Scene, thing: Thing, language: str) -> list[str]:
    """List the names that identify a shape in the scene, with the article; never empty."""
    names = []
    for properties in _PROPERTY_SETS:
        alike = [
            other
            for other in scene.shapes
            if other.kind == thing.kind and all(getattr(other, p) == getattr(thing, p) for p in properties)
        ]
        if len(alike) == 1:
            names.append(the(shape_name(thing, language, properties), language))
    return names


def the(name: str, language: str) -> str:
    """Add the definite article in English."""
    return name if language == "zh" else f"the {name}"


def sentence(text: str, language: str) -> str:
    """Capitalize a text and add the full stop."""
    return f"{text}。" if language == "zh" else f"{text[:1].upper()}{text[1:]}."


def box_text(thing: Thing) -> str:
    """Box of an object as the model writes it: `<box>(x1,y1),(x2,y2)</box>`."""
    return "<box>({},{}),({},{})</box>".format(*thing.box)


def listing(items: Sequence[str], language: str) -> str:
    """Join items: "a, b and c"."""
    if len(items) == 1:
        return items[0]
    comma, last = ("、", "和") if language == "zh" else (", ", " and ")
    return comma.join(items[:-1]) + last + items[-1]
