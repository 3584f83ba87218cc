"""Load pictures from anywhere within limits, and turn them into the vision tower's input."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

if TYPE_CHECKING:
    import httpx

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

_CHUNK_BYTES = 64 * 1024

# Pillow hands these to another program (Ghostscript) or to the operating system's drawing code.
_REFUSED_FORMATS = ("EPS", "WMF")

_header_lock = threading.Lock()


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost: encoded size in bytes, width x height, and the whole time of a download."""

    max_bytes: int = 50 * 1024 * 1024
    max_pixels: int = 64_000_000
    timeout_seconds: float = 10.0


DEFAULT_LIMITS = ImageLimits()


def preprocess(image: Image.Image, image_size: int = 448) -> npt.NDArray[np.float32]:
    """float32 [3, image_size, image_size]: RGB, bicubic resize, CLIP mean and standard deviation.

    The aspect ratio is not kept: boxes are in thousandths of the width and of the height for that reason.
    """
    resized = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float32) / np.float32(255)
    return np.ascontiguousarray(((pixels - _MEAN) / _STD).transpose(2, 0, 1))


def preprocess_all(images: Sequence[Image.Image], image_size: int = 448) -> npt.NDArray[np.float32]:
    """float32 [N, 3, image_size, image_size]; N may be 0."""
    batch = np.empty((len(images), 3, image_size, image_size), dtype=np.float32)
    for i, image in enumerate(images):
        batch[i] = preprocess(image, image_size)
    return batch


def load_image(source: Any, *, allow_http: bool = False, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Load `source` as a fully decoded RGB picture.

    `source` is a path, encoded bytes, a PIL picture, a `data:` URL, a `file://` URL or, with `allow_http`, an
    http(s) URL. Of an animation the first frame is taken. An EXIF orientation is not applied, transparency is
    dropped, as in the official code. Paths, `file://` URLs and web addresses are opened wherever they point:
    a server decides before the call which of them a client may name.

    Raises UsageError for a source that is not there or not of a supported kind, and QwenVLError for one that
    is no picture, is damaged, exceeds `limits` or cannot be downloaded.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "PIL image", limits)
    if isinstance(source, (bytes, bytearray)):
        return _open(bytes(source), "image bytes", limits)
    if isinstance(source, os.PathLike):
        return _open_file(Path(source), limits)
    if not isinstance(source, str):
        raise UsageError(
            f"image source must be a path, a URL, bytes or a PIL image, got {type(source).__name__}"
        )
    before_colon, colon, _ = source.partition(":")
    scheme = before_colon.lower() if colon else ""
    if scheme == "data":
        return _open(_decode_data_url(source, limits), "data URL", limits)
    if scheme in ("http", "https"):
        name = describe_source(source)
        if not allow_http:
            raise UsageError(f"image {name}: downloading is off, pass --allow-http to turn it on")
        if not _has_host(source):
            raise UsageError(f"image {name}: this address names no host")
        return _open(_download(source, name, limits), name, limits)
    if scheme == "file":
        return _open_file(_file_url_path(source), limits)
    if re.match(r"[a-z][a-z0-9+.-]*://", source, re.IGNORECASE):
        raise UsageError(f"image {describe_source(source)}: scheme {scheme!r} is not supported")
    return _open_file(Path(source), limits)


def describe_source(source: Any) -> str:
    """A short name of an image source for messages; never the picture itself, nor a URL's password."""
    if isinstance(source, Image.Image):
        return "PIL image"
    if isinstance(source, (bytes, bytearray)):
        return "image bytes"
    name = str(source)
    if name[:5].lower() == "data:":
        return "data URL"
    name = re.sub(r"^(\w+://)[^/?#]*@", r"\1", name)
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= 120 else f"{name[:80]}…{name[-39:]}"


