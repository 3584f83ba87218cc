"""Images of requests: equal to `preprocess`; a harmful image affects neither the front nor the next image."""

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
SIZE = 224  # width and height to which the loaders resize images
T = TypeVar("T")


class EventLoop:
    """Event loop in a thread, which stands for the front's."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Any:
        """Start a coroutine and return its concurrent.futures.Future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and return its result."""
        return self.start(coroutine).result(120)  # type: ignore[no-any-return]

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(60)
        self.loop.close()


@pytest.fixture(scope="module")
def event_loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def shared_loader(event_loop: EventLoop) -> Iterator[WorkerImageLoader]:
    """Loader with the default settings except a longer timeout, for tests that change nothing of it but its cache."""
    loader = WorkerImageLoader(ServeSettings(image_timeout=60), SIZE)
    event_loop.run(loader.start())
    yield loader
    event_loop.run(loader.close())


@pytest.fixture
def start_loader(event_loop: EventLoop) -> Iterator[Any]:
    """Function that starts a loader with the given settings, by default one worker process; closed after the test."""
    loaders = []

    def start_loader(**settings: Any) -> WorkerImageLoader:
        values = {"image_workers": 1, "image_timeout": 60.0, **settings}
        loaders.append(WorkerImageLoader(ServeSettings(**values), SIZE))
        event_loop.run(loaders[-1].start())
        return loaders[-1]

    yield start_loader
    for loader in loaders:
        event_loop.run(loader.close())


def data_url(encoded: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


VALID_PNG = encode(Image.new("RGB", (6, 4), "#c86432"))


def load_error(event_loop: EventLoop, loader: WorkerImageLoader, url: str) -> ApiError:
    """The error of loading an image, which must have status 400."""
    with pytest.raises(ApiError) as caught:
        event_loop.run(loader.load(url, PARAM))
    error = caught.value
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", PARAM)
    assert str(error).startswith(f"{PARAM}: ")
    assert len(str(error)) < 400
    return error


def check_next_image(event_loop: EventLoop, loader: WorkerImageLoader) -> None:
    """Check that a worker decodes the next image."""
    loader._cache.clear()  # otherwise no worker would be used
    assert event_loop.run(loader.load(data_url(VALID_PNG), PARAM)).size == (6, 4)


def encoded_images() -> dict[str, bytes]:
    """Images in various modes and file formats, by a description."""
    rng = np.random.default_rng(1)
    rgba = Image.fromarray(rng.integers(0, 256, (50, 70, 4), dtype=np.uint8))
    rgb = rgba.convert("RGB")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # the tag Orientation: rotated by 90 degrees
    return {
        "RGBA": encode(rgba),
        "LA": encode(rgba.convert("LA")),
        "16 bits": encode(Image.fromarray(rng.integers(0, 65536, (50, 70)).astype(np.uint16))),
        "1 bit": encode(rgb.convert("1")),
        "rotated": encode(rgb, "JPEG", exif=rotated),
        "CMYK": encode(rgb.convert("CMYK"), "JPEG"),
        "palette": encode(rgb.convert("P"), "GIF"),
        "animation": encode(rgb, "GIF", save_all=True, append_images=[rgba.convert("L")]),
        "WebP": encode(rgba, "WEBP"),
        "TIFF": encode(rgba, "TIFF", compression="tiff_lzw"),
        "one pixel": encode(rgb.crop((0, 0, 1, 1))),
    }


@pytest.mark.parametrize(
    "encoded",
    [
        *(path.read_bytes() for path in sorted((REPO / "recipes" / "images").glob("*.png"))),
        *encoded_images().values(),
    ],
)
def test_equal_to_preprocess(event_loop: EventLoop, shared_loader: WorkerImageLoader, encoded: bytes) -> None:
    image = load_image(encoded)
    loaded = event_loop.run(shared_loader.load(data_url(encoded), PARAM))
    assert loaded.size == image.size
    assert (loaded.pixels.dtype, loaded.pixels.shape) == (np.uint8, (SIZE, SIZE, 3))
    np.testing.assert_array_equal(normalise(loaded.pixels), preprocess(image, SIZE))


def test_size_of_a_rotated_image_is_that_after_rotation(
    event_loop: EventLoop, shared_loader: WorkerImageLoader
) -> None:
    assert event_loop.run(shared_loader.load(data_url(encoded_images()["rotated"]), PARAM)).size == (50, 70)


@pytest.mark.parametrize(
    ("url", "code", "message"),
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
        (data_url(VALID_PNG[:-30]), "invalid_image", "damaged or cut short"),
        ("http://example.org/a.png", "image_host_not_allowed", "example.org are not allowed"),
        ("https:", "image_host_not_allowed", "not allowed"),
        ("http://[::1/a.png", "invalid_image_url", "not a valid URL"),
    ],
)
def test_invalid_url_or_image(
    event_loop: EventLoop, shared_loader: WorkerImageLoader, url: str, code: str, message: str
) -> None:
    error = load_error(event_loop, shared_loader, url)
    assert error.code == code
    assert message in str(error)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Black grayscale PNG of this size, with these chunks after the header.

    The data ends after about 50 million pixels, so that a larger image is made quickly.
    """
    rows = zlib.compress(bytes(min(width + 1, 50_000_000 // height + 1) * height), 1)
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    encoded = b"\x89PNG\r\n\x1a\n"
    for chunk_type, body in (header, *chunks, (b"IDAT", rows), (b"IEND", b"")):
        checksum = zlib.crc32(chunk_type + body)
        encoded += struct.pack(">I", len(body)) + chunk_type + body + struct.pack(">I", checksum)
    return encoded


def gif_bomb() -> bytes:
    """GIF with a logical screen of one pixel and a frame of 65535 x 65535 pixels."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\x00;"
    return head + frame


def tiff_bomb() -> bytes:
    """TIFF of 64 x 64 pixels, whose header says 60000 x 60000."""
    encoded = bytearray(encode(Image.new("L", (64, 64)), "TIFF"))
    position = struct.unpack_from("<I", encoded, 4)[0]  # of the directory: a count, and 12 bytes per entry
    for _ in range(struct.unpack_from("<H", encoded, position)[0]):
        tag, _ = struct.unpack_from("<HH", encoded, position + 2)
        if tag in (256, 257, 278):  # width, height, rows per strip
            struct.pack_into("<HHII", encoded, position + 2, tag, 4, 1, 60_000)
        position += 12
    return bytes(encoded)


def webp_bomb() -> bytes:
    """Lossless WebP with a size of 16383 x 16383 pixels in its header, and no pixels."""
    body = b"VP8L" + struct.pack("<I", 12) + b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(7)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize(
    ("bomb", "codes"),
    [
        (lambda: png(30_000, 30_000), ["image_too_large"]),
        (gif_bomb, ["image_too_large", "invalid_image"]),
        (tiff_bomb, ["image_too_large"]),
        (webp_bomb, ["image_too_large"]),
        # 4 x 4 pixels with a colour profile of 256 MiB.
        (
            lambda: png(4, 4, (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28), 1))),
            ["invalid_image", "image_too_large"],
        ),
    ],
    ids=["png", "gif", "tiff", "webp", "profile"],
)
def test_decompression_bombs(
    event_loop: EventLoop, shared_loader: WorkerImageLoader, bomb: Any, codes: list[str]
) -> None:
    """The worker refuses the image without decoding it, and continues."""
    check_next_image(event_loop, shared_loader)
    pids = [process.pid for process in shared_loader._processes]
    assert load_error(event_loop, shared_loader, data_url(bomb())).code in codes
    check_next_image(event_loop, shared_loader)
    assert [process.pid for process in shared_loader._processes] == pids
    for pid in pids:  # any of the workers may have got the image
        status = Path(f"/proc/{pid}/status").read_text()
        peak_kib = int(status.partition("VmHWM:")[2].split()[0])
        assert peak_kib < 128 * 2**10  # a decoded image or colour profile would take at least 256 MiB


def test_memory_is_limited(event_loop: EventLoop, start_loader: Any) -> None:
    """A data: URL of eight million escapes, which urllib splits into a list of half a gigabyte."""
    loader = start_loader(max_image_pixels=1_000_000, max_image_bytes=8 * 2**20)
    error = load_error(event_loop, loader, "data:image/png," + "%41" * (8 * 2**20))
    assert error.code == "image_too_large"
    assert "out of memory" in str(error)
    check_next_image(event_loop, loader)
    limits = Path(f"/proc/{loader._processes[0].pid}/limits").read_text()
    # Columns: the name, 26 characters wide, then the soft limit.
    soft = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()[1:]}
    assert 2**27 < int(soft["Max address space"]) < 2**30
    assert (soft["Max core file size"], soft["Max file size"]) == ("0", "0")
    assert int(soft["Max open files"]) <= 16


def pid_of(loader: WorkerImageLoader) -> int:
    pid = loader._processes[0].pid
    assert pid is not None
    return pid


def has_exited(pid: int) -> bool:
    """Whether a process has exited; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_worker_is_killed_after_the_timeout(event_loop: EventLoop, start_loader: Any) -> None:
    loader = start_loader(image_timeout=0.05)
    pid = pid_of(loader)
    error = load_error(event_loop, loader, data_url(png(7000, 7000)))
    assert error.code == "image_too_large"
    assert "takes more than 0.05 seconds" in str(error)
    assert has_exited(pid)
    loader._processes[0]._timeout_seconds = 60.0
    check_next_image(event_loop, loader)


def test_killed_worker_is_replaced(event_loop: EventLoop, start_loader: Any) -> None:
    """Killed while it decodes an image, and while it is idle."""
    loader = start_loader()
    pid = pid_of(loader)
    os.kill(pid, signal.SIGSTOP)
    loading = event_loop.start(loader.load(data_url(VALID_PNG), PARAM))
    wait_until(lambda: loader._decoding)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ApiError, match="ended: the image is damaged or needs too much memory") as caught:
        loading.result(60)
    assert (caught.value.status, caught.value.code) == (400, "invalid_image")
    check_next_image(event_loop, loader)

    os.kill(pid_of(loader), signal.SIGSEGV)
    wait_until(lambda: has_exited(pid_of(loader)))
    wait_until(lambda: loader._processes[0]._process.returncode is not None)  # the front has noticed the exit
    check_next_image(event_loop, loader)


def test_worker_is_replaced_after_the_maximum_of_images(
    event_loop: EventLoop, start_loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_process, "_MAX_IMAGES", 2)
    loader = start_loader()
    pids = []
    for _ in range(5):
        check_next_image(event_loop, loader)
        pids.append(pid_of(loader))
    assert len(set(pids)) == 3  # two images each for the first two workers
    assert all(map(has_exited, pids[:4]))


def test_worker_that_does_not_start(event_loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    loader = WorkerImageLoader(ServeSettings(), SIZE)
    with pytest.raises(ApiError, match="does not start; try again later") as caught:
        event_loop.run(loader.load(data_url(VALID_PNG), PARAM))
    assert caught.value.status == 503
    monkeypatch.undo()
    check_next_image(event_loop, loader)
    event_loop.run(loader.close())


def test_concurrent_images(event_loop: EventLoop, shared_loader: WorkerImageLoader) -> None:
    async def load_all() -> list[Any]:
        # Width and colour differ, so that an exchange of two results would be noticed.
        valid = [data_url(encode(Image.new("RGB", (i + 1, 9), (i, 0, 0)))) for i in range(40)]
        invalid = [data_url(VALID_PNG[:20] + bytes([i])) for i in range(10)]
        loads = (shared_loader.load(url, PARAM) for url in valid + invalid)
        return await asyncio.gather(*loads, return_exceptions=True)

    results = event_loop.run(load_all())
    for i, image in enumerate(results[:40]):
        assert (image.size, image.pixels[0, 0].tolist()) == ((i + 1, 9), [i, 0, 0])
    assert [error.code for error in results[40:]] == ["invalid_image"] * 10


def test_cancellation_keeps_the_worker(event_loop: EventLoop, start_loader: Any) -> None:
    """One load is cancelled while its image is decoded, another while it waits for the worker."""
    loader = start_loader()
    pid = pid_of(loader)
    os.kill(pid, signal.SIGSTOP)
    decoding = event_loop.start(loader.load(data_url(VALID_PNG), PARAM))
    wait_until(lambda: loader._decoding)
    waiting = event_loop.start(loader.load(data_url(encoded_images()["RGBA"]), PARAM))
    waiting.cancel()
    decoding.cancel()
    os.kill(pid, signal.SIGCONT)
    check_next_image(event_loop, loader)
    assert not loader._decoding
    assert pid_of(loader) == pid


def test_close_kills_a_busy_worker(event_loop: EventLoop, start_loader: Any) -> None:
    loader = start_loader()
    pid = pid_of(loader)
    os.kill(pid, signal.SIGSTOP)
    loading = event_loop.start(loader.load(data_url(VALID_PNG), PARAM))
    wait_until(lambda: loader._decoding)
    event_loop.run(loader.close())
    assert has_exited(pid)
    with pytest.raises(CancelledError):
        loading.result(60)


def test_equal_image_is_taken_from_the_cache(event_loop: EventLoop, start_loader: Any) -> None:
    loader = start_loader()
    first = event_loop.run(loader.load(data_url(VALID_PNG), PARAM))
    os.kill(pid_of(loader), signal.SIGKILL)  # decoding the image again would need a new worker
    assert event_loop.run(loader.load(data_url(VALID_PNG), PARAM)) is first
    assert loader.n_cache_hits == 1


def test_cache_evicts_the_least_recently_used_image(
    event_loop: EventLoop, start_loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paddlemix_qwenvl_plugin.serve.images._CACHE_BYTES", 2 * SIZE * SIZE * 3)
    loader = start_loader()
    urls = [data_url(encode(Image.new("RGB", (5, 5), (n, 0, 0)))) for n in range(3)]
    for url in [*urls[:2], urls[0], urls[2]]:
        event_loop.run(loader.load(url, PARAM))
    assert (len(loader._cache), loader._cached_bytes) == (2, 2 * SIZE * SIZE * 3)
    # There was one hit so far. urls[0] is still in the cache: a second hit; urls[1] was evicted: no further hit.
    for url, hits in ((urls[0], 2), (urls[1], 2)):
        event_loop.run(loader.load(url, PARAM))
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


def test_workers_exit_when_the_front_is_killed() -> None:
    """One of the two workers is suspended, and cannot read the end of its input."""
    with subprocess.Popen(
        [sys.executable, "-c", FRONT], cwd=REPO, stdout=subprocess.PIPE, text=True
    ) as front:
        assert front.stdout is not None
        pids = [int(pid) for pid in front.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGSTOP)
        front.kill()
    wait_until(lambda: all(map(has_exited, pids)))


def test_worker_opens_no_files(tmp_path: Path) -> None:
    """A worker sends R when it is ready, X for an invalid request and I for an image."""
    (tmp_path / "valid.png").write_bytes(VALID_PNG)
    frames = [
        (image_worker.DATA_URL, str(tmp_path / "valid.png").encode()),  # a path in place of a data: URL
        (b"?", data_url(VALID_PNG).encode()),
        (image_worker.DATA_URL, data_url(VALID_PNG).encode()),
    ]
    worker_input = b"".join(image_worker.HEADER.pack(kind, len(body)) + body for kind, body in frames)
    command = [sys.executable, "-m", image_worker.__name__, str(SIZE), "1000000", "1000000"]
    completed = subprocess.run(
        command, cwd=REPO, input=worker_input, capture_output=True, timeout=60, check=True
    )
    kinds, output = [], completed.stdout
    while output:
        kind, length = image_worker.HEADER.unpack_from(output)
        kinds.append(kind)
        output = output[image_worker.HEADER.size + length :]
    assert kinds == [b"R", b"X", b"X", b"I"]


def test_worker_imports_few_libraries() -> None:
    """Few libraries keep the start short and the memory of a worker small."""
    code = f"import sys, {image_worker.__name__}; print(*sys.modules)"
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in completed.stdout.split()}
    assert {"PIL", "numpy"} <= loaded
    assert not loaded & {"paddle", "pydantic", "fastapi", "httpx", "asyncio", "tiktoken"}
