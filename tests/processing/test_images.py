"""Loading images from every source, the limits and errors, and the preprocessing for the vision stage."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paddlemix_qwenvl_plugin.processing.images import ImageLimits, load_image, preprocess
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

LOCAL = ImageLimits(allow_private=True)  # allows servers on this machine
# Channel means and standard deviations of CLIP's preprocessing.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
# Found by the fuzzer. For the first, Pillow logs a message; for the second, Pillow warns and libtiff writes to stderr.
CORRUPTED = [
    Path(__file__).parents[1] / "fuzz" / "found" / "image" / name for name in ("2635063f1b20", "5b2fb807bf83")
]


def encoded(size: tuple[int, int] = (6, 4), format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).save(buffer, format)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes with this size in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["wide.png", "tall.png", "alpha.png", "gray.png", "palette.png"])
def test_golden_images(golden_folder: Path, name: str) -> None:
    golden = json.loads((golden_folder / "images.json").read_text())[name]
    # PaddleMIX ignores transparency, but load_image composes a transparent image with white. Therefore alpha.png is
    # opened with Pillow.
    path = golden_folder / name
    tensor = preprocess(Image.open(path) if name == "alpha.png" else load_image(path))
    assert list(tensor.shape) == golden["shape"]
    assert tensor.dtype == np.float32
    for channel, y, x, value in golden["samples"]:
        assert tensor[channel, y, x] == pytest.approx(value, abs=1e-4)
    assert tensor.mean(dtype=np.float64) == pytest.approx(golden["mean"], abs=1e-4)
    assert tensor.std(dtype=np.float64) == pytest.approx(golden["std"], abs=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (448, 448)])
@pytest.mark.parametrize("image_size", [448, 56])
def test_an_image_of_one_colour(size: tuple[int, int], image_size: int) -> None:
    tensor = preprocess(Image.new("RGB", size, (200, 100, 50)), image_size)
    expected = (np.array([200, 100, 50]) / 255 - MEAN) / STD
    assert tensor.shape == (3, image_size, image_size)
    assert np.abs(tensor - expected[:, None, None]).max() < 1e-5


@pytest.mark.parametrize(
    "kind", ["path", "str", "bytes", "pil", "data", "data-percent", "file", "file-localhost"]
)
def test_every_type_of_local_source(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "图 a#b?c.png"
    path.write_bytes(encoded())
    data = base64.b64encode(encoded()).decode()
    source: Any = {
        "path": path,
        "str": str(path),
        "bytes": encoded(),
        "pil": Image.open(path),
        "data": f"data:image/png;base64,{data}",
        "data-percent": "data:image/png," + "".join(f"%{value:02x}" for value in encoded()),
        "file": path.as_uri(),
        "file-localhost": path.as_uri().replace("file://", "FILE://localhost"),
    }[kind]
    image = load_image(source)
    assert image.mode == "RGB"
    assert image.size == (6, 4)
    assert image.getpixel((0, 0)) == (200, 100, 50)


def test_data_url_without_padding_and_with_line_ends() -> None:
    data = base64.encodebytes(encoded()).decode().rstrip("=\n")
    assert load_image(f"data:;base64,{data}").size == (6, 4)


def test_relative_names_that_look_like_schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data", "http", "file"):
        Path(name).write_bytes(encoded())
        assert load_image(name).size == (6, 4)


def upright() -> Image.Image:
    """An image of 3 x 2 blocks in six colours, so that it differs in each orientation."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
    small = Image.new("RGB", (3, 2))
    small.putdata(colours)
    return small.resize((48, 32), Image.Resampling.NEAREST)


