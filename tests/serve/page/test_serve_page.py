"""Conversation on the chat page with a mock server: questions, streamed answers, stop, errors, editing, saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serve_page_driver import Page, image_file, sent_images
from serve_page_server import ConnectionLoss, Gate, PageServer, Refusal, ScriptedAnswer, StreamError

from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes

# WebDriver's codes of keys.
ESCAPE, SHIFT = "\ue00c", "\ue008"


def test_answer_appears_as_it_is_generated(page: Page, server: PageServer) -> None:
    first, second = Gate(), Gate()
    server.answers.append(["A red ", "circle", first, " and", second, " a star."])
    page.open()
    page.type("What is there?\n")
    page.wait(lambda: page.answers() == ["A red circle"])
    first.open()
    page.wait(lambda: page.answers() == ["A red circle and"])
    assert not page.find("#send").is_displayed()
    second.open()
    page.wait_for_end()
    assert page.answers() == ["A red circle and a star."]
    assert "4 tokens" in page.note()
    assert server.bodies == [
        {
            "model": "qwen-vl-chat",
            "messages": [{"role": "user", "content": "What is there?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_next_request_contains_the_conversation(page: Page, server: PageServer, tmp_path: Path) -> None:
    answer = "<ref>a dog</ref><box>(1,2),(3,4)</box>"
    server.answers += [[answer], ["yes"]]
    page.open()
    page.ask("What is it?", image_file(tmp_path))
    page.ask("Really?")
    first_question, first_answer, second_question = server.bodies[1]["messages"]
    assert first_question["role"] == "user"
    assert [part["type"] for part in first_question["content"]] == ["image_url", "text"]
    assert first_answer == {"role": "assistant", "content": answer}
    assert second_question == {"role": "user", "content": "Really?"}


def test_enter_with_shift_or_within_an_input_method_does_not_send(page: Page, server: PageServer) -> None:
    server.answers.append(["ok"])
    page.open()
    page.type(f"one{SHIFT}\n{SHIFT}two")  # the first SHIFT presses the key, the second releases it
    page.js(
        "document.getElementById('question').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert page.find("#question").get_attribute("value") == "one\ntwo"
    page.type("\n")
    page.wait_for_end()
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]


@pytest.mark.parametrize("method", ["button", "escape"])
def test_stop(page: Page, server: PageServer, method: str) -> None:
    gate = Gate()
    server.answers += [["It is", gate, " not shown"], ["fine"]]
    page.open()
    page.type("Go\n")
    page.wait(lambda: page.answers() == ["It is"])
    if method == "button":
        page.click("#stop")
    else:
        page.press(ESCAPE)
    page.wait_for_end()
    assert gate.disconnected.wait(30)
    assert page.note() == "Stopped"
    assert page.answers() == ["It is"]
    page.ask("And now?")
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["Go", "It is", "And now?"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Refusal(429, "full", {"Retry-After": "7"}), ["The server is busy. Try again in 7 seconds.", "full"]),
        (Refusal(429, "full"), ["The server is busy.", "full"]),
        (Refusal(503, "dead", {"Retry-After": "1"}), ["The server is not ready. Try again in 1 second.", "dead"]),
        (Refusal(503, "restarting"), ["The server is not ready. Try again in a moment.", "restarting"]),
        (Refusal(504, "no upstream"), ["The server is not ready. Try again in a moment.", "no upstream"]),
        (Refusal(504, "too slow", code="timeout"), ["The server could not finish this answer.", "too slow"]),
        (Refusal(400, "messages: too long"), ["The server refused this request.", "messages: too long"]),
        (Refusal(403, "wrong host"), ["The server refused this request.", "wrong host"]),
        (Refusal(500, "oops"), ["The server could not finish this answer.", "oops"]),
        (["Half ", StreamError("it died")], ["The server could not finish this answer.", "it died"]),
        (["Half ", ConnectionLoss()], ["The connection was lost before the answer was complete."]),
    ],
    ids=[
        "busy-seconds", "busy", "unready-seconds", "unready", "proxy-timeout", "timeout", "refused", "forbidden",
        "failed", "stream", "cut",
    ],
)  # fmt: skip
def test_error_with_explanation_and_retry(
    page: Page, server: PageServer, answer: ScriptedAnswer, error: list[str]
) -> None:
    server.answers += [answer, ["All is well."]]
    page.open()
    page.ask("How are you?")
    assert page.error() == [*error, "Retry"]
    page.click(".answer-body .problem button")
    page.wait(lambda: page.answers() == ["All is well."])
    page.wait_for_end()
    assert not page.find(".answer-body .problem").is_displayed()
    assert server.bodies[0] == server.bodies[1]


def test_loss_of_the_network(page: Page, server: PageServer) -> None:
    server.answers.append(["Back."])
    page.open()
    # -1: no limit of the throughput.
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.call("Network.enable")
    page.browser.call("Network.emulateNetworkConditions", offline=True, **network)
    try:
        page.ask("Hello?")
        assert page.error() == ["No connection to the server.", "Retry"]
        page.wait(lambda: page.find("#state").text == "Not reachable")
    finally:
        page.browser.call("Network.emulateNetworkConditions", offline=False, **network)
    page.wait(lambda: page.find("#state").text == "Ready")
    page.click(".answer-body .problem button")
    page.wait(lambda: page.answers() == ["Back."])
    page.wait_for_end()


def test_server_that_is_not_ready_yet(page: Page, server: PageServer) -> None:
    server.ready_status = 503
    page.open()
    assert page.find("#state").text == "Not ready yet"
    server.ready_status = 200
    page.wait(lambda: page.find("#state").text == "Ready")
    page.wait(lambda: page.find("#model").text == "qwen-vl-chat")


def test_api_key_dialog(page: Page, server: PageServer) -> None:
    server.key = "secret"
    server.answers.append(["Hello."])
    page.open()
    page.wait(lambda: page.find("#key-dialog").is_displayed())
    page.press(ESCAPE)
    page.ask("Hi")
    page.wait(lambda: page.find("#key-dialog").is_displayed())
    page.find("#key").send_keys("wrong\n")
    page.wait(lambda: page.find("#key-error").text == "The server refused this key.")
    page.find("#key").clear()
    page.find("#key").send_keys("secret\n")
    page.wait(lambda: page.answers() == ["Hello."])
    page.wait_for_end()
    # The key is stored for this tab only.
    tab_storage, permanent_storage = page.js(
        "return [Object.values(sessionStorage), Object.values(localStorage)]"
    )
    assert tab_storage == ["secret"]
    assert "secret" not in permanent_storage
    assert not page.find("#key-dialog").is_displayed()


def test_full_storage_keeps_no_older_key(page: Page, server: PageServer) -> None:
    server.answers += [["One."], ["Two."]]
    page.open()
    server.key = "first"
    page.ask("Hi")
    page.wait(lambda: page.find("#key-dialog").is_displayed())
    page.find("#key").send_keys("first\n")
    page.wait(lambda: page.answers() == ["One."])
    page.wait_for_end()
    server.key = "second"
    page.js("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }")
    page.ask("Hi again")
    page.wait(lambda: page.find("#key-dialog").is_displayed())
    page.find("#key").clear()
    page.find("#key").send_keys("second\n")
    page.wait(lambda: page.answers() == ["One.", "Two."])


def test_retry_asks_the_last_question_again(page: Page, server: PageServer) -> None:
    server.answers += [["one"], ["two"], ["three"]]
    page.open()
    page.ask("First")
    page.ask("Second")
    visible = [button for button in page.find_all("[data-words-label=retry]") if button.is_displayed()]
    assert len(visible) == 1
    visible[0].click()
    page.wait(lambda: page.answers() == ["one", "three"])
    page.wait_for_end()
    assert server.bodies[1] == server.bodies[2]


def test_edited_question_replaces_all_turns_from_it_on(
    page: Page, server: PageServer, tmp_path: Path
) -> None:
    """Escape leaves the editing and restores the draft of a new question."""
    server.answers += [["one"], ["two"], ["new"]]
    page.open()
    page.ask("First", image_file(tmp_path))
    page.ask("Second")
    page.type("a draft")
    page.js("document.querySelector('[data-words-label=edit]').click()")
    assert page.find("#question").get_attribute("value") == "First"
    assert len(page.find_all("#attached li")) == 1
    assert "Editing question 1" in page.find("#editing").text
    page.press(ESCAPE)
    assert page.find("#question").get_attribute("value") == "a draft"
    assert page.find("#editing").text == ""
    page.js("document.querySelector('[data-words-label=edit]').click()")
    page.type(" again\n")
    page.wait(lambda: page.answers() == ["new"])
    page.wait_for_end()
    (message,) = server.bodies[2]["messages"]
    assert message["content"][1]["text"] == "First again"
    assert sent_images(server.bodies[2])[0].size == (64, 48)


def test_images_of_a_failed_question_are_sent_with_the_next_one(
    page: Page, server: PageServer, tmp_path: Path
) -> None:
    server.answers += [Refusal(500), ["a dog"]]
    page.open()
    page.ask("What?", image_file(tmp_path))
    page.ask("What is it?")
    (message,) = server.bodies[1]["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert message["content"][1]["text"] == "What is it?"


def test_new_conversation_and_undo(page: Page, server: PageServer) -> None:
    server.answers += [["one"], ["two"]]
    page.open()
    page.ask("First")
    page.click("#new")
    assert page.answers() == []
    assert page.find("#welcome").is_displayed()
    page.click("#notice button")
    assert page.answers() == ["one"]
    page.click("#new")
    page.ask("Second")
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "Second"}]


def test_new_conversation_stops_the_answer(page: Page, server: PageServer) -> None:
    gate = Gate()
    server.answers += [["It", gate, " is"], ["new"]]
    page.open()
    page.type("Go\n")
    page.wait(lambda: page.answers() == ["It"])
    page.click("#new")
    assert gate.disconnected.wait(30)
    page.ask("Other")
    assert page.answers() == ["new"]


def test_copied_answer_has_no_tags(page: Page, server: PageServer) -> None:
    server.answers.append(["See <ref>a dog</ref><box>(1,2),(3,4)</box> and\n<ref>a cat</ref>."])
    page.open()
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    page.browser.call("Browser.grantPermissions", permissions=permissions, origin=server.url)
    page.ask("What is there?")
    page.click("[data-words-label=copy]")
    page.wait(lambda: page.find_all("[aria-label=Copied]"))
    copied = page.browser.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == "See a dog and\na cat."


def test_export_as_json(page: Page, server: PageServer, tmp_path: Path) -> None:
    answer = "<ref>狗</ref><box>(100,200),(300,450)</box><quad>(1,2),(3,4),(5,6),(7,8)</quad>"
    server.answers += [[answer], ["yes"]]
    page.open()
    page.ask("Where?", image_file(tmp_path, size=(200, 100)))
    page.ask("Sure?")
    page.click("#export")
    exported = json.loads(page.downloaded(".json"))
    assert exported["model"] == "qwen-vl-chat"
    without_boxes = [
        {name: value for name, value in message.items() if name != "boxes"}
        for message in exported["messages"]
    ]
    assert without_boxes[:3] == server.bodies[1]["messages"]
    boxes = [
        {
            "kind": box.kind,
            "ref": box.ref,
            "points": [list(point) for point in box.points],
            "pixels": [list(point) for point in box.to_pixels(200, 100)],
        }
        for box in parse_boxes(answer).boxes
    ]
    assert exported["messages"][1]["boxes"] == boxes
    assert exported["messages"][3] == {"role": "assistant", "content": "yes", "boxes": []}


def test_note_of_a_truncated_and_of_an_empty_answer(page: Page, server: PageServer) -> None:
    server.answers += [["Once upon"], []]
    page.open()
    server.finish_reason = "length"
    page.ask("Tell a story")
    assert page.note() == "Cut off: the token limit was reached"
    server.finish_reason = "stop"
    page.ask("Say nothing")
    assert page.note() == "The answer is empty."
