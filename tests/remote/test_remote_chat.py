"""`qwenvl chat --url` with a scripted server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from remote_server import MODEL, FakeServer, fake_server, images

from paddlemix_qwenvl_plugin.chat_ui.conversation import Conversation
from paddlemix_qwenvl_plugin.chat_ui.session import Session
from paddlemix_qwenvl_plugin.chat_ui.terminal import TerminalView
from paddlemix_qwenvl_plugin.cli.main import main
from paddlemix_qwenvl_plugin.remote.model import ServerModel
from paddlemix_qwenvl_plugin.remote.server import Server
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

REPO = Path(__file__).resolve().parents[2]
STREET = REPO / "recipes" / "images" / "street.png"
# U+2028 is no line end of an event stream.
ANSWER_WITH_BOX = "See <ref>a red house</ref><box>(73,172),(417,676)</box> and\u2028more."


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def model(server: FakeServer) -> ServerModel:
    return ServerModel(Server(server.url, None))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(STREET, "street.png")
    return tmp_path


def chat_process(server: FakeServer, folder: Path, *flags: str) -> subprocess.Popen[str]:
    """Start `qwenvl chat` with the server, in the folder; its input is a pipe, so that it runs as a script."""
    return subprocess.Popen(
        [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "chat", "--url", server.url, *flags],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_script_on_standard_input(server: FakeServer, folder: Path) -> None:
    """Each request contains all earlier turns of the conversation."""
    lines = "/image street.png\nWhat is it?\nSure?\n/save talk.json\n/clear\nAnd now?\n"
    flags = ["--system", "Be brief.", "--max_new_tokens", "9", "--min_new_tokens", "2", "--top_k", "3"]
    with chat_process(server, folder, *flags) as program:
        out, err = program.communicate(lines, timeout=120)
    assert (program.returncode, err) == (0, "")
    assert out == "You said What is it?.\nYou said Sure?.\nYou said And now?.\n"
    first, second, third = server.bodies
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    question = first["messages"][1]["content"]
    assert images(question) == [STREET.read_bytes()]
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [question[0], {"type": "text", "text": "What is it?"}]},
    ]
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": "You said What is it?."},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    assert [message["role"] for message in third["messages"]] == ["system", "user"]
    del first["messages"]
    assert first == {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 1.0,
        "top_k": 3,
    }
    turns = json.loads((folder / "talk.json").read_text("utf-8"))["turns"]
    assert [turn["question"] for turn in turns] == ["What is it?", "Sure?"]
    assert [turn["answer"]["finish_reason"] for turn in turns] == ["stop", "stop"]


def test_boxes_are_drawn(
    server: FakeServer, model: ServerModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Boxes are converted to pixels of the local image, also in the answer to a second question about it."""
    server.answer = lambda body: ANSWER_WITH_BOX
    session = Session(model, "You are a helpful assistant.", GenerationOptions())
    conversation = Conversation(session, TerminalView())
    for line in ("/image street.png", "What?", "And?"):
        conversation.run(line)
    output = capsys.readouterr().out
    assert "Image 1: street.png, 960 x 640" in output
    assert output.count("[1] a red house: (70, 110), (400, 433)") == 2
    assert (folder / "street-boxes-1.png").is_file()
    assert session.turns[0].answer.text == ANSWER_WITH_BOX
    assert [segment.ref for segment in session.turns[0].segments if segment.ref] == ["a red house"]


def test_segments_are_not_buffered(server: FakeServer, model: ServerModel) -> None:
    server.resume.clear()  # from now on, a stream pauses after its first text until `resume` is set
    stream = model.chat().ask("Hello")
    assert next(stream).text == "You"
    assert stream.answer.text == "You"
    server.resume.set()
    assert "".join(segment.text for segment in stream) == " said Hello."
    # The fake server's usage: 7 prompt tokens, a token per character of "You said Hello.", and a stop token.
    assert (stream.n_prompt_tokens, stream.n_new_tokens) == (7, 16)
    assert stream.answer.finish_reason == "stop"


