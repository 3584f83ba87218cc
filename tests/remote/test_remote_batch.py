"""`qwenvl batch --url` with a scripted server: results, concurrency, retries, resumption, errors."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from remote_server import FakeServer, Reply, fake_server, images, last_text

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.batch.job import run
from paddlemix_qwenvl_plugin.batch.source import Source
from paddlemix_qwenvl_plugin.cli.main import main
from paddlemix_qwenvl_plugin.remote import server as remote
from paddlemix_qwenvl_plugin.remote.model import ServerModel
from paddlemix_qwenvl_plugin.remote.server import Server
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.request import Request
from paddlemix_qwenvl_plugin.util.errors import UsageError

STREET = Path(__file__).resolve().parents[2] / "recipes" / "images" / "street.png"
DATA_URL = "data:image/png;base64," + b64encode(STREET.read_bytes()).decode()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(STREET, "street.png")
    return tmp_path


def write_input(rows: list[dict[str, Any]]) -> None:
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_results() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def batch(
    server: FakeServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Function that runs `qwenvl batch in.jsonl out.jsonl --url … FLAGS` and returns exit code, stdout and stderr."""

    def batch(*flags: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["qwenvl", "batch", "in.jsonl", "out.jsonl", "--url", server.url, *flags]
        )
        with pytest.raises(SystemExit) as system_exit:
            main()
        return system_exit.value.code, *capsys.readouterr()

    return batch


def openai_row(row_id: str, *messages: Any, **body: Any) -> dict[str, Any]:
    """Build a row in OpenAI's format from (role, content) of its messages."""
    message_objects = [{"role": role, "content": content} for role, content in messages]
    return {"custom_id": row_id, "body": {"messages": message_objects, **body}}


