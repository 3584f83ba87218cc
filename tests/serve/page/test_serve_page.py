"""The conversation: asking, streaming, stopping, errors, editing, saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serve_page_driver import Page, image_file, sent_images
from serve_page_server import Broken, Gate, PageServer, Play, Refusal, StreamError

from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes

ESCAPE, TAB = "\ue00c", "\ue004"


def test_an_answer_appears_as_it_is_generated(page: Page, server: PageServer) -> None:
    first, second = Gate(), Gate()
    server.plays.append(["A red ", "circle", first, " and", second, " a star."])
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


def test_the_conversation_is_sent_with_the_next_question(
    page: Page, server: PageServer, tmp_path: Path
) -> None:
    answer = "<ref>a dog</ref><box>(1,2),(3,4)</box>"
    server.plays += [[answer], ["yes"]]
    page.open()
    page.ask("What is it?", image_file(tmp_path))
    page.ask("Really?")
    question, said, last = server.bodies[1]["messages"]
    assert question["role"] == "user"
    assert [part["type"] for part in question["content"]] == ["image_url", "text"]
    assert said == {"role": "assistant", "content": answer}
    assert last == {"role": "user", "content": "Really?"}


def test_enter_with_shift_or_within_an_input_method_does_not_send(page: Page, server: PageServer) -> None:
    server.plays.append(["ok"])
    page.open()
    page.type("one\ue008\n\ue008two")  # Shift held, then let go
    page.js(
        "document.getElementById('question').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert page.find("#question").get_attribute("value") == "one\ntwo"
    page.type("\n")
    page.wait_for_end()
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop(page: Page, server: PageServer, way: str) -> None:
    gate = Gate()
    server.plays += [["It is", gate, " never said"], ["fine"]]
    page.open()
    page.type("Go\n")
    page.wait(lambda: page.answers() == ["It is"])
    if way == "button":
        page.click("#stop")
    else:
        page.press(ESCAPE)
    page.wait_for_end()
    assert gate.left.wait(30)
    assert page.note() == "Stopped"
    assert page.answers() == ["It is"]
    page.ask("And now?")
    assert [m["content"] for m in server.bodies[1]["messages"]] == ["Go", "It is", "And now?"]


@pytest.mark.parametrize(
    ("play", "words"),
    [
        (Refusal(429, "full", {"Retry-After": "7"}), ["The server is busy. Try again in 7 seconds.", "full"]),
        (Refusal(429, "full"), ["The server is busy.", "full"]),
        (Refusal(503, "dead", {"Retry-After": "1"}), ["The server is not ready. Try again in 1 second.", "dead"]),
        (Refusal(503, "restarting"), ["The server is not ready. Try again in a moment.", "restarting"]),
        (Refusal(400, "messages: too long"), ["The server refused this request.", "messages: too long"]),
        (Refusal(403, "wrong host"), ["The server refused this request.", "wrong host"]),
        (Refusal(500, "oops"), ["The server could not finish this answer.", "oops"]),
        (["Half ", StreamError("it died")], ["The server could not finish this answer.", "it died"]),
        (["Half ", Broken()], ["The connection was lost before the answer was complete."]),
    ],
    ids=["busy-seconds", "busy", "unready-seconds", "unready", "refused", "forbidden", "failed", "stream", "cut"],
)  # fmt: skip
def test_an_error_is_explained_and_can_be_retried(
    page: Page, server: PageServer, play: Play, words: list[str]
) -> None:
    server.plays += [play, ["All is well."]]
    page.open()
    page.ask("How are you?")
    assert page.problem() == [*words, "Retry"]
    page.click(".said .problem button")
    page.wait(lambda: page.answers() == ["All is well."])
    page.wait_for_end()
    assert not page.find(".said .problem").is_displayed()
    assert server.bodies[0] == server.bodies[1]


def test_no_network(page: Page, server: PageServer) -> None:
    server.plays.append(["Back."])
    page.open()
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.call("Network.enable")
    page.browser.call("Network.emulateNetworkConditions", offline=True, **network)
    try:
        page.ask("Hello?")
        assert page.problem() == ["No connection to the server.", "Retry"]
        page.wait(lambda: page.find("#state").text == "Not reachable")
    finally:
        page.browser.call("Network.emulateNetworkConditions", offline=False, **network)
    page.wait(lambda: page.find("#state").text == "Ready")
    page.click(".said .problem button")
    page.wait(lambda: page.answers() == ["Back."])
    page.wait_for_end()


def test_a_server_that_is_not_ready_yet(page: Page, server: PageServer) -> None:
    server.ready = 503
    page.open()
    assert page.find("#state").text == "Not ready yet"
    server.ready = 200
    page.wait(lambda: page.find("#state").text == "Ready")
    page.wait(lambda: page.find("#model").text == "qwen-vl-chat")


def test_an_api_key_is_asked_for_and_kept_in_the_tab(page: Page, server: PageServer) -> None:
    server.key = "secret"
    server.plays.append(["Hello."])
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
    kept, elsewhere = page.js("return [Object.values(sessionStorage), Object.values(localStorage)]")
    assert kept == ["secret"]
    assert "secret" not in elsewhere
    assert not page.find("#key-dialog").is_displayed()


def test_retry_asks_the_last_question_again(page: Page, server: PageServer) -> None:
    server.plays += [["one"], ["two"], ["three"]]
    page.open()
    page.ask("First")
    page.ask("Second")
    visible = [b for b in page.all("[data-words-label=retry]") if b.is_displayed()]
    assert len(visible) == 1
    visible[0].click()
    page.wait(lambda: page.answers() == ["one", "three"])
    page.wait_for_end()
    assert server.bodies[1] == server.bodies[2]


def test_editing_a_question_replaces_the_later_turns(page: Page, server: PageServer, tmp_path: Path) -> None:
    server.plays += [["one"], ["two"], ["new"]]
    page.open()
    page.ask("First", image_file(tmp_path))
    page.ask("Second")
    page.type("a draft")
    page.js("document.querySelector('[data-words-label=edit]').click()")
    assert page.find("#question").get_attribute("value") == "First"
    assert len(page.all("#attached li")) == 1
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


def test_images_of_a_question_without_an_answer_go_to_the_next(
    page: Page, server: PageServer, tmp_path: Path
) -> None:
    server.plays += [Refusal(500), ["a dog"]]
    page.open()
    page.ask("What?", image_file(tmp_path))
    page.ask("What is it?")
    (message,) = server.bodies[1]["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert message["content"][1]["text"] == "What is it?"


def test_new_conversation_and_undo(page: Page, server: PageServer) -> None:
    server.plays += [["one"], ["two"]]
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


def test_a_new_conversation_stops_the_answer(page: Page, server: PageServer) -> None:
    gate = Gate()
    server.plays += [["It", gate, " is"], ["new"]]
    page.open()
    page.type("Go\n")
    page.wait(lambda: page.answers() == ["It"])
    page.click("#new")
    assert gate.left.wait(30)
    page.ask("Other")
    assert page.answers() == ["new"]


def test_copy_has_the_words_only(page: Page, server: PageServer) -> None:
    server.plays.append(["See <ref>a dog</ref><box>(1,2),(3,4)</box> and\n<ref>a cat</ref>."])
    page.open()
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    page.browser.call("Browser.grantPermissions", permissions=permissions, origin=server.url)
    page.ask("What is there?")
    page.click("[data-words-label=copy]")
    page.wait(lambda: page.all("[aria-label=Copied]"))
    copied = page.browser.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == "See a dog and\na cat."


def test_export_as_json(page: Page, server: PageServer, tmp_path: Path) -> None:
    answer = "<ref>狗</ref><box>(100,200),(300,450)</box><quad>(1,2),(3,4),(5,6),(7,8)</quad>"
    server.plays += [[answer], ["yes"]]
    page.open()
    page.ask("Where?", image_file(tmp_path, size=(200, 100)))
    page.ask("Sure?")
    page.click("#export")
    exported = json.loads(page.downloaded(".json"))
    assert exported["model"] == "qwen-vl-chat"
    asked = server.bodies[1]["messages"]
    assert [{k: v for k, v in m.items() if k != "boxes"} for m in exported["messages"][:3]] == asked
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


def test_a_truncated_or_empty_answer_is_labelled(page: Page, server: PageServer) -> None:
    server.plays += [["Once upon"], []]
    page.open()
    server.finish = "length"
    page.ask("Tell a story")
    assert page.note() == "Cut off: the token limit was reached"
    server.finish = "stop"
    page.ask("Say nothing")
    assert page.note() == "The answer is empty."
