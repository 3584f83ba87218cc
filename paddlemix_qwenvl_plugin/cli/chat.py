"""`qwenvl chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

import typer


def chat(
    first_model_path: Path = typer.Option(..., "--first_model_path", help="Exported vision stage (prefix)."),
    second_model_path: Path = typer.Option(
        ..., "--second_model_path", help="Exported language stage (prefix)."
    ),
    model: Optional[Path] = typer.Option(
        None, "--model_name_or_path", help="Folder with the tokenizer; default: beside the language stage."
    ),
    image: Optional[list[str]] = typer.Option(
        None, "--image", help="Picture to begin with: path, data URL or http(s) URL; may be repeated."
    ),
    system: str = typer.Option("You are a helpful assistant.", "--system", help="System message."),
    device: str = typer.Option("cpu", "--device", help="cpu, gpu or gpu:N."),
    max_new_tokens: int = typer.Option(512, "--max_new_tokens"),
    min_new_tokens: int = typer.Option(0, "--min_new_tokens"),
    temperature: Optional[float] = typer.Option(None, "--temperature", help="Sample; default: greedy."),
    top_p: Optional[float] = typer.Option(None, "--top_p"),
    top_k: Optional[int] = typer.Option(None, "--top_k"),
    repetition_penalty: float = typer.Option(1.0, "--repetition_penalty"),
    frequency_penalty: float = typer.Option(0.0, "--frequency_penalty"),
    presence_penalty: float = typer.Option(0.0, "--presence_penalty"),
    seed: Optional[int] = typer.Option(None, "--seed"),
    allow_http: bool = typer.Option(False, "--allow-http", help="Let pictures come from http(s) URLs."),
) -> None:
    """Talk about pictures with Qwen-VL-Chat, on a terminal or through a pipe."""
    from dataclasses import asdict

    from paddlemix_qwenvl_plugin.chat_ui.conversation import Conversation, converse, follow
    from paddlemix_qwenvl_plugin.chat_ui.plain import Plain, piped_lines
    from paddlemix_qwenvl_plugin.chat_ui.session import Session
    from paddlemix_qwenvl_plugin.chat_ui.terminal import Terminal
    from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL

    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        seed=seed,
    )
    pair = QwenVL.from_exported(first_model_path, second_model_path, model, device, allow_http)
    session = Session(pair, system, asdict(options))
    pictures = [session.attach(source) for source in image or []]
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        pair.load()
        follow(Conversation(session, Plain()), piped_lines())
        return
    from paddlemix_qwenvl_plugin.chat_ui.line_input import line_reader

    terminal = Terminal()
    with terminal.waiting("Loading the model"):
        pair.load()
    terminal.note("Ask about pictures; /help lists the commands.")
    for picture in pictures:
        terminal.attached(picture)
    converse(Conversation(session, terminal), terminal, line_reader(terminal.error))
