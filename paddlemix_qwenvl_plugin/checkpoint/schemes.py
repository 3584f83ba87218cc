"""The three naming schemes of Qwen-VL checkpoints: canonical name -> stored name (the reverse: checkpoint.py).

| scheme | language | vision | linear weights |
| --- | --- | --- | --- |
| Hugging Face | `transformer.h.…` | `transformer.visual.…` | [out, in] |
| Paddle static | `qwen.h.…` | `visual.vit.…`, the resampler `visual.…` | [in, out] |
| PaddleMIX | `transformer.llm.h.…` | as Paddle static | [in, out] |

`lm_head.weight` has the same name in all three. Canonical names (tensors.py) are Hugging Face's without the leading
`transformer.`.
"""

from __future__ import annotations

from typing import NamedTuple

# Beginnings of the names in the vision tower, after "visual."; the other names belong to the resampler.
_TOWER = ("conv1.", "positional_embedding", "ln_pre.", "transformer.")


class Scheme(NamedTuple):
    """A naming scheme: prefixes of the names, and the layout that its model class loads.

    `language`, `tower` and `vision` are the prefixes of the language model, the vision tower and the resampler.
    `out_in` is True if linear weights are [out, in].
    `format` is the value of "format" in the metadata of safetensors files: "pt" for PyTorch, "pd" for Paddle.
    """

    title: str
    language: str
    vision: str
    tower: str
    out_in: bool
    format: str

    def name(self, canonical: str) -> str:
        """The stored name of a canonical tensor."""
        if canonical.startswith("lm_head."):
            return canonical
        if not canonical.startswith("visual."):
            return self.language + canonical
        name = canonical.removeprefix("visual.")
        return (self.tower if name.startswith(_TOWER) else self.vision) + name


SCHEMES = {
    "paddlemix": Scheme("PaddleMIX", "transformer.llm.", "visual.", "visual.vit.", out_in=False, format="pd"),
    "static": Scheme("Paddle static", "qwen.", "visual.", "visual.vit.", out_in=False, format="pd"),
    "huggingface": Scheme(
        "Hugging Face", "transformer.", "transformer.visual.", "transformer.visual.", out_in=True, format="pt"
    ),
}
