"""Images of requests: equal to preprocess; no image harms the front or the next image."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

from paddlemix_qwenvl_plugin.processing.images import load_image, normalise, preprocess
from paddlemix_qwenvl_plugin.serve import image_process, image_worker
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.images import WorkerImageLoader
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

REPO = Path(__file__).resolve().parents[2]
PARAM = "messages[0].content[1].image_url.url"
SIZE = 224
T = TypeVar("T")


class EventLoop:
    """Event loop in a thread, like the front's."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.start(work).result(120)  # type: ignore[no-any-return]

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(60)
        self.loop.close()


@pytest.fixture(scope="module")
def events() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def shared(events: EventLoop) -> Iterator[WorkerImageLoader]:
    """Loader with the default settings."""
    loader = WorkerImageLoader(ServeSettings(image_timeout=60), SIZE)
    events.run(loader.start())
    yield loader
    events.run(loader.close())


@pytest.fixture
def make(events: EventLoop) -> Iterator[Any]:
    """Function that creates a started loader with one process and these settings."""
    loaders = []

    def make(**settings: Any) -> WorkerImageLoader:
        chosen = {"image_workers": 1, "image_timeout": 60.0, **settings}
        loaders.append(WorkerImageLoader(ServeSettings(**chosen), SIZE))
        events.run(loaders[-1].start())
        return loaders[-1]

    yield make
    for loader in loaders:
        events.run(loader.close())


def data_url(encoded: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GOOD = saved(Image.new("RGB", (6, 4), "#c86432"))


def refusal(events: EventLoop, loader: WorkerImageLoader, url: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        events.run(loader.load(url, PARAM))
    error = caught.value
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", PARAM)
    assert str(error).startswith(f"{PARAM}: ")
    assert len(str(error)) < 400
    return error


def assert_works(events: EventLoop, loader: WorkerImageLoader) -> None:
    """Check that the next image is decoded, not served from the cache."""
    loader._cache.clear()
    assert events.run(loader.load(data_url(GOOD), PARAM)).size == (6, 4)


def odd_images() -> dict[str, bytes]:
    rng = np.random.default_rng(1)
    rgba = Image.fromarray(rng.integers(0, 256, (50, 70, 4), dtype=np.uint8))
    rgb = rgba.convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "RGBA": saved(rgba),
        "LA": saved(rgba.convert("LA")),
        "16 bits": saved(Image.fromarray(rng.integers(0, 65536, (50, 70)).astype(np.uint16))),
        "1 bit": saved(rgb.convert("1")),
        "turned": saved(rgb, "JPEG", exif=turned),
        "CMYK": saved(rgb.convert("CMYK"), "JPEG"),
        "palette": saved(rgb.convert("P"), "GIF"),
        "animation": saved(rgb, "GIF", save_all=True, append_images=[rgba.convert("L")]),
        "WebP": saved(rgba, "WEBP"),
        "TIFF": saved(rgba, "TIFF", compression="tiff_lzw"),
        "one pixel": saved(rgb.crop((0, 0, 1, 1))),
    }


@pytest.mark.parametrize(
    "encoded",
    [
        *(path.read_bytes() for path in sorted((REPO / "recipes" / "images").glob("*.png"))),
        *odd_images().values(),
    ],
)
def test_equal_to_preprocess(events: EventLoop, shared: WorkerImageLoader, encoded: bytes) -> None:
    image = load_image(encoded)
    loaded = events.run(shared.load(data_url(encoded), PARAM))
    assert loaded.size == image.size
    assert (loaded.pixels.dtype, loaded.pixels.shape) == (np.uint8, (SIZE, SIZE, 3))
    np.testing.assert_array_equal(normalise(loaded.pixels), preprocess(image, SIZE))


def test_turned_image_has_its_upright_size(events: EventLoop, shared: WorkerImageLoader) -> None:
    assert events.run(shared.load(data_url(odd_images()["turned"]), PARAM)).size == (50, 70)


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("/etc/passwd", "invalid_image_url", "must be a data: URL"),
        ("street.png", "invalid_image_url", "must be a data: URL"),
        ("", "invalid_image_url", "must be a data: URL"),
        ("file:///etc/passwd", "invalid_image_url", "must be a data: URL"),
        ("FILE:/etc/passwd", "invalid_image_url", "must be a data: URL"),
        ("ftp://example.org/a.png", "invalid_image_url", "must be a data: URL"),
        ("\0", "invalid_image_url", "must be a data: URL"),
        ("data:image/png,\ud800", "invalid_image_url", "ASCII"),
        ("data:image/png;base64", "invalid_image", "no comma"),
        ("data:image/png;base64,!!!!", "invalid_image", "not valid base64"),
        ("data:image/png;base64,", "invalid_image", "is empty"),
        ("data:text/html,<html>", "invalid_image", "not in an image format"),
        (data_url(GOOD[:-30]), "invalid_image", "damaged or cut short"),
        ("http://example.org/a.png", "image_host_not_allowed", "example.org are not allowed"),
        ("https:", "image_host_not_allowed", "not allowed"),
        ("http://[::1/a.png", "invalid_image_url", "not a valid URL"),
    ],
)
def test_refused(events: EventLoop, shared: WorkerImageLoader, url: str, code: str, words: str) -> None:
    error = refusal(events, shared, url)
    assert error.code == code
    assert words in str(error)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Black grayscale PNG with at least its first 50 million pixels."""
    rows = zlib.compress(bytes(min(width + 1, 50_000_000 // height + 1) * height), 1)
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in (header, *chunks, (b"IDAT", rows), (b"IEND", b"")):
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


def gif_bomb() -> bytes:
    """A screen of one pixel, and a frame of 65535 x 65535."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\x00;"
    return head + frame