def test_results_equal_those_of_exported_stages(server: FakeServer, batch: Any, tiny_exported: Path) -> None:
    """The fake server answers with the tiny model; the reference is a job with the same model and no server.

    Images are data: URLs, because the prompt of an image file contains its path on exported stages, but not on a
    server. Row 5 has an image file, and its result is not compared; the image file of row 4 does not exist.
    """
    vl = QwenVL.from_exported(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen")
    image = {"type": "image_url", "image_url": {"url": DATA_URL}}
    write_input(
        [
            {"id": 1, "image": DATA_URL, "prompt": "What is it?"},
            {"id": "two", "prompt": "Who are you?", "chat": True, "system": "Be brief.", "max_new_tokens": 3},
            {
                "id": 3,
                "images": [DATA_URL, DATA_URL],
                "prompt": "Both?",
                "chat": True,
                "temperature": 1.5,
                "seed": 4,
            },
            {"id": 4, "image": "no.png", "prompt": "?"},
            {"id": 5, "image": "street.png"},
            openai_row(
                "six", ("system", "Short."), ("user", [image]), ("assistant", "A street."), ("user", "Sure?")
            ),
            openai_row("seven", ("user", "Hello"), tools=[]),
        ]
    )

    def query(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Convert OpenAI's content parts to a query of QwenVL."""
        return [
            {"text": part["text"]} if part["type"] == "text" else {"image": part["image_url"]["url"]}
            for part in content
        ]

    def answer(body: dict[str, Any]) -> Reply:
        options = {
            "max_new_tokens": body["max_tokens"],
            "temperature": body["temperature"],
            "seed": body.get("seed"),
        }
        if "messages" in body:
            system, *turns, question = body["messages"]
            contents = [turn["content"] for turn in turns]
            history = [
                (query(content), earlier_answer)
                for content, earlier_answer in zip(contents[::2], contents[1::2])
            ]
            chat: dict[str, Any] = {"chat": True, "system": system["content"], "history": history}
            stream = vl.stream(query(question["content"]), **chat, **options)
        else:
            stream = vl.stream(query(body["prompt"]), chat=False, **options)
        completed = stream.finish()
        usage = {"prompt_tokens": stream.n_prompt_tokens, "completion_tokens": len(completed.token_ids)}
        return Reply(completed.text, completed.finish_reason, usage)

    server.answer = answer
    # A server with a base model rejects chat requests; the client then uses the base form for rows without `chat`. This
    # server rejects chats with the default system prompt, except row 3 ("Both?"), which has `chat`.
    server.refuse = lambda path, body: (
        (400, {"message": "no chat model", "param": "model"}, {})
        if path == "/v1/chat/completions"
        and body["messages"][0]["content"] == "You are a helpful assistant."
        and "Both?" not in last_text(body)
        else None
    )
    code, out, err = batch("--max_new_tokens", "6", "--batch_size", "3")
    assert (code, out) == (1, "out.jsonl: wrote 7 rows\n")
    assert "2 of 7 rows failed" in err  # the row 4, and "seven" with `tools`
    rows = read_results()
    Path("out.jsonl").unlink()
    run(Source(Path("in.jsonl"), GenerationOptions(max_new_tokens=6)), Path("out.jsonl"), vl, 3)
    for row, expected in zip(rows, read_results()):
        for result in (row, expected):  # remove the fields that differ between runs
            if result.get("response"):
                for key in ("id", "created"):
                    del result["response"]["body"][key]
                del result["response"]["request_id"]
            if "custom_id" in result:
                del result["id"]
        if row.get("id") != 5:  # the row with an image file
            assert row == expected
    # The rows 1 and 5, in the base form: an image file is sent unchanged, like the image of a data: URL.
    prompts = [body["prompt"] for body in server.bodies if "prompt" in body]
    assert [images(prompt) for prompt in prompts] == [[STREET.read_bytes()]] * 2


def test_concurrent_requests(server: FakeServer, batch: Any) -> None:
    """The number of concurrent requests is --batch_size: the server waits for all of them before it answers."""
    barrier = threading.Barrier(4)

    def answer(body: dict[str, Any]) -> str:
        barrier.wait(60)
        return last_text(body)

    server.answer = answer
    write_input([{"id": n, "prompt": f"{n}?"} for n in range(12)])
    assert batch("--batch_size", "4") == (0, "out.jsonl: wrote 12 rows\n", "")
    assert [row["text"] for row in read_results()] == [f"{n}?" for n in range(12)]
    assert server.max_concurrent == 4


def test_requests_to_a_busy_server_are_retried(
    server: FakeServer, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    # Replace asyncio.sleep in remote/server.py only: event loops of other tests may still run in this process.
    monkeypatch.setattr(remote, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    refusals = [
        (429, {"Retry-After": "7"}),
        (503, {}),
        (503, {"Retry-After": "soon"}),
        (429, {"Retry-After": "86400"}),
    ]

    def refuse(path: str, body: dict[str, Any]) -> Any:
        if path != "/v1/models" and refusals:
            status, headers = refusals.pop(0)
            return status, {"message": "full"}, headers
        return None

    server.refuse = refuse
    write_input([{"id": 1, "prompt": "Hello"}])
    assert batch()[0] == 0
    # Retry-After, at most 60 s; without a valid one, a pause that begins at 1 s and doubles with each retry.
    assert pauses == [7, 2, 4, 60]
    assert read_results()[0]["text"] == "You said Hello."

    pauses.clear()
    Path("out.jsonl").unlink()
    server.refuse = lambda path, body: None if path == "/v1/models" else (429, {"message": "full"}, {})
    code, _, err = batch()
    assert code == 1
    assert f"qwenvl: {server.url}: full (status 429); try again later\n" in err
    assert 500 < sum(pauses) <= 600  # the client gives up after 600 s
    assert not Path("out.jsonl").exists()


def test_a_job_is_resumed_with_another_server(server: FakeServer, batch: Any) -> None:
    """The first server refuses the third row: the job ends with one error line; a second job continues there."""
    write_input([{"id": n, "prompt": f"{n}?"} for n in range(4)])

    def refuse(path: str, body: dict[str, Any]) -> Any:
        return (403, {"message": "key withdrawn"}, {}) if body and last_text(body) == "2?" else None

    server.refuse = refuse
    code, _, err = batch("--batch_size", "1")
    assert code == 1
    assert err.splitlines()[-1].startswith(f"qwenvl: {server.url}: key withdrawn; give its API key")
    with fake_server() as second_server:
        flags = ["--url", second_server.url, "--batch_size", "1"]  # this --url replaces the one of `batch`
        assert batch(*flags)[:2] == (0, "out.jsonl: wrote 4 rows\n")
        assert [last_text(body) for body in second_server.bodies] == ["2?", "3?"]
    assert [row["text"] for row in read_results()] == [f"You said {n}?." for n in range(4)]


def test_an_error_of_a_request_fails_only_its_row(server: FakeServer, batch: Any) -> None:
    errors = {  # by prompt
        "1?": (400, {"message": "messages: no", "param": "messages"}),
        "2?": (500, {"message": "not finite"}),
    }
    server.refuse = lambda path, body: (
        (*errors[last_text(body)], {}) if body and last_text(body) in errors else None
    )
    write_input([{"id": n, "prompt": f"{n}?"} for n in range(4)])
    assert batch()[0] == 1
    assert [row.get("error") for row in read_results()] == [
        None,
        "messages: no",
        f"{server.url}: not finite",
        None,
    ]


def test_no_server(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_input([{"id": 1, "prompt": "Hello"}])
    monkeypatch.setattr(
        sys, "argv", ["qwenvl", "batch", "in.jsonl", "out.jsonl", "--url", "http://127.0.0.1:9/v1"]
    )
    with pytest.raises(SystemExit):
        main()
    err = capsys.readouterr().err
    assert err.startswith("qwenvl: http://127.0.0.1:9: cannot be reached (")
    assert err.count("\n") == 1
    assert not list(folder.glob("out.*"))


@pytest.mark.parametrize(
    "models",
    [{}, [], {"data": []}, {"data": [{}]}, "text"],
    ids=["empty", "list", "no model", "no id", "string"],
)
def test_a_server_of_another_kind(server: FakeServer, batch: Any, models: Any, monkeypatch: Any) -> None:
    """The response to GET /v1/models is not in OpenAI's format."""
    handler: Any = server.RequestHandlerClass
    monkeypatch.setattr(handler, "do_GET", lambda self: self._json(200, models))
    write_input([{"id": 1, "prompt": "Hello"}])
    code, _, err = batch()
    assert (code, err) == (
        1,
        f"qwenvl: {server.url}: the response is not in OpenAI's format; is it an OpenAI-compatible server?\n",
    )


def test_history_needs_a_chat_model(server: FakeServer) -> None:
    """As with exported stages of a base model; no command makes such a request."""
    server.refuse = lambda path, body: (
        (400, {"message": "no chat model", "param": "model"}, {}) if path == "/v1/chat/completions" else None
    )
    stream = ServerModel(Server(server.url, None)).ask(Request("Now?", history=[("Who?", "Me.")]))
    with pytest.raises(UsageError, match="history: only a chat prompt has earlier turns"):
        stream.finish()
    assert server.bodies == []


def test_a_closed_stream_cancels_its_request(server: FakeServer) -> None:
    """A job that ends with an error closes the streams of its running requests in this way."""
    started, continue_answer = threading.Semaphore(0), threading.Event()

    def answer(body: dict[str, Any]) -> str:
        started.release()
        continue_answer.wait(60)
        return "late"

    server.answer = answer
    stream = ServerModel(Server(server.url, None)).ask(Request("Hello")).submit()
    assert started.acquire(timeout=60)
    stream.close()
    assert stream.future.cancelled()
    continue_answer.set()
