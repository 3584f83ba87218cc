"""Load images from files, bytes and URLs within limits, and preprocess them for the vision stage."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from paddlemix_qwenvl_plugin.processing.quiet import quiet
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, TooLargeError, UsageError
from paddlemix_qwenvl_plugin.util.sources import is_address, is_data_url, without_password

# Mean and standard deviation of CLIP's training images, per colour channel.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

_ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation -> operation that makes the image upright.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Formats that Pillow passes to another program (Ghostscript) or to the operating system's drawing code.
_REFUSED_FORMATS = ("EPS", "WMF")


@dataclass(frozen=True)
class ImageLimits:
    """Limits for loading an image.

    Attributes:
        max_bytes: encoded size.
        max_pixels: width * height.
        timeout_seconds: total time of a download.
        allow_private: also download from addresses that are not public: this machine, its network, and the metadata
            services of clouds.
    """

    max_bytes: int = 50 * 1024 * 1024
    max_pixels: int = 64_000_000
    timeout_seconds: float = 10.0
    allow_private: bool = False


DEFAULT_LIMITS = ImageLimits()


def preprocess(image: Image.Image, image_size: int = 448) -> npt.NDArray[np.float32]:
    """Preprocess an image for the vision stage: RGB, bicubic resize, CLIP mean and standard deviation.

    The aspect ratio is not kept, which is why boxes are in thousandths of the width and of the height.

    Returns:
        float32 [3, image_size, image_size].
    """
    return normalise(resize(image, image_size))


def resize(image: Image.Image, image_size: int) -> npt.NDArray[np.uint8]:
    """Resize an image with bicubic interpolation to RGB uint8 [image_size, image_size, 3]."""
    return np.asarray(image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC))


def normalise(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Normalise pixels by CLIP's mean and standard deviation.

    Args:
        pixels: uint8 [image_size, image_size, 3].

    Returns:
        float32 [3, image_size, image_size].
    """
    scaled = pixels.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(((scaled - _MEAN) / _STD).transpose(2, 0, 1))


def load_image(source: Any, *, allow_http: bool = False, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Load an image as fully decoded RGB, with its EXIF orientation applied and transparency on white.

    The first frame of an animation is used; 16-bit grey is scaled to 8 bits. The official code ignores the EXIF
    orientation, drops transparency and turns 16-bit grey white. Paths and `file://` URLs are not restricted; http(s)
    URLs are restricted to public addresses unless `limits` allow others. A server must therefore check the source that
    a client names before the call.

    Args:
        source: a path, encoded bytes, a PIL image, a `data:` or `file://` URL or, with `allow_http`, an http(s) URL.
        allow_http: allow downloads.
        limits: size, time and addresses.

    Raises:
        UsageError: the source does not exist, cannot be read, is an invalid URL, or is not of a supported or allowed
            kind.
        QwenVLError: the source is not an image, is damaged, exceeds `limits` or cannot be downloaded.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "PIL image", limits)
    encoded = read_encoded(source, allow_http=allow_http, limits=limits)
    return decode_image(encoded, describe_source(source), limits)