def _open_file(path: Path, limits: ImageLimits) -> Image.Image:
    name = describe_source(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"image {name} is a directory")
        if not stat.S_ISREG(mode):  # a pipe or a device may never end
            raise UsageError(f"image {name} is not a regular file")
        with path.open("rb") as file:
            encoded = file.read(limits.max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"image {name} does not exist") from error
    except OSError as error:
        raise UsageError(f"image {name} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null character or half a surrogate pair
        raise UsageError(f"image {name} cannot be a file name: {error}") from error
    return _open(encoded, name, limits)


def _has_host(url: str) -> bool:
    try:
        return bool(urlsplit(url).hostname)
    except ValueError:  # a broken IPv6 address
        return False


def _file_url_path(url: str) -> Path:
    match = re.fullmatch(r"file://(?:localhost)?(/.*)", url, re.IGNORECASE | re.DOTALL)
    if match is None:
        raise UsageError(f"image {describe_source(url)}: a file URL must be of the form file:///path")
    return Path(url2pathname(match.group(1)))


def _decode_data_url(url: str, limits: ImageLimits) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise UsageError("data URL has no comma between its header and its data")
    # Escapes take three characters for a byte, base64 less.
    if len(payload) > 3 * limits.max_bytes + 3:
        raise QwenVLError(f"image data URL is larger than the limit of {_mebibytes(limits.max_bytes)}")
    encoded = unquote_to_bytes(payload.encode("utf-8", errors="replace"))
    if not header.lower().endswith(";base64"):
        return encoded
    encoded = b"".join(encoded.split())
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except binascii.Error as error:
        raise UsageError(f"data URL is not valid base64: {error}") from error


def _open(encoded: bytes, name: str, limits: ImageLimits) -> Image.Image:
    if not encoded:
        raise QwenVLError(f"image {name} is empty")
    if len(encoded) > limits.max_bytes:
        raise QwenVLError(f"image {name} is larger than the limit of {_mebibytes(limits.max_bytes)}")
    try:
        # Our own limit on the pixels decides. Pillow would print a warning besides.
        with _header_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError as error:
        raise QwenVLError(f"image {name} is not in a picture format that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise QwenVLError(f"image {name} has too many pixels: {error}") from error
    except Exception as error:  # damaged headers raise almost anything in Pillow's format plugins
        raise QwenVLError(f"image {name} cannot be read: {error}") from error
    if image.format in _REFUSED_FORMATS:
        raise QwenVLError(f"image {name}: the format {image.format} is not accepted")
    return _decode(image, name, limits)


def _decode(image: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise QwenVLError(
            f"image {name} is {width} x {height} pixels, more than the limit of {limits.max_pixels} pixels"
        )
    if width == 0 or height == 0:
        raise QwenVLError(f"image {name} is {width} x {height} pixels: nothing to look at")
    try:
        return image.convert("RGB")
    except Exception as error:  # as above: the plugins have no common error for damaged data
        raise QwenVLError(f"image {name} is damaged or cut short: {error}") from error


def _download(url: str, name: str, limits: ImageLimits) -> bytes:
    """The body of `url`, within `limits.timeout_seconds` from the call to the last byte.

    httpx limits each read, so a server that sends a byte now and then would hold us for ever. A thread of its
    own bounds the whole, name resolution included.
    """
    import httpx  # only downloads need it, and it is slow to import

    client = httpx.Client(
        follow_redirects=True,
        timeout=limits.timeout_seconds,
        # Not compressed: a small body must not unfold into a large one.
        headers={"Accept-Encoding": "identity"},
    )
    outcome: list[bytes | BaseException] = []

    def work() -> None:
        try:
            outcome.append(_fetch(client, url, name, limits))
        except httpx.TimeoutException:
            outcome.append(_too_slow(name, limits))
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            outcome.append(QwenVLError(f"image {name} cannot be downloaded: {error}"))
        except BaseException as error:  # raised again in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=work, name="image-download", daemon=True)
    thread.start()
    thread.join(limits.timeout_seconds)
    # Ends the thread's next read if it is still at work.
    client.close()
    result = outcome[0] if outcome else _too_slow(name, limits)
    if isinstance(result, BaseException):
        raise result
    return result


def _fetch(client: httpx.Client, url: str, name: str, limits: ImageLimits) -> bytes:
    too_large = QwenVLError(f"image {name} is larger than the limit of {_mebibytes(limits.max_bytes)}")
    with client.stream("GET", url) as response:
        if response.status_code != 200:
            raise QwenVLError(f"image {name}: the server answered with status {response.status_code}")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise QwenVLError(f"image {name}: the server sent it compressed though asked not to")
        declared = response.headers.get("Content-Length", "")
        if re.fullmatch("[0-9]{1,18}", declared) and int(declared) > limits.max_bytes:
            raise too_large
        body = bytearray()
        for chunk in response.iter_raw(_CHUNK_BYTES):
            body += chunk
            if len(body) > limits.max_bytes:
                raise too_large
        return bytes(body)


def _too_slow(name: str, limits: ImageLimits) -> QwenVLError:
    return QwenVLError(f"image {name} was not there within {limits.timeout_seconds:g} seconds")


def _mebibytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:g} MiB"
