"""Cases of docs/errors.md for `--adapter`: adapters at run time."""

from __future__ import annotations

from error_cases import Bench, Provoke, case, cases
from lora_cases import C_ATTN, PAIR, PEFT, Shapes, write

TOWER = "base_model.model.transformer.visual.transformer.resblocks.0.mlp.c_fc"


def predict(*given: str, shapes: Shapes = PAIR) -> Provoke:
    """`predict` with the flag's values, one of which may name the folder `adapter`."""

    def provoke(bench: Bench) -> list[str]:
        write("adapter", shapes, PEFT)
        return bench.predict(*(word for value in given for word in ("--adapter", value)))

    return provoke


cases(
    {
        "`--adapter` without a name": predict("adapter"),
        "`--adapter` without a folder": predict("a="),
        "two adapters of one name": predict("a=adapter", "a=adapter"),
        "`--adapter` of a folder that is not there": predict("a=none"),
        "two adapters for a command that uses one": predict("a=adapter", "b=adapter"),
        "an adapter at run time that replaces a tensor (modules_to_save)": predict(
            "a=adapter", shapes={**PAIR, "base_model.model.lm_head.weight": (704, 256)}
        ),
        "an adapter at run time for the vision tower": predict(
            "a=adapter",
            shapes={**PAIR, f"{TOWER}.lora_A.weight": (8, 64), f"{TOWER}.lora_B.weight": (256, 8)},
        ),
        "an adapter at run time of another model's size": predict(
            "a=adapter", shapes={f"{C_ATTN}.lora_A.weight": (8, 64), f"{C_ATTN}.lora_B.weight": (768, 8)}
        ),
    }
)


@case("an adapter at run time, with `QWENVL_ENGINE=portable`")
def _(bench: Bench) -> list[str]:
    bench.monkeypatch.setenv("QWENVL_ENGINE", "portable")
    write("adapter", PAIR, PEFT)
    return bench.predict("--adapter", "a=adapter")


@case("`--adapter` with the `--url` of a server")
def _(bench: Bench) -> list[str]:
    return ["chat", "--url", "http://127.0.0.1:1", "--adapter", "a=adapter"]


@case("`serve` with an adapter of the model's name")
def _(bench: Bench) -> list[str]:
    write("adapter", PAIR, PEFT)
    stages = bench.predict()[1:5]
    return ["serve", "--port", "0", *stages, "--served_model_name", "a", "--adapter", "a=adapter"]