def read_encoded(source: Any, *, allow_http: bool = False, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """Read the encoded bytes of an image for `decode_image`.

    Of a file, at most one byte more than the limit is read, by which `decode_image` detects that it is too large.

    `source` and errors as for `load_image`, except that PIL images, which have no encoded bytes, are rejected.
    """
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    if isinstance(source, os.PathLike):
        return _read_file(Path(source), limits)
    if not isinstance(source, str):
        raise UsageError(
            f"image source must be a path, a URL, bytes or a PIL image, got {type(source).__name__}"
        )
    before_colon, colon, _ = source.partition(":")
    scheme = before_colon.lower() if colon else ""
    if scheme == "data":
        return _decode_data_url(source, limits)
    if scheme in ("http", "https"):
        name = describe_source(source)
        if not allow_http:
            raise UsageError(f"image {name}: downloading is off, pass --allow_http to turn it on")
        if not _has_host(source):
            raise UsageError(f"image {name}: this address names no host")
        from paddlemix_qwenvl_plugin.processing.download import download  # httpx is slow to import

        return download(source, name, limits.max_bytes, limits.timeout_seconds, limits.allow_private)
    if scheme == "file":
        return _read_file(_file_url_path(source), limits)
    if re.match(r"[a-z][a-z0-9+.-]*://", source, re.IGNORECASE):
        raise UsageError(f"image {describe_source(source)}: scheme {scheme!r} is not supported")
    return _read_file(Path(source), limits)


def decode_image(encoded: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode an image from bytes as `load_image` does; `name` identifies it in error messages."""
    if not encoded:
        raise QwenVLError(f"image {name} is empty")
    if len(encoded) > limits.max_bytes:
        raise TooLargeError(f"image {name} is larger than the limit of {_mebibytes(limits.max_bytes)}")
    try:
        with quiet():
            image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError as error:
        raise QwenVLError(f"image {name} is not in an image format that Pillow supports") from error
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"image {name} has too many pixels: {error}") from error
    except Exception as error:  # damaged headers raise almost anything in Pillow's format plugins
        raise QwenVLError(f"image {name} cannot be read: {error}") from error
    if image.format in _REFUSED_FORMATS:
        raise QwenVLError(f"image {name}: the format {image.format} is not accepted")
    return _decode(image, name, limits)


def from_folder(source: Any, folder: Optional[Path]) -> Any:
    """Resolve a path given as text against `folder`; other sources are returned unchanged."""
    return (
        folder / source
        if folder is not None and isinstance(source, str) and not is_address(source)
        else source
    )


def local_path(source: str) -> Optional[Path]:
    """The local file that a source names, as a path or a `file://` URL; None for other URLs.

    Raises:
        UsageError: the `file://` URL names another host or no path.
    """
    if source[:5].lower() == "file:":
        return _file_url_path(source)
    return None if is_address(source) else Path(source)


def describe_source(source: Any) -> str:
    """A short name of an image source for messages, without image data and without a URL's password."""
    if isinstance(source, Image.Image):
        return "PIL image"
    if isinstance(source, (bytes, bytearray)):
        return "image bytes"
    if is_data_url(str(source)):
        return "data URL"
    name = "".join(
        character if character.isprintable() else "?" for character in without_password(str(source))
    )
    return name if len(name) <= 120 else f"{name[:80]}…{name[-39:]}"


def _read_file(path: Path, limits: ImageLimits) -> bytes:
    name = describe_source(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"image {name} is a directory")
        if not stat.S_ISREG(mode):  # a pipe or a device may never end
            raise UsageError(f"image {name} is not a regular file")
        with path.open("rb") as file:
            return file.read(limits.max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"image {name} does not exist") from error
    except OSError as error:
        raise UsageError(f"image {name} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null character or an unpaired surrogate
        raise UsageError(f"image {name} cannot be a file name: {error}") from error


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
    # A percent escape takes three characters for a byte; base64 takes fewer, except for the padding (+ 3).
    if len(payload) > 3 * limits.max_bytes + 3:
        raise TooLargeError(f"image data URL is larger than the limit of {_mebibytes(limits.max_bytes)}")
    encoded = unquote_to_bytes(payload.encode("utf-8", errors="replace"))
    if not header.lower().endswith(";base64"):
        return encoded
    encoded = b"".join(encoded.split())
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except binascii.Error as error:
        raise UsageError(f"data URL is not valid base64: {error}") from error


def _decode(image: Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise TooLargeError(
            f"image {name} is {width} x {height} pixels, more than the limit of {limits.max_pixels} pixels"
        )
    if width == 0 or height == 0:
        raise QwenVLError(f"image {name} is {width} x {height} pixels; it must have at least 1 x 1")
    try:
        with quiet():
            image.load()  # the EXIF orientation may be stored after the pixels
            transpose = _upright_transpose(image)
            pixels = _as_rgb(image)
        return pixels if transpose is None else pixels.transpose(transpose)
    except MemoryError as error:
        raise TooLargeError(f"image {name} of {width} x {height} pixels: out of memory") from error
    except Exception as error:  # Pillow's plugins have no common error for damaged data
        raise QwenVLError(f"image {name} is damaged or cut short: {error}") from error


def _upright_transpose(image: Image.Image) -> Optional[Image.Transpose]:
    """The operation that applies the EXIF orientation; None if the image is upright or the tag is unreadable."""
    try:
        return _TRANSPOSES.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of an image whose pixels may be intact
        return None


def _as_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, with transparent pixels on white."""
    # 16-bit grey has the mode I;16, or for some formats the 32-bit mode I. Pillow's conversion of these modes to RGB
    # would clip values at 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        grey = ((values + 128) // 257).clip(max=255).astype(np.uint8)  # 65535 / 257 is 255
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    transparent = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(transparent, mask=transparent)
    return white


def _mebibytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:g} MiB"
