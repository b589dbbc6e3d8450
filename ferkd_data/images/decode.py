"""Animations cut down to their first picture, before Pillow sees them.

Pillow checks the frames of a GIF against a pixel limit of its own, and warns where the frame list of an animated PNG
is broken. Neither says anything about the one picture we take, so both are kept from it.

Pillow's switches, held at known values while an image is decoded.

Code that shares the process, such as a teacher's module, may set `ImageFile.LOAD_TRUNCATED_IMAGES` or
`Image.MAX_IMAGE_PIXELS`. Half a picture would then be labelled as a whole one.

Encoded bytes to RGB pixels, exactly as Pillow's `convert("RGB")` gives them.

simplejpeg (libjpeg-turbo without Pillow's overhead) decodes the JPEGs that it can take. Pillow decodes the rest and
decides what is broken. Nothing that is set elsewhere in the process changes the pixels. EXIF orientation is ignored.

Decoding large JPEGs at 1/2, 1/4 or 1/8 of their sides, where all crops that are drawn remain larger than the output.

The pixels differ from those of the whole image: see docs/loader.md for how much.
"""

from __future__ import annotations

import io
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ferkd_data.crops import Crops, check_size
from ferkd_data.errors import ImageError
from ferkd_data.images.formats import HEAD_BYTES, other_kind

GIF_HEADER_BYTES = 13
PNG_SIGNATURE_BYTES = 8
ANIMATION_CHUNKS = (b"acTL", b"fcTL", b"fdAT")


def first_gif_frame(data: bytes) -> bytes:
    """The same GIF with a screen that holds its first frame, and with no rule for what follows that frame.

    Bytes that make no sense are left for the decoder to refuse. Raises ImageError for a size of 0 or beyond 65,535.
    """
    if len(data) < GIF_HEADER_BYTES:
        return data
    patched = bytearray(data)
    flags = data[10]
    at = GIF_HEADER_BYTES + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while at < len(data):
        if data[at] == ord("!"):
            if data[at + 1 : at + 2] == b"\xf9" and len(data) > at + 3:
                patched[at + 3] &= ~0x1C & 0xFF  # the disposal method
            at = _after_blocks(data, at + 2)
        elif data[at] == ord(",") and len(data) >= at + 9:
            left, top, width, height = struct.unpack_from("<4H", data, at + 1)
            screen_width, screen_height = struct.unpack_from("<2H", data, 6)
            width, height = max(screen_width, left + width), max(screen_height, top + height)
            check_size(height, width)
            struct.pack_into("<2H", patched, 6, width, height)
            break
        elif data[at] == ord(";"):
            break
        else:
            at += 1
    return bytes(patched)


def _after_blocks(data: bytes, at: int) -> int:
    """The offset behind a chain of sub-blocks: each its length in one byte and its bytes, the last one empty."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


def still_png(data: bytes) -> bytes:
    """The same PNG without its animation chunks; the picture that is left is the first frame or the one for all."""
    if b"acTL" not in data:
        return data
    kept, at = [data[:PNG_SIGNATURE_BYTES]], PNG_SIGNATURE_BYTES
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in ANIMATION_CHUNKS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


HELD: tuple[tuple[Any, str, Any], ...] = (
    (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
    # `decode` has limits of its own, which come first.
    (Image, "MAX_IMAGE_PIXELS", None),
    (PngImagePlugin, "MAX_TEXT_CHUNK", 2**20),
    (PngImagePlugin, "MAX_TEXT_MEMORY", 2**26),
    (GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_AFTER_FIRST),
)
"""(module, name, value)."""

# Guards _users and _saved. Threads that decode share the held values: the first one sets them, the last one restores
# what it found, so that the rest of the process keeps its own.
_lock = threading.Lock()
_users = 0
_saved: tuple[Any, ...] = ()


@contextmanager
def hold_pillow_globals() -> Iterator[None]:
    """Hold the values in HELD until the context ends; any number of threads may be inside."""
    global _users, _saved
    with _lock:
        if not _users:
            _saved = tuple(getattr(module, name) for module, name, _ in HELD)
        for module, name, value in HELD:
            setattr(module, name, value)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for (module, name, _), value in zip(HELD, _saved, strict=True):
                    setattr(module, name, value)


DEFAULT_MAX_PIXELS = 89_478_485
"""Pillow's own threshold for a decompression bomb: 256 MiB of RGB."""
ANY_SIZE = 65_535**2
"""No limit but that of the format, for a header alone: nothing is decoded."""
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
NO_SIZE = "not identified by this driver"
"""Pillow's words for a header that it understands, but whose width or height is 0."""
JPEG_START = b"\xff\xd8\xff"
JPEG_FRAME = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]")
"""The marker before a JPEG's size; a file without one ended too early."""
CONVERTED = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's pixel modes of 8 bits or fewer, whose `convert("RGB")` is the picture."""


