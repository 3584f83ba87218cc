"""Images: how they come in, and what of them is sent."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serve_page_driver import Page, image_file, sent_images
from serve_page_server import PageServer

# arguments: name and data of each file; the event is of the kind that a browser makes.
TRANSFER = """
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


def sent(page: Page, server: PageServer) -> list[Image.Image]:
    server.plays.append(["ok"])
    page.ask("What is it?")
    return sent_images(server.bodies[-1])


@pytest.mark.parametrize("way", ["file", "paste", "drop"])
def test_images_come_in(page: Page, server: PageServer, tmp_path: Path, way: str) -> None:
    files = [image_file(tmp_path, "one.png"), image_file(tmp_path, "two.png", seed=1)]
    page.open()
    if way == "file":
        page.attach(*files)
    else:
        data = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
        if way == "drop":
            assert page.js(TRANSFER, "dragover", data)
            assert page.find("#drop").is_displayed()
        assert page.js(TRANSFER, way, data)
        assert not page.find("#drop").is_displayed()
        page.wait(lambda: len(page.all("#attached li")) == 2)
    for image, file in zip(sent(page, server), files):
        with Image.open(file) as original:
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(original))
    assert [e.get_attribute("alt") for e in page.all(".thumbs img")] == [
        "Image 1: one.png",
        "Image 2: two.png",
    ]
    assert page.all("#attached li") == []


def test_pasted_text_stays_text(page: Page) -> None:
    page.open()
    assert not page.js(
        "const data = new DataTransfer(); data.setData('text/plain', 'words');"
        "const event = new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true});"
        "document.getElementById('question').dispatchEvent(event); return event.defaultPrevented"
    )


def test_an_image_is_removed(page: Page, server: PageServer, tmp_path: Path) -> None:
    files = [image_file(tmp_path, f"{i}.png", seed=i, size=(40 + i, 40)) for i in range(3)]
    page.open()
    page.attach(*files)
    page.click("[aria-label='Remove 1.png']")
    assert [image.width for image in sent(page, server)] == [40, 42]


def test_the_camera(page: Page, server: PageServer) -> None:
    page.open()
    page.click("#camera")
    page.wait(lambda: page.find("#shutter").is_displayed() and page.find("#shutter").is_enabled())
    page.click("#shutter")
    page.wait(lambda: len(page.all("#attached li")) == 1)
    assert not page.find("#camera-dialog").is_displayed()
    assert page.js("return document.getElementById('viewfinder').srcObject") is None
    (image,) = sent(page, server)
    assert image.format == "JPEG"
    assert np.asarray(image).std() > 10  # the browser's test card


def test_a_phone_opens_its_camera_app(page: Page) -> None:
    page.open(360)
    page.js(
        "document.getElementById('capture').addEventListener('click', e => {"
        " e.preventDefault(); window.asked = e.target.getAttribute('capture'); })"
    )
    page.click("#camera")
    assert page.js("return window.asked") == "environment"


def test_a_large_image_is_made_smaller_and_turned_upright(
    page: Page, server: PageServer, tmp_path: Path
) -> None:
    """Seen upright, the image is red above and blue with noise below; the file is rotated, with an EXIF orientation."""
    upright = np.zeros((3000, 1500, 3), np.uint8)
    upright[:1500] = (200, 30, 30)
    upright[1500:] = (30, 30, 200)
    upright[1500:] += np.random.default_rng(0).integers(0, 40, (1500, 1500, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise to see it
    exif[0x010F] = "Maker"
    file = tmp_path / "large.jpg"
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif, quality=95)
    page.open()
    page.attach(file)
    (image,) = sent(page, server)
    assert image.format == "JPEG"
    assert image.size == (672, 1344)
    assert dict(image.getexif()) == {}
    pixels = np.asarray(image, np.int16)
    assert np.abs(pixels[200:600].mean((0, 1)) - (200, 30, 30)).max() < 6
    assert np.abs(pixels[800:1200].mean((0, 1)) - (50, 50, 220)).max() < 6


def test_a_large_drawing_stays_under_the_limit(page: Page, server: PageServer, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    page.open()
    page.attach(tmp_path / "noise.png")
    (image,) = sent(page, server)
    assert (image.format, image.size) == ("JPEG", (900, 900))


def test_transparency_becomes_white(page: Page, server: PageServer, tmp_path: Path) -> None:
    clear = np.zeros((20, 20, 4), np.uint8)
    clear[:10] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    page.open()
    page.attach(tmp_path / "clear.png")
    pixels = np.asarray(sent(page, server)[0].convert("RGB"))
    assert (pixels[:10] == (255, 0, 0)).all()
    assert (pixels[10:] == 255).all()


def test_a_file_that_is_not_an_image(page: Page, server: PageServer, tmp_path: Path) -> None:
    bad, good = tmp_path / "words.png", image_file(tmp_path, "good.png")
    bad.write_text("no image")
    page.open()
    page.find("#files").send_keys(f"{bad}\n{good}")
    page.wait(lambda: "words.png cannot be opened as an image." in page.find("#notice").text)
    page.wait(lambda: len(page.all("#attached li")) == 1)
    page.click("#notice button")
    assert page.find("#notice").text == ""


def test_a_question_waits_for_its_images(page: Page, server: PageServer, tmp_path: Path) -> None:
    """Enter right after a large image is attached, before it is read."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)).save(buffer, "JPEG")
    (tmp_path / "large.jpg").write_bytes(buffer.getvalue())
    server.plays.append(["ok"])
    page.open()
    page.type("What is it?")
    page.find("#files").send_keys(str(tmp_path / "large.jpg"))
    page.type("\n")
    page.wait_for_end()
    assert len(sent_images(server.bodies[0])) == 1