# EXIF orientation -> pixels as stored, from the upright image. The comments are EXIF's: the sides of the upright image
# at which the first stored row and the first stored column are.
ORIENTATIONS = {
    1: lambda pixels: pixels,  # top, left
    2: lambda pixels: pixels[:, ::-1],  # top, right
    3: lambda pixels: pixels[::-1, ::-1],  # bottom, right
    4: lambda pixels: pixels[::-1],  # bottom, left
    5: lambda pixels: pixels.swapaxes(0, 1),  # left, top
    6: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda pixels: pixels[::-1].swapaxes(0, 1),  # left, bottom
}
ORIENTATION_TAG = 0x0112


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    stored = Image.fromarray(np.ascontiguousarray(ORIENTATIONS[orientation](np.asarray(upright()))))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, format, exif=exif)
    loaded = np.asarray(load_image(buffer.getvalue())).astype(int)
    assert loaded.shape == (32, 48, 3)
    # The mean colour in the middle of each block of 16 x 16 pixels; JPEG changes colours slightly.
    blocks = loaded.reshape(2, 16, 3, 16, 3)[:, 4:12, :, 4:12].mean(axis=(1, 3))
    assert np.abs(blocks - np.asarray(upright())[8::16, 8::16]).max() < 40


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0"])
def test_damaged_exif_is_ignored(exif: bytes, recwarn: pytest.WarningsRecorder) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "JPEG", exif=exif)
    assert load_image(buffer.getvalue()).size == (6, 4)
    assert not list(recwarn)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "array"])
def test_16_bits_are_scaled(kind: str) -> None:
    values = np.array([[0, 255, 256, 257], [1000, 32768, 65279, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    image = Image.fromarray(values)
    if kind == "PPM":  # independently of Pillow's writer
        buffer.write(b"P5 4 2 65535\n" + values.astype(">u2").tobytes())
    elif kind != "array":
        image.save(buffer, kind)
    loaded = load_image(image if kind == "array" else buffer.getvalue())
    expected = np.rint(values.astype(np.float64) / 65535 * 255)
    assert loaded.mode == "RGB"
    for channel in np.moveaxis(np.asarray(loaded), 2, 0):
        np.testing.assert_array_equal(channel, expected)


def test_16_bits_with_a_transparent_value() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 700, 701]], dtype=np.uint16)).save(buffer, "PNG")
    # Before IDAT and the 4 bytes of its length, insert a chunk that makes the value 700 transparent.
    transparent = b"tRNS" + struct.pack(">H", 700)
    chunk = struct.pack(">I", 2) + transparent + struct.pack(">I", zlib.crc32(transparent))
    header, pixels = buffer.getvalue().split(b"IDAT")
    png = header[:-4] + chunk + header[-4:] + b"IDAT" + pixels
    assert np.asarray(load_image(png))[0].tolist() == [[0] * 3, [255] * 3, [3] * 3]


def on_white(rgba: np.ndarray) -> np.ndarray:
    """RGBA pixels composed with a white background, float64 RGB."""
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_composed_with_white(mode: str) -> None:
    rgba = np.random.default_rng(5).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    rgba[0, :3, 3] = (0, 255, 128)
    image = Image.fromarray(rgba)
    if mode == "PA":
        image = image.convert("LA")  # for a palette of greys, which is exact
    image = image.convert(mode)
    loaded = np.asarray(load_image(image)).astype(np.float64)
    assert np.abs(loaded - on_white(np.asarray(image.convert("RGBA")))).max() <= 1


def test_transparent_colours_are_composed_with_white(recwarn: pytest.WarningsRecorder) -> None:
    """Alpha values of a palette, about which Pillow warns; one transparent colour of a palette, of RGB, of grey.

    The warning is hidden.
    """
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    rgb = Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((1, 0), (9, 9, 9))
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 8)
    for image, transparency, expected in [
        (palette, bytes([0, 255, 128]), [(255, 255, 255), (40, 50, 60), (162, 167, 172)]),
        (palette, 1, [(10, 20, 30), (255, 255, 255), (70, 80, 90)]),
        (rgb, (9, 9, 9), [(1, 2, 3), (255, 255, 255)]),
        (grey, 8, [(7, 7, 7), (255, 255, 255)]),
    ]:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", transparency=transparency)
        loaded = np.asarray(load_image(buffer.getvalue())).astype(int)[0]
        assert np.abs(loaded - np.array(expected)).max() <= 1
    assert not list(recwarn)