def tiff_bomb() -> bytes:
    small = bytearray(saved(Image.new("L", (64, 64)), "TIFF"))
    position = struct.unpack_from("<I", small, 4)[0]
    for _ in range(struct.unpack_from("<H", small, position)[0]):
        tag, _ = struct.unpack_from("<HH", small, position + 2)
        if tag in (256, 257, 278):  # width, height, rows a strip
            struct.pack_into("<HHII", small, position + 2, tag, 4, 1, 60_000)
        position += 12
    return bytes(small)


def webp_bomb() -> bytes:
    body = b"VP8L" + struct.pack("<I", 12) + b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(7)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize(
    ("bomb", "codes"),
    [
        (lambda: png(30_000, 30_000), ["image_too_large"]),
        (gif_bomb, ["image_too_large", "invalid_image"]),
        (tiff_bomb, ["image_too_large"]),
        (webp_bomb, ["image_too_large"]),
        # Of few pixels, but much unfolds beside them.
        (
            lambda: png(4, 4, (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28), 1))),
            ["invalid_image", "image_too_large"],
        ),
    ],
    ids=["png", "gif", "tiff", "webp", "profile"],
)
def test_bombs(events: EventLoop, shared: WorkerImageLoader, bomb: Any, codes: list[str]) -> None:
    """Each is refused by a worker that uses little memory and continues."""
    assert_works(events, shared)
    pid = pid_of(shared)
    assert refusal(events, shared, data_url(bomb())).code in codes
    assert_works(events, shared)
    assert pid_of(shared) == pid
    status = Path(f"/proc/{pid}/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0])  # KiB
    assert peak < 2**17  # decoded, each would take 256 MiB or more


def test_memory_is_limited(events: EventLoop, make: Any) -> None:
    """Eight million escapes, of which Python makes a list of half a gigabyte."""
    loader = make(max_image_pixels=1_000_000, max_image_bytes=8 * 2**20)
    error = refusal(events, loader, "data:image/png," + "%41" * (8 * 2**20))
    assert error.code == "image_too_large"
    assert "out of memory" in str(error)
    assert_works(events, loader)
    limits = Path(f"/proc/{loader._processes[0].pid}/limits").read_text()
    soft = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()[1:]}
    assert 2**27 < int(soft["Max address space"]) < 2**30
    assert (soft["Max core file size"], soft["Max file size"]) == ("0", "0")
    assert int(soft["Max open files"]) <= 16


def pid_of(loader: WorkerImageLoader) -> int:
    pid = loader._processes[0].pid
    assert pid is not None
    return pid