def test_stop_while_waiting_for_a_segment(server: FakeServer, model: ServerModel) -> None:
    """A stop by another thread cancels the request; the conversation keeps the partial answer."""
    server.resume.clear()
    chat = model.chat()
    stream = chat.ask("Hello")
    assert next(stream).text == "You"
    threading.Timer(0.2, stream.stop).start()
    assert list(stream) == []
    assert server.disconnected.acquire(timeout=60)
    assert (stream.answer.text, stream.answer.finish_reason) == ("You", "cancelled")
    server.resume.set()
    chat.ask("And?").finish()
    assert server.bodies[1]["messages"][2] == {"role": "assistant", "content": "You"}


@pytest.mark.parametrize("begun", [False, True], ids=["before the first segment", "after the first segment"])
def test_close(server: FakeServer, model: ServerModel, begun: bool) -> None:
    """The conversation keeps a turn that is closed after its first segment, but not one that is closed before it."""
    server.resume.clear()
    chat = model.chat()
    stream = chat.ask("Hello").submit()
    if begun:
        next(stream)
    stream.close()
    if begun:
        assert server.disconnected.acquire(timeout=60)
    server.resume.set()
    chat.ask("And?").finish()
    # System prompt and question; if the answer had begun, its question and partial answer between them.
    assert len(server.bodies[-1]["messages"]) == (4 if begun else 2)


def test_stop_before_the_response(server: FakeServer, model: ServerModel) -> None:
    """A stop while the server has sent nothing yet, as while the request waits or its prompt is computed."""
    received, continue_answer = threading.Event(), threading.Event()

    def answer(body: dict[str, Any]) -> str:
        received.set()
        continue_answer.wait(60)
        return "late"

    server.answer = answer
    chat = model.chat()
    stream = chat.ask("Hello").submit()
    assert received.wait(60)
    stream.stop()
    assert list(stream) == []
    assert (stream.n_new_tokens, stream.answer.finish_reason) == (0, "cancelled")
    continue_answer.set()
    chat.ask("And?").finish()
    assert len(server.bodies[-1]["messages"]) == 2


def test_ctrl_c_ends_a_script(server: FakeServer, folder: Path) -> None:
    server.resume.clear()
    with chat_process(server, folder) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("Hello\n")
        program.stdin.flush()
        assert program.stdout.read(3) == "You"
        program.send_signal(signal.SIGINT)
        assert server.disconnected.acquire(timeout=60)
        _, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (130, "qwenvl: interrupted\n")