class _PlainJpeg(JpegImageFile):
    """A JPEG without EXIF, which Pillow reads for its resolution only, with a warning where it is broken.

    Pillow's own factory looks for more pictures behind the first (MPO) and warns of a broken list of them.
    """

    def getexif(self) -> Image.Exif:
        return Image.Exif()


# Not from Pillow's registry, where any module may put a reader of its own in the place of these.
READERS: dict[str, tuple[bytes, type[ImageFile.ImageFile]]] = {
    "JPEG": (JPEG_START, _PlainJpeg),
    "PNG": (b"\x89PNG\r\n\x1a\n", PngImageFile),
    "WEBP": (b"RIFF", WebPImageFile),
    "GIF": (b"GIF8", GifImageFile),
    "BMP": (b"BM", BmpImageFile),
}
"""Format -> (first bytes, Pillow's class that reads it)."""


def decode_rgb(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Pixels (H, W, 3) uint8, C-contiguous and writable. Raises ImageError with one of `images.REASONS`."""
    if data.startswith(JPEG_START):
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            return pixels
    with hold_pillow_globals(), _opened(data, max_pixels) as image:
        try:
            image.load()
            return _rgb(image)
        except (
            OSError,
            ValueError,
            SyntaxError,
            IndexError,
            EOFError,
            MemoryError,
        ) as error:
            reason = "truncated" if "truncated" in str(error) else "corrupt"
            raise ImageError(reason, str(error) or type(error).__name__) from error


def decode_reduced(data: bytes, divisor: int) -> npt.NDArray[np.uint8] | None:
    """The pixels of a JPEG at 1/`divisor` (2, 4 or 8) of its sides, rounded up: (ceil(H / d), ceil(W / d), 3) uint8.

    libjpeg-turbo reduces within the inverse DCT, at a fraction of the cost. None for what only `decode_rgb` decodes.
    """
    size = jpeg_size(data, 2**32) if data.startswith(JPEG_START) else None
    if size is None:
        return None
    height, width = -(-size[0] // divisor), -(-size[1] // divisor)
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def image_size(data: bytes, *, max_pixels: int = ANY_SIZE) -> tuple[int, int]:
    """(height, width) from the header alone. Raises ImageError as `decode_rgb` does."""
    if data.startswith(JPEG_START):
        size = jpeg_size(data, max_pixels)
        if size is not None:
            return size
    with hold_pillow_globals(), _opened(data, max_pixels) as image:
        return image.height, image.width


def image_extension(data: bytes) -> str:
    """The file name extension of the format, such as `jpg`. Raises ImageError."""
    if data.startswith(JPEG_START):
        return "jpg"
    with hold_pillow_globals(), _opened(data, max_pixels=None) as image:
        return EXTENSIONS[str(image.format)]


def _rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Pixels of a loaded image. Raises ImageError for a mode whose picture is not known."""
    if image.mode.startswith("I"):
        return _high_bytes(image)
    if image.mode not in CONVERTED:
        raise ImageError("unsupported_format", f"a {image.format} file with pixels of mode {image.mode}")
    if image.mode == "P":
        # Pillow would warn that RGB has no room for it; the pixels are the same without.
        image.info.pop("transparency", None)
    return np.array(image.convert("RGB"))


def _high_bytes(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Grey of 16 bits as its high byte, as Pillow reads RGB of 16 bits; `convert` would cut all above 255 to white.

    Mode I of 32 bits is how Pillow before 11.3 gives the same files.
    """
    if image.format != "PNG":
        raise ImageError("unsupported_format", f"a {image.format} file with pixels of mode {image.mode}")
    grey: npt.NDArray[np.uint8] = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _decode_jpeg(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8] | None:
    """None where Pillow is to decide."""
    if jpeg_size(data, max_pixels) is None:
        return None
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels


def jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """(height, width), or None where Pillow is to decide. Raises ImageError for a size beyond the limits."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace not in ("YCbCr", "Gray"):
        return None
    _check(height, width, max_pixels)
    return height, width


def _opened(data: bytes, max_pixels: int | None) -> Image.Image:
    """Parse the header. Pillow's plug-ins are asked one by one, because `Image.open` has a pixel limit of its own."""
    if not data:
        raise ImageError("empty", "the file has no bytes")
    image = _identify(data)
    try:
        _check(image.height, image.width, max_pixels)
    except ImageError:
        image.close()
        raise
    return image


def _identify(data: bytes) -> Image.Image:
    for name, (magic, reader) in READERS.items():
        if not data.startswith(magic) or (name == "WEBP" and data[8:15] != b"WEBPVP8"):
            continue
        try:
            return reader(io.BytesIO(_first_picture(name, data)), "")
        except (OSError, ValueError, SyntaxError, IndexError, EOFError, TypeError, struct.error) as error:
            if str(error) == NO_SIZE and (name != "JPEG" or JPEG_FRAME.search(data)):
                raise ImageError("zero_sized", f"a {name} file whose header gives no size") from error
            reason = "truncated" if len(data) < 1024 or "truncated" in str(error) else "corrupt"
            raise ImageError(reason, f"starts like a {name} file, but: {error}") from error
    known = other_kind(data[:HEAD_BYTES])
    if known:
        raise ImageError("unsupported_format", f"the bytes are of a {known} image")
    raise ImageError("not_an_image", f"no image format known here (first bytes {data[:8]!r})")


def _first_picture(name: str, data: bytes) -> bytes:
    if name == "GIF":
        return first_gif_frame(data)
    return still_png(data) if name == "PNG" else data


def _check(height: int, width: int, max_pixels: int | None) -> None:
    check_size(height, width)
    if max_pixels is not None and height * width > max_pixels:
        raise ImageError("pixel_bomb", f"{width}x{height} pixels is more than the limit of {max_pixels}")


DIVISORS = (8, 4, 2)
MARGIN = 2
"""A reduced crop has at least so many times the pixels of the output along each side."""


def divisor_for(boxes_N4: npt.NDArray[np.uint16], size: int) -> int:
    """The largest divisor by which every box still has MARGIN * `size` pixels along each side; 1 for none.

    >>> divisor_for(np.array([[0, 0, 900, 1800]], np.uint16), 224)
    2
    """
    smallest = int(boxes_N4[:, 2:].min())
    return next((divisor for divisor in DIVISORS if smallest >= divisor * MARGIN * size), 1)


def reduced_crops(crops: Crops, divisor: int, height: int, width: int) -> Crops:
    """The crops within an image of `height` x `width` that was reduced by `divisor`; edges to the nearest pixel."""
    boxes = crops.boxes.astype(np.int64)
    start = np.rint(boxes[:, :2] / divisor).astype(np.int64)
    end = np.minimum(np.rint((boxes[:, :2] + boxes[:, 2:]) / divisor).astype(np.int64), [height, width])
    return replace(crops, boxes=np.concatenate([start, end - start], axis=1).astype(np.uint16))