def gone(pid: int) -> bool:
    """Whether a process has exited; a zombie counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_decoder_that_runs_long_is_killed(events: EventLoop, make: Any) -> None:
    loader = make(image_timeout=0.05)
    pid = pid_of(loader)
    error = refusal(events, loader, data_url(png(7000, 7000)))
    assert error.code == "image_too_large"
    assert "takes more than 0.05 seconds" in str(error)
    assert gone(pid)
    loader._processes[0]._timeout_seconds = 60.0
    assert_works(events, loader)


def test_a_worker_that_is_killed(events: EventLoop, make: Any) -> None:
    """In the middle of an image, and between two."""
    loader = make()
    pid = pid_of(loader)
    os.kill(pid, signal.SIGSTOP)
    loading = events.start(loader.load(data_url(GOOD), PARAM))
    until(lambda: loader._decoding)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ApiError, match="ended: the image is damaged or needs too much memory") as caught:
        loading.result(60)
    assert (caught.value.status, caught.value.code) == (400, "invalid_image")
    assert_works(events, loader)

    os.kill(pid_of(loader), signal.SIGSEGV)
    until(lambda: gone(pid_of(loader)))
    until(lambda: loader._processes[0]._process.returncode is not None)  # the front has been told
    assert_works(events, loader)


def test_a_worker_is_replaced_after_a_while(
    events: EventLoop, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_process, "_MAX_IMAGES", 2)
    loader = make()
    pids = []
    for _ in range(5):
        assert_works(events, loader)
        pids.append(pid_of(loader))
    assert len(set(pids)) == 3
    assert all(map(gone, pids[:4]))


def test_a_worker_that_does_not_start(events: EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    loader = WorkerImageLoader(ServeSettings(), SIZE)
    with pytest.raises(ApiError, match="does not start; try again later") as caught:
        events.run(loader.load(data_url(GOOD), PARAM))
    assert caught.value.status == 503
    monkeypatch.undo()
    assert_works(events, loader)
    events.run(loader.close())


def test_many_at_once(events: EventLoop, shared: WorkerImageLoader) -> None:
    async def load_all() -> list[Any]:
        urls = [data_url(saved(Image.new("RGB", (n + 1, 9), (n, 0, 0)))) for n in range(40)]
        bad = [data_url(GOOD[:20] + bytes([n])) for n in range(10)]
        return await asyncio.gather(*(shared.load(u, PARAM) for u in urls + bad), return_exceptions=True)

    results = events.run(load_all())
    for n, image in enumerate(results[:40]):
        assert (image.size, image.pixels[0, 0].tolist()) == ((n + 1, 9), [n, 0, 0])
    assert [error.code for error in results[40:]] == ["invalid_image"] * 10


def test_cancelled(events: EventLoop, make: Any) -> None:
    """Cancelled while waiting for a process and while decoding: the process serves the next image."""
    loader = make()
    pid = pid_of(loader)
    os.kill(pid, signal.SIGSTOP)
    decoding = events.start(loader.load(data_url(GOOD), PARAM))
    until(lambda: loader._decoding)
    waiting = events.start(loader.load(data_url(odd_images()["RGBA"]), PARAM))
    waiting.cancel()
    decoding.cancel()
    os.kill(pid, signal.SIGCONT)
    assert_works(events, loader)
    assert not loader._decoding
    assert pid_of(loader) == pid


def test_close_ends_a_worker_at_work(events: EventLoop, make: Any) -> None:
    loader = make()
    pid = pid_of(loader)
    os.kill(pid, signal.SIGSTOP)
    loading = events.start(loader.load(data_url(GOOD), PARAM))
    until(lambda: loader._decoding)
    events.run(loader.close())
    assert gone(pid)
    with pytest.raises(CancelledError):
        loading.result(60)


def test_the_same_image_is_decoded_once(events: EventLoop, make: Any) -> None:
    loader = make()
    first = events.run(loader.load(data_url(GOOD), PARAM))
    os.kill(pid_of(loader), signal.SIGKILL)  # no worker left to decode it again
    assert events.run(loader.load(data_url(GOOD), PARAM)) is first
    assert loader.n_cache_hits == 1


def test_the_cache_is_bounded(events: EventLoop, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paddlemix_qwenvl_plugin.serve.images._CACHE_BYTES", 2 * SIZE * SIZE * 3)
    loader = make()
    urls = [data_url(saved(Image.new("RGB", (5, 5), (n, 0, 0)))) for n in range(3)]
    for url in [*urls[:2], urls[0], urls[2]]:
        events.run(loader.load(url, PARAM))
    assert (len(loader._cache), loader._cached_bytes) == (2, 2 * SIZE * SIZE * 3)
    for url, hits in ((urls[0], 2), (urls[1], 2)):  # the second one was used the longest ago
        events.run(loader.load(url, PARAM))
        assert loader.n_cache_hits == hits


FRONT = """
import asyncio, sys
from paddlemix_qwenvl_plugin.serve.images import WorkerImageLoader
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

async def main():
    loader = WorkerImageLoader(ServeSettings(), 224)
    await loader.start()
    print(*(process.pid for process in loader._processes), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_no_worker_survives_the_front() -> None:
    """Killed at once, with one worker waiting and one that cannot even read the end of its input."""
    with subprocess.Popen(
        [sys.executable, "-c", FRONT], cwd=REPO, stdout=subprocess.PIPE, text=True
    ) as front:
        assert front.stdout is not None
        pids = [int(pid) for pid in front.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGSTOP)
        front.kill()
    until(lambda: all(map(gone, pids)))


def test_the_worker_opens_no_path(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(GOOD)
    frames = [
        (image_worker.DATA_URL, str(tmp_path / "there.png").encode()),
        (b"?", data_url(GOOD).encode()),
        (image_worker.DATA_URL, data_url(GOOD).encode()),
    ]
    sent = b"".join(image_worker.HEADER.pack(kind, len(body)) + body for kind, body in frames)
    command = [sys.executable, "-m", image_worker.__name__, str(SIZE), "1000000", "1000000"]
    done = subprocess.run(command, cwd=REPO, input=sent, capture_output=True, timeout=60, check=True)
    kinds, rest = [], done.stdout
    while rest:
        kind, n = image_worker.HEADER.unpack_from(rest)
        kinds.append(kind)
        rest = rest[image_worker.HEADER.size + n :]
    assert kinds == [b"R", b"X", b"X", b"I"]


def test_the_worker_imports_little() -> None:
    code = f"import sys, {image_worker.__name__}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert {"PIL", "numpy"} <= loaded
    assert not loaded & {"paddle", "pydantic", "fastapi", "httpx", "asyncio", "tiktoken"}
