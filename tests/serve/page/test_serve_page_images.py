"""Images on the chat page in Chromium: how users attach them, and what the page sends."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serve_page_driver import Page, image_file, sent_images
from serve_page_server import PageServer

# Script that dispatches an event with files as a browser does, and returns whether the page has handled it. Arguments:
# the type of the event; [name, base64 data] of each file.
DISPATCH_FILES = """
const transfer = new DataTransfer();
for (const [name, data] of arguments[1]) {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  transfer.items.add(new File([bytes], name, {type: 'image/png'}));
}
const options = {bubbles: true, cancelable: true, clipboardData: transfer, dataTransfer: transfer};
const event = arguments[0] === 'paste' ? new ClipboardEvent('paste', options) : new DragEvent(arguments[0], options);
document.querySelector('main').dispatchEvent(event);
return event.defaultPrevented;
"""


def send_question(page: Page, server: PageServer) -> list[Image.Image]:
    """Ask a question and return the images of the request."""
    server.answers.append(["ok"])
    page.ask("What is it?")
    return sent_images(server.bodies[-1])


@pytest.mark.parametrize("method", ["file", "paste", "drop"])
def test_attaching_images(page: Page, server: PageServer, tmp_path: Path, method: str) -> None:
    files = [image_file(tmp_path, "one.png"), image_file(tmp_path, "two.png", seed=1)]
    page.open()
    if method == "file":
        page.attach(*files)
    else:
        data = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
        if method == "drop":
            assert page.js(DISPATCH_FILES, "dragover", data)
            assert page.find("#drop").is_displayed()
        assert page.js(DISPATCH_FILES, method, data)
        assert not page.find("#drop").is_displayed()
        page.wait(lambda: len(page.find_all("#attached li")) == 2)
    for image, file in zip(send_question(page, server), files):
        with Image.open(file) as original:
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(original))
    assert [thumbnail.get_attribute("alt") for thumbnail in page.find_all(".thumbs img")] == [
        "Image 1: one.png",
        "Image 2: two.png",
    ]
    assert page.find_all("#attached li") == []


def test_pasted_text_is_not_intercepted(page: Page) -> None:
    page.open()
    assert not page.js(
        "const data = new DataTransfer(); data.setData('text/plain', 'words');"
        "const event = new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true});"
        "document.getElementById('question').dispatchEvent(event); return event.defaultPrevented"
    )


def test_removing_an_attached_image(page: Page, server: PageServer, tmp_path: Path) -> None:
    files = [image_file(tmp_path, f"{i}.png", seed=i, size=(40 + i, 40)) for i in range(3)]
    page.open()
    page.attach(*files)
    thumbnails = page.find_all("#attached img")
    assert [thumbnail.get_attribute("alt") for thumbnail in thumbnails] == ["0.png", "1.png", "2.png"]
    page.click("[aria-label='Remove 1.png']")
    assert [image.width for image in send_question(page, server)] == [40, 42]


def test_camera(page: Page, server: PageServer) -> None:
    page.open()
    page.click("#camera")
    page.wait(lambda: page.find("#shutter").is_displayed() and page.find("#shutter").is_enabled())
    page.click("#shutter")
    page.wait(lambda: len(page.find_all("#attached li")) == 1)
    assert not page.find("#camera-dialog").is_displayed()
    assert page.js("return document.getElementById('viewfinder').srcObject") is None
    (image,) = send_question(page, server)
    assert image.format == "JPEG"
    assert np.asarray(image).std() > 10  # not a uniform image: that of the fake camera


def test_camera_button_on_a_phone_opens_the_camera_app(page: Page) -> None:
    page.open(360)
    page.js(
        "document.getElementById('capture').addEventListener('click', e => {"
        " e.preventDefault(); window.capture = e.target.getAttribute('capture'); })"
    )
    page.click("#camera")
    assert page.js("return window.capture") == "environment"


def test_large_image_is_reduced_and_rotated_upright(page: Page, server: PageServer, tmp_path: Path) -> None:
    """The upright image is red above and blue with noise below; the file has it rotated, with an EXIF orientation."""
    upright = np.zeros((3000, 1500, 3), np.uint8)
    upright[:1500] = (200, 30, 30)
    upright[1500:] = (30, 30, 200)
    upright[1500:] += np.random.default_rng(0).integers(0, 40, (1500, 1500, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be rotated clockwise by 90 degrees
    exif[0x010F] = "Maker"  # must not be sent
    file = tmp_path / "large.jpg"
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif, quality=95)
    page.open()
    page.attach(file)
    (image,) = send_question(page, server)
    assert image.format == "JPEG"
    assert image.size == (672, 1344)  # the page reduces the longer side to 1344 pixels
    assert dict(image.getexif()) == {}
    pixels = np.asarray(image, np.int16)
    assert np.abs(pixels[200:600].mean((0, 1)) - (200, 30, 30)).max() < 6
    # The noise, 0 to 39, adds about 20 on average.
    assert np.abs(pixels[800:1200].mean((0, 1)) - (50, 50, 220)).max() < 6


def test_png_that_would_be_large_is_sent_as_jpeg(page: Page, server: PageServer, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    page.open()
    page.attach(tmp_path / "noise.png")
    (image,) = send_question(page, server)
    assert (image.format, image.size) == ("JPEG", (900, 900))


def test_transparent_pixels_become_white(page: Page, server: PageServer, tmp_path: Path) -> None:
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[:10] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    page.open()
    page.attach(tmp_path / "clear.png")
    sent_pixels = np.asarray(send_question(page, server)[0].convert("RGB"))
    assert (sent_pixels[:10] == (255, 0, 0)).all()
    assert (sent_pixels[10:] == 255).all()


def test_file_that_is_not_an_image(page: Page, tmp_path: Path) -> None:
    invalid, valid = tmp_path / "words.png", image_file(tmp_path, "valid.png")
    invalid.write_text("not an image")
    page.open()
    page.find("#files").send_keys(f"{invalid}\n{valid}")
    page.wait(lambda: "words.png cannot be opened as an image." in page.find("#notice").text)
    page.wait(lambda: len(page.find_all("#attached li")) == 1)
    page.click("#notice button")
    assert page.find("#notice").text == ""


def test_question_waits_for_its_images(page: Page, server: PageServer, tmp_path: Path) -> None:
    """The user presses Enter immediately after attaching a large image, before the page has read it."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)).save(buffer, "JPEG")
    (tmp_path / "large.jpg").write_bytes(buffer.getvalue())
    server.answers.append(["ok"])
    page.open()
    page.type("What is it?")
    page.find("#files").send_keys(str(tmp_path / "large.jpg"))
    page.type("\n")
    page.wait_for_end()
    assert len(sent_images(server.bodies[0])) == 1
