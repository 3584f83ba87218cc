"""The example conversation in docs/chat.md is what the program prints."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_helpers import REPO, STREET

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
from paddlemix_qwenvl_plugin.chat_ui.conversation import Conversation
from paddlemix_qwenvl_plugin.chat_ui.session import Session
from paddlemix_qwenvl_plugin.chat_ui.terminal import TerminalView

DOCUMENT = (REPO / "docs" / "chat.md").read_text("utf-8")
# Question -> the model's answer.
ANSWERS = {
    "What is in the picture?": "In the street there is <ref>a red house</ref><box>(73,172),(417,676)</box> with "
    "<ref>a brown dog</ref><box>(430,700),(560,830)</box> before it.",
    "Which breed is the dog?": "It is a terrier, I think.",
}


def test_example_conversation(
    vl: QwenVL,
    say: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The lines typed in the document produce its output."""
    # The code block of the conversation, without the command and the line after it.
    match = re.search(r"```console\n\$ qwenvl chat .*\n.*\n(.*?)```", DOCUMENT, re.DOTALL)
    assert match is not None
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(STREET, "street.png")
    conversation = Conversation(
        Session(vl, "You are a helpful assistant.", GenerationOptions()), TerminalView()
    )
    output = ""
    for line in re.findall(r"^> (.*)$", match.group(1), re.MULTILINE):
        say(ANSWERS.get(line, ""))  # sets the model's answer; commands have none
        conversation.run(line)
        output += f"> {line}\n{capsys.readouterr().out}"
    assert output == match.group(1)