def test_warnings_and_logs_are_suppressed_without_changing_settings(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Several threads load images for which Pillow warns or logs, or libtiff writes to stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            loading = [pool.submit(load_image, path) for path in CORRUPTED * 8]
            errors = [str(future.exception()) for future in loading]
        assert warnings.filters == before
    assert all(error.startswith("image ") for error in errors)
    assert capfd.readouterr() == ("", "")
    with pytest.warns(UserWarning, match="Tag data larger than file"):
        Image.open(CORRUPTED[-1])


def test_the_returned_image_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded())
    image = load_image(path)
    path.unlink()
    assert image.getpixel((5, 3)) == (200, 100, 50)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.png", "image no/such/file.png does not exist"),
        ("x" * 5000, "image x.*… ?.*x cannot be read: File name too long"),
        ("a\0b", "cannot be a file name"),
        (".", "is a directory"),
        ("/dev/zero", "is not a regular file"),
        ("ftp://host/a.png", "scheme 'ftp' is not supported"),
        ("http://host/a.png", "http://host/a.png: downloading is off, pass --allow_http"),
        ("HTTPS://user:secret@host/a.png", "pass --allow_http"),
        ("data:image/png;base64", "data URL has no comma"),
        ("data:image/png;base64,!!!!", "data URL is not valid base64"),
        ("file://elsewhere/a.png", "must be of the form file:///path"),
        ("file:///no/such.png", "image /no/such.png does not exist"),
        (3, "must be a path, a URL, bytes or a PIL image, got int"),
        (None, "got NoneType"),
    ],
)
def test_sources_that_are_refused(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_image(source)
    text = str(caught.value)
    assert "\n" not in text
    assert "secret" not in text
    assert len(text) < 250


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "is not in an image format"),
        (encoded()[:-30], "is damaged or cut short"),
        (encoded((300, 200), "JPEG")[:900], "is damaged or cut short"),
        (png_header(20_000, 20_000), "pixels"),
        (png_header(8001, 8000), "8001 x 8000 pixels, more than the limit of 64000000"),
        (png_header(12_000, 8000), "12000 x 8000 pixels"),  # between Pillow's warning and its error
        (png_header(8000, 8000), "is damaged or cut short"),  # within the limit, so decoded
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "the format EPS is not accepted",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["path", "bytes", "data"])
def test_bad_images(tmp_path: Path, content: bytes, message: str, kind: str) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    data_url = "data:image/png;base64," + base64.b64encode(content).decode()
    source, name = {
        "path": (path, "bad.png"),
        "bytes": (content, "image bytes"),
        "data": (data_url, "data URL"),
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(QwenVLError, match=message) as caught:
            load_image(source)
    text = str(caught.value)
    assert name in text
    assert "\n" not in text
    assert len(text) < 300


def test_huge_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("the image is decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    limits = ImageLimits(max_pixels=99)
    with pytest.raises(QwenVLError, match="10 x 10 pixels, more than the limit of 99"):
        load_image(encoded((10, 10)), limits=limits)
    with pytest.raises(QwenVLError, match="PIL image is 10 x 10"):
        load_image(Image.new("L", (10, 10)), limits=limits)


def test_too_many_bytes(tmp_path: Path) -> None:
    content = encoded()
    path = tmp_path / "a.png"
    path.write_bytes(content)
    data_url = "data:;base64," + base64.b64encode(content).decode()
    limits = ImageLimits(max_bytes=len(content) - 1)
    for source in (path, content, data_url):
        with pytest.raises(QwenVLError, match="larger than the limit"):
            load_image(source, limits=limits)
        assert load_image(source, limits=ImageLimits(max_bytes=len(content))).size == (6, 4)
    with pytest.raises(QwenVLError, match="data URL is larger than the limit of 1 MiB"):
        load_image("data:;base64," + "A" * 4 * 2**20, limits=ImageLimits(max_bytes=2**20))


class Handler(BaseHTTPRequestHandler):
    """A server with a method `answer_PATH` for each path; most paths misbehave in one way."""

    sent_bytes = 0

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):
            getattr(self, "answer_" + self.path.strip("/").partition("?")[0])()

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_image(self) -> None:
        self.send(encoded())

    def answer_negotiated(self) -> None:
        """Compress unless the client requests `identity`."""
        if self.headers["Accept-Encoding"] == "identity":
            self.answer_image()
        else:
            self.answer_compressed()

    def answer_moved(self) -> None:
        self.send(b"", 302, Location="/image")

    def answer_missing(self) -> None:
        self.send(encoded(), 404)

    def answer_page(self) -> None:
        self.send(b"<html>")

    def answer_declared(self) -> None:
        self.send(b"", Content_Length="100000000")

    def answer_endless(self) -> None:
        self.send(b"")
        while True:
            self.wfile.write(b"x" * 65536)
            type(self).sent_bytes += 65536

    def answer_drip(self) -> None:
        self.send(b"")
        for _ in range(60):
            time.sleep(0.05)
            self.wfile.write(b"x")

    def answer_dripping_headers(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        for i in range(60):
            time.sleep(0.05)
            self.wfile.write(b"X-%d: 1\r\n" % i)

    def answer_silent(self) -> None:
        time.sleep(2)

    def answer_to_file(self) -> None:
        self.send(b"", 302, Location="file:///etc/hostname")

    def answer_to_ftp(self) -> None:
        self.send(b"", 302, Location="ftp://127.0.0.1/a.png")

    def answer_loop(self) -> None:
        self.send(b"", 302, Location="/loop")

    def answer_compressed(self) -> None:
        self.send(zlib.compress(encoded()), Content_Encoding="deflate")

    def answer_truncated(self) -> None:
        self.send(encoded()[:20], Content_Length=str(len(encoded())))

    def answer_nonsense(self) -> None:
        self.wfile.write(b"SSH-2.0-hello\r\n")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # with allow_private, the environment's proxy would be used
    monkeypatch.setattr(Handler, "sent_bytes", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        http_server.daemon_threads = True
        http_server.block_on_close = False
        threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


@pytest.mark.parametrize("path", ["image", "moved", "negotiated", "image?token=a&b=c"])
def test_download(server: str, path: str) -> None:
    assert load_image(f"{server}/{path}", allow_http=True, limits=LOCAL).getpixel((0, 0)) == (200, 100, 50)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "answered with status 404"),
        ("page", "not in an image format"),
        ("declared", "larger than the limit of 1 MiB"),
        ("endless", "larger than the limit of 1 MiB"),
        ("to_file", "cannot be downloaded: .*protocol"),
        ("to_ftp", "cannot be downloaded: .*protocol"),
        ("loop", "cannot be downloaded: .*redirects"),
        ("compressed", "the server compressed it"),
        ("truncated", "cannot be downloaded"),
        ("nonsense", "cannot be downloaded"),
    ],
)
def test_failed_downloads(server: str, path: str, message: str) -> None:
    with pytest.raises(QwenVLError, match=message) as caught:
        load_image(
            f"{server}/{path}", allow_http=True, limits=ImageLimits(max_bytes=2**20, allow_private=True)
        )
    assert f"{server}/{path}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Handler.sent_bytes < 16 * 2**20  # more than the limit, because of the sockets' buffers


