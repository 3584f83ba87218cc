"""`qwenvl chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import typer

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.runtime.model import Model
    from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions


# main.py replaces the parameter open_model by flags; context.obj has the GenerationOptions (options.py).
def chat(
    context: typer.Context,
    open_model: Callable[[], Model[Any]],
    image: Optional[list[str]] = typer.Option(
        None, "--image", help="Image to attach first: path, data URL or http(s) URL; may be repeated."
    ),
    system: str = typer.Option("You are a helpful assistant.", "--system", help="System message."),
) -> None:
    """Chat about images with Qwen-VL-Chat, on a terminal or through a pipe."""
    from paddlemix_qwenvl_plugin.chat_ui.conversation import Conversation, converse, run_lines
    from paddlemix_qwenvl_plugin.chat_ui.session import Session
    from paddlemix_qwenvl_plugin.chat_ui.terminal import TerminalView
    from paddlemix_qwenvl_plugin.chat_ui.view import PlainView
    from paddlemix_qwenvl_plugin.cli.options import only_adapter
    from paddlemix_qwenvl_plugin.util import standard_input

    options: GenerationOptions = context.obj
    standard_input.check()
    model = open_model()
    session = Session(model, system, options, only_adapter(model))
    # Before the model is loaded: an image that cannot be read ends the command at once.
    attached = [session.attach(source) for source in image or []]
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        model.load()
        run_lines(Conversation(session, PlainView()), standard_input.lines())
        return
    from paddlemix_qwenvl_plugin.chat_ui.line_input import line_reader

    terminal = TerminalView()
    with terminal.waiting("Loading the model"):
        model.load()
    terminal.note("Ask about images; /help lists the commands.")
    for attachment in attached:
        terminal.attached(attachment)
    converse(Conversation(session, terminal), terminal, line_reader(terminal.error))
