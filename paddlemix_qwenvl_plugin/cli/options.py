"""The flags that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

FirstModelPath = Annotated[Path, typer.Option("--first_model_path", help="Exported vision stage (prefix).")]
SecondModelPath = Annotated[
    Path, typer.Option("--second_model_path", help="Exported language stage (prefix).")
]
ModelFolder = Annotated[
    Optional[Path],
    typer.Option(
        "--model_name_or_path", help="Folder with the tokenizer; default: beside the language stage."
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, gpu or gpu:N.")]
QuantType = Annotated[
    Optional[str],
    typer.Option(
        "--quant_type",
        help="Of the language model: weight_only_int8 or weight_only_int4; needs the engine.",
    ),
]
AllowHttp = Annotated[bool, typer.Option("--allow-http", help="Let pictures come from http(s) URLs.")]

MaxNewTokens = Annotated[int, typer.Option("--max_new_tokens")]
MinNewTokens = Annotated[int, typer.Option("--min_new_tokens")]
Temperature = Annotated[Optional[float], typer.Option("--temperature", help="Sample; default: greedy.")]
TopP = Annotated[Optional[float], typer.Option("--top_p")]
TopK = Annotated[Optional[int], typer.Option("--top_k")]
RepetitionPenalty = Annotated[float, typer.Option("--repetition_penalty")]
FrequencyPenalty = Annotated[float, typer.Option("--frequency_penalty")]
PresencePenalty = Annotated[float, typer.Option("--presence_penalty")]
Seed = Annotated[Optional[int], typer.Option("--seed")]