def test_an_error_leaves_the_conversation_unchanged(server: FakeServer, model: ServerModel) -> None:
    chat = model.chat()
    chat.ask([{"image": str(STREET)}, {"text": "One"}]).finish()
    # (status, error and headers of the response; exception; pattern of its message)
    refusals: list[tuple[Any, type[QwenVLError], str]] = [
        ((400, {"message": "messages: too long"}, {}), UsageError, "^messages: too long$"),
        (
            (429, {"message": "full"}, {"Retry-After": "7"}),
            QwenVLError,
            r"full \(status 429\); try again in 7 s",
        ),
        ((503, None, {}), QwenVLError, r"Unavailable \(status 503\); try again later"),
        ((500, {"message": "broken"}, {}), QwenVLError, "^http://127.*: broken$"),
        (
            (404, {"message": "no such model"}, {}),
            QwenVLError,
            "no such model .status 404.; is it the address",
        ),
        (
            (404, {"message": "No such path", "code": "not_found"}, {}),
            QwenVLError,
            "No such path .status 404.; is it the address",
        ),
        (
            (404, {"message": "no model x", "code": "model_not_found"}, {}),
            QwenVLError,
            r"^http://\S+: no model x \(status 404\)$",
        ),
        (
            (403, {"message": "wrong host", "code": "host_not_allowed"}, {}),
            QwenVLError,
            r"^http://\S+: wrong host \(status 403\)$",
        ),
        ((403, None, {}), QwenVLError, "Forbidden; give its API key with --api_key_file or QWENVL_API_KEY"),
        (
            (401, {"message": "no key"}, {}),
            QwenVLError,
            "no key; give its API key with --api_key_file or QWENVL_API_KEY",
        ),
    ]
    for refusal, exception, message in refusals:
        server.refuse = lambda path, body, refusal=refusal: refusal
        with pytest.raises(exception, match=message):
            chat.ask("Two").finish()
    server.refuse = lambda path, body: None
    server.truncate = True
    with pytest.raises(QwenVLError, match=r"the stream ended before|the connection broke"):
        chat.ask("Three").finish()
    server.truncate = False
    chat.ask("Four").finish()
    assert [message["role"] for message in server.bodies[-1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


def test_an_error_in_the_middle_of_a_stream(server: FakeServer, model: ServerModel, monkeypatch: Any) -> None:
    handler: Any = server.RequestHandlerClass
    send_event = handler._event

    def send_error_as_last_event(self: Any, values: dict[str, Any]) -> None:
        if not values["choices"]:  # the last event, with the token usage
            values = {"error": {"message": "the engine died", "type": "server_error"}}
        send_event(self, values)

    monkeypatch.setattr(handler, "_event", send_error_as_last_event)
    stream = model.chat().ask("Hello")
    with pytest.raises(QwenVLError, match="the engine died"):
        stream.finish()
    assert stream.answer.text == "You said Hello."


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--url", "localhost:8000"], 2, "--url localhost:8000: must be of the form http://host:8000"),
        (["--url", "http://"], 2, "--url http://: must be of the form"),
        (["--url", "http://[::1"], 2, "must be of the form"),
        (["--url", "http://[::1]x"], 2, "--url http://[::1]x: must be of the form"),
        (["--url", "http://xn--a"], 2, "--url http://xn--a: must be of the form"),
        (
            ["--url", "http://me:secret@host/"],
            2,
            "--url http://host/: no password here; give the API key with --api_key",
        ),
        (
            ["--url", "http://127.0.0.1:9"],
            1,
            "http://127.0.0.1:9: cannot be reached (All connection attempts failed); is",
        ),
        (
            ["--url", "http://h", "--device", "gpu"],
            2,
            "--device: applies to exported stages only; remove it, or remove --url",
        ),
        (
            ["--url", "http://h", "--first_model_path", "a"],
            2,
            "--first_model_path: applies to exported stages only",
        ),
        (["--url", "http://h", "--api_key_file", "no"], 2, "--api_key_file no: cannot be read (No such file"),
        (["--url", "http://h", "--api_key_file", "empty"], 2, "--api_key_file empty: has no key in it"),
        (
            ["--url", "http://h", "--api_key_file", "odd"],
            2,
            "--api_key_file odd: an API key is printable ASCII",
        ),
        (["--api_key_file", "key"], 2, "--api_key_file: requires --url; give both"),
        (
            ["--first_model_path", "a"],
            2,
            "give --first_model_path and --second_model_path, or the --url of a server",
        ),
        (["--url", "http://h", "--allow_private_http"], 2, "--allow_private_http: requires --allow_http"),
    ],
)
def test_invalid_flags(
    flags: list[str],
    code: int,
    message: str,
    folder: Path,
    monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "empty").write_text("# none\n\n")
    (folder / "odd").write_text("a b\n")
    (folder / "key").write_text("a\n")
    monkeypatch.setattr(sys, "argv", ["qwenvl", "chat", *flags])
    with (folder / "empty").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as system_exit:
            main()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "secret" not in err
    assert message in err
    assert system_exit.value.code == code


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_api_keys_and_suffixes_of_the_url(
    server: FakeServer, suffix: str, folder: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.key = "sesame"
    (folder / "key").write_text("# mine\nsesame\nanother\n")
    (folder / "in.txt").write_text("Hello\n")

    def run(*flags: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["qwenvl", "chat", "--url", server.url + suffix, *flags])
        with (folder / "in.txt").open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            with pytest.raises(SystemExit) as system_exit:
                main()
        return system_exit.value.code, *capsys.readouterr()

    expected = (0, "You said Hello.\n", "")
    assert run("--api_key_file", "key") == expected
    code, out, err = run()
    assert (code, out) == (1, "")
    assert "wrong API key; give its API key with --api_key_file or QWENVL_API_KEY" in err
    monkeypatch.setenv("QWENVL_API_KEY", "sesame")
    assert run() == expected
