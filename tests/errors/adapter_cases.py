"""Cases of docs/errors.md for `--adapter`, adapters at run time; error_cases.py explains what a case is."""

from __future__ import annotations

from error_cases import Bench, Case, case, cases
from lora_cases import C_ATTN, C_ATTN_UPDATE, PEFT_CONFIG, Shapes, write_adapter

VISION_C_FC = "base_model.model.transformer.visual.transformer.resblocks.0.mlp.c_fc"


def predict(*values: str, shapes: Shapes = C_ATTN_UPDATE) -> Case:
    """`predict` with a flag `--adapter` for each value, and an adapter in adapter/ with tensors of these shapes."""

    def prepare(bench: Bench) -> list[str]:
        write_adapter("adapter", shapes, PEFT_CONFIG)
        return bench.predict(*(argument for value in values for argument in ("--adapter", value)))

    return prepare


cases(
    {
        "`--adapter` without a name": predict("adapter"),
        "`--adapter` without a folder": predict("a="),
        "two adapters of one name": predict("a=adapter", "a=adapter"),
        "`--adapter` of a folder that is not there": predict("a=none"),
        "two adapters for a command that uses one": predict("a=adapter", "b=adapter"),
        "an adapter at run time that replaces a tensor (modules_to_save)": predict(
            "a=adapter", shapes={**C_ATTN_UPDATE, "base_model.model.lm_head.weight": (704, 256)}
        ),
        "an adapter at run time for the vision tower": predict(
            "a=adapter",
            shapes={
                **C_ATTN_UPDATE,
                f"{VISION_C_FC}.lora_A.weight": (8, 64),
                f"{VISION_C_FC}.lora_B.weight": (256, 8),
            },
        ),
        "an adapter at run time of another model's size": predict(
            "a=adapter", shapes={f"{C_ATTN}.lora_A.weight": (8, 64), f"{C_ATTN}.lora_B.weight": (768, 8)}
        ),
    }
)


@case("an adapter at run time, with `QWENVL_ENGINE=portable`")
def _(bench: Bench) -> list[str]:
    bench.monkeypatch.setenv("QWENVL_ENGINE", "portable")
    write_adapter("adapter", C_ATTN_UPDATE, PEFT_CONFIG)
    return bench.predict("--adapter", "a=adapter")


@case("`--adapter` with the `--url` of a server")
def _(bench: Bench) -> list[str]:
    return ["chat", "--url", "http://127.0.0.1:1", "--adapter", "a=adapter"]


@case("`serve` with an adapter of the model's name")
def _(bench: Bench) -> list[str]:
    write_adapter("adapter", C_ATTN_UPDATE, PEFT_CONFIG)
    return [
        "serve",
        "--port",
        "0",
        *bench.stage_flags(),
        "--served_model_name",
        "a",
        "--adapter",
        "a=adapter",
    ]