@pytest.mark.parametrize("path", ["drip", "dripping_headers", "silent"])
def test_slow_server(server: str, path: str) -> None:
    started = time.monotonic()
    with pytest.raises(QwenVLError, match=rf"{path}: the download timed out after 0\.3 s"):
        load_image(
            f"{server}/{path}", allow_http=True, limits=ImageLimits(timeout_seconds=0.3, allow_private=True)
        )
    assert time.monotonic() - started < 1.5


def test_a_slow_server_leaves_no_thread(server: str) -> None:
    with pytest.raises(QwenVLError):
        load_image(
            f"{server}/dripping_headers",
            allow_http=True,
            limits=ImageLimits(timeout_seconds=0.3, allow_private=True),
        )
    deadline = time.monotonic() + 1.5
    while any(thread.name == "image-download" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("url", ["http://", "http:///a.png", "http://[::1"])
def test_url_without_a_host(url: str) -> None:
    with pytest.raises(UsageError, match="names no host"):
        load_image(url, allow_http=True)


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/a.png", "http://a b/"])
def test_malformed_url(url: str) -> None:
    with pytest.raises(QwenVLError, match="cannot be downloaded"):
        load_image(url, allow_http=True, limits=LOCAL)


def test_refused_connection(server: str) -> None:
    # The fixture `server` is only needed for NO_PROXY; no program listens on port 1.
    with pytest.raises(QwenVLError, match=r"127\.0\.0\.1:1/a.png cannot be downloaded"):
        load_image("http://user:secret@127.0.0.1:1/a.png", allow_http=True, limits=LOCAL)
