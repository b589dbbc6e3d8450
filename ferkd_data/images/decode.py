"""Decode images to RGB pixels, exactly as Pillow's `convert("RGB")` gives them.

Two decoders share the work. simplejpeg (libjpeg-turbo without Pillow's overhead) decodes the JPEGs that it supports.
Pillow decodes everything else and decides what is broken. EXIF orientation is ignored.

The pixels depend on the bytes alone:

- Pillow's global switches are held at known values during decoding. Code that shares the process, such as a teacher's
  module, may set `ImageFile.LOAD_TRUNCATED_IMAGES`, and half a picture would then be labelled as a whole one.
- An animation is cut down to its first frame before Pillow sees it. Pillow applies a pixel limit of its own to the
  other frames of a GIF, and warns about a broken frame list of an animated PNG; neither concerns the first frame.

`decode_reduced` decodes a large JPEG at 1/2, 1/4 or 1/8 of its sides, for training on crops that stay larger than the
output. Its pixels differ from those of the whole image: docs/loader.md says by how much.
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
from ferkd_data.errors import ImageError, OutOfMemoryError
from ferkd_data.images.file_kinds import HEAD_BYTES, other_kind

DEFAULT_MAX_PIXELS = 89_478_485
"""Largest number of pixels decoded by default: Pillow's threshold for a decompression bomb, 256 MiB of RGB."""
DECODING_BYTES, DECODERS_BYTES = 24, 2**25
"""Bytes that decoding takes at most, for each pixel (21 were seen, for lossless WebP) and besides."""
ANY_SIZE = 65_535**2
"""The format's own limit, for reading a header alone: nothing is decoded."""
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
NO_SIZE = "not identified by this driver"
"""Pillow's message for a header that it understands, but whose width or height is 0."""
JPEG_START = b"\xff\xd8\xff"
JPEG_FRAME = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]")
"""The marker before a JPEG's size; a file without one is truncated."""
CONVERTED = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's pixel modes with at most 8 bits per channel, which `convert("RGB")` converts faithfully."""


DIVISORS = (8, 4, 2)
"""Reductions that libjpeg-turbo's inverse DCT does cheaply, the largest first."""
MARGIN = 2
"""Least ratio of a reduced crop's sides to the output's sides. With 1, levels differ about twice as much
(docs/decisions.md)."""
GIF_HEADER_BYTES = 13
PNG_SIGNATURE_BYTES = 8
ANIMATION_CHUNKS = (b"acTL", b"fcTL", b"fdAT")


class _PlainJpeg(JpegImageFile):
    """Read a JPEG without its EXIF data.

    Pillow reads EXIF only for the resolution, and warns where it is broken. Pillow's own factory also looks for further
    pictures behind the first one (MPO), and warns where their list is broken.
    """

    def getexif(self) -> Image.Exif:
        return Image.Exif()


# Not looked up in Pillow's registry, where any module may replace these readers by its own.
READERS: dict[str, tuple[bytes, type[ImageFile.ImageFile]]] = {
    "JPEG": (JPEG_START, _PlainJpeg),
    "PNG": (b"\x89PNG\r\n\x1a\n", PngImageFile),
    "WEBP": (b"RIFF", WebPImageFile),
    "GIF": (b"GIF8", GifImageFile),
    "BMP": (b"BM", BmpImageFile),
}
"""Format -> (first bytes, Pillow's class that reads it)."""


def decode_rgb(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode to pixels (H, W, 3) uint8, C-contiguous and writable.

    Raises ImageError, with one of `images.REJECT_REASONS`, for bytes that are no whole image of a supported format, and
    for more than `max_pixels` pixels. Raises OutOfMemoryError where the host has no memory for the pixels: no fault of
    the image, which a build must not reject for it.
    """
    try:
        return _decode(data, max_pixels)
    except MemoryError:
        pass
    except ImageError as error:
        # Decoders that get no memory may say that the data are broken.
        if error.reason != "corrupt":
            raise
    # Below the block, where what the failed attempt holds is free.
    _check_memory(data)
    try:
        return _decode(data, max_pixels)
    except MemoryError as error:
        raise ImageError("corrupt", "asks for more memory than its pixels take") from error


def _check_memory(data: bytes) -> None:
    """Raise OutOfMemoryError unless the host has the memory that decoding takes."""
    what = "an image"
    try:
        height, width = _claimed_size(data)
        what = f"an image of {width}x{height} pixels"
        np.empty(DECODING_BYTES * height * width + DECODERS_BYTES, np.uint8)
    except MemoryError as error:
        raise OutOfMemoryError(
            f"too little memory to decode {what}; use fewer threads or workers, or raise the limit (ulimit -v)"
        ) from error


def _claimed_size(data: bytes) -> tuple[int, int]:
    """Return the (height, width) that the header claims; (1, 1) where it is unreadable."""
    if data[8:15] == b"WEBPVP8":
        # Pillow's reader of this header takes the memory for the pixels.
        return _webp_size(data)
    try:
        return image_size(data)
    except ImageError:
        return 1, 1


def _webp_size(data: bytes) -> tuple[int, int]:
    """Read the size of a WebP file's canvas, of its lossless or its lossy picture (WebP container specification)."""
    kind, body = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        width, height = (int.from_bytes(body[at : at + 3], "little") + 1 for at in (4, 7))
    elif kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(body[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    return height, width


def _decode(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8]:
    if data.startswith(JPEG_START):
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            return pixels
    with hold_pillow_globals(), _opened(data, max_pixels) as image:
        try:
            image.load()
            return _rgb(image)
        except (OSError, ValueError, SyntaxError, IndexError, EOFError) as error:
            reason = "truncated" if "truncated" in str(error) else "corrupt"
            raise ImageError(reason, str(error) or type(error).__name__) from error


def decode_reduced(data: bytes, divisor: int) -> npt.NDArray[np.uint8] | None:
    """Decode a JPEG at 1/`divisor` (2, 4 or 8) of its sides, rounded up: (ceil(H / d), ceil(W / d), 3) uint8.

    libjpeg-turbo reduces within the inverse DCT, at a fraction of the cost of a full decode. Returns None for an image
    that only `decode_rgb` decodes.
    """
    # No limit of pixels: a build has accepted this image with its own, and what is decoded here is smaller.
    size = jpeg_size(data, 2**32) if data.startswith(JPEG_START) else None
    if size is None:
        return None
    height, width = -(-size[0] // divisor), -(-size[1] // divisor)
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    # simplejpeg takes the sides as a lower bound, and may not find a reduction that gives exactly these.
    return pixels if pixels.shape[:2] == (height, width) else None


def image_size(data: bytes, *, max_pixels: int = ANY_SIZE) -> tuple[int, int]:
    """Read (height, width) from the header, without decoding. Raises ImageError as `decode_rgb` does."""
    if data.startswith(JPEG_START):
        size = jpeg_size(data, max_pixels)
        if size is not None:
            return size
    with hold_pillow_globals(), _opened(data, max_pixels) as image:
        return image.height, image.width


def image_extension(data: bytes) -> str:
    """Name the file extension of the format, such as `jpg`. Raises ImageError."""
    if data.startswith(JPEG_START):
        return "jpg"
    with hold_pillow_globals(), _opened(data, max_pixels=None) as image:
        return EXTENSIONS[str(image.format)]


def _rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Convert a loaded image to RGB. Raises ImageError for a pixel mode without a faithful conversion."""
    if image.mode.startswith("I"):
        return _high_bytes(image)
    if image.mode not in CONVERTED:
        raise ImageError("unsupported_format", f"a {image.format} file with pixels of mode {image.mode}")
    if image.mode == "P":
        # Pillow would warn that RGB cannot hold the transparency; the pixels are the same without it.
        image.info.pop("transparency", None)
    return np.array(image.convert("RGB"))


def _high_bytes(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Convert 16-bit grey to its high byte, as Pillow does with 16-bit RGB.

    `convert` would clip every value above 255 to white. Pillow before 11.3 opens the same files with 32 bits (mode I).
    """
    if image.format != "PNG":
        raise ImageError("unsupported_format", f"a {image.format} file with pixels of mode {image.mode}")
    grey: npt.NDArray[np.uint8] = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _decode_jpeg(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8] | None:
    """Decode with simplejpeg. Returns None where Pillow has to decode, or to say what is broken."""
    if jpeg_size(data, max_pixels) is None:
        return None
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return pixels


def jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Read (height, width) of a JPEG that simplejpeg decodes; None for one that is left to Pillow.

    Raises ImageError for a size beyond the limits.
    """
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # CMYK and others are left to Pillow, whose conversion to RGB is the reference.
    if colorspace not in ("YCbCr", "Gray"):
        return None
    _check(height, width, max_pixels)
    return height, width


def _opened(data: bytes, max_pixels: int | None) -> Image.Image:
    """Parse the header. Raises ImageError.

    Pillow's readers are tried one by one, because `Image.open` has a pixel limit of its own.
    """
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
        # RIFF alone may also be sound or video.
        if not data.startswith(magic) or (name == "WEBP" and data[8:15] != b"WEBPVP8"):
            continue
        try:
            return reader(io.BytesIO(_first_picture(name, data)), "")
        except (OSError, ValueError, SyntaxError, IndexError, EOFError, TypeError, struct.error) as error:
            if str(error) == NO_SIZE and (name != "JPEG" or JPEG_FRAME.search(data)):
                raise ImageError("zero_sized", f"a {name} file whose header gives no size") from error
            # Readers call a header that ends too early anything; a file of this length has hardly more than a header.
            reason = "truncated" if len(data) < 1024 or "truncated" in str(error) else "corrupt"
            raise ImageError(reason, f"starts like a {name} file, but: {error}") from error
    known = other_kind(data[:HEAD_BYTES])
    if known:
        raise ImageError(
            "unsupported_format", f"the format {known}, which is not read here; convert it to JPEG, PNG or WebP"
        )
    raise ImageError("not_an_image", f"no image format known here (first bytes {data[:8]!r})")


def _first_picture(name: str, data: bytes) -> bytes:
    if name == "GIF":
        return first_gif_frame(data)
    return still_png(data) if name == "PNG" else data


def _check(height: int, width: int, max_pixels: int | None) -> None:
    check_size(height, width)
    if max_pixels is not None and height * width > max_pixels:
        raise ImageError("pixel_bomb", f"{width}x{height} pixels is more than the limit of {max_pixels}")


def divisor_for(boxes_N4: npt.NDArray[np.uint16], size: int) -> int:
    """Choose the largest divisor that leaves every box at least MARGIN * `size` pixels along each side; 1 for none.

    >>> divisor_for(np.array([[0, 0, 900, 1800]], np.uint16), 224)
    2
    """
    smallest = int(boxes_N4[:, 2:].min())
    return next((divisor for divisor in DIVISORS if smallest >= divisor * MARGIN * size), 1)


def reduced_crops(crops: Crops, divisor: int, height: int, width: int) -> Crops:
    """Map crops to an image of `height` x `width` pixels that was reduced by `divisor`; edges to the nearest pixel."""
    boxes = crops.boxes.astype(np.int64)
    # Edges are rounded, not sides, so that boxes that touch still do.
    start = np.rint(boxes[:, :2] / divisor).astype(np.int64)
    end = np.minimum(np.rint((boxes[:, :2] + boxes[:, 2:]) / divisor).astype(np.int64), [height, width])
    return replace(crops, boxes=np.concatenate([start, end - start], axis=1).astype(np.uint16))


HELD: tuple[tuple[Any, str, Any], ...] = (
    (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
    # `decode_rgb` checks the size itself, before anything is decoded.
    (Image, "MAX_IMAGE_PIXELS", None),
    # Pillow's defaults from here on.
    (PngImagePlugin, "MAX_TEXT_CHUNK", 2**20),
    (PngImagePlugin, "MAX_TEXT_MEMORY", 2**26),
    (GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_AFTER_FIRST),
)
"""Pillow's global switches and the values that they have during decoding: (module, name, value)."""

# Guards _users and _saved. Decoding threads share the held values: the first one in sets them, the last one out
# restores what it found. So the rest of the process keeps its own values, and no thread undoes another's.
_lock = threading.Lock()
_users = 0
_saved: tuple[Any, ...] = ()


@contextmanager
def hold_pillow_globals() -> Iterator[None]:
    """Hold the values in HELD until the context ends; any number of threads may be inside."""
    global _users, _saved
    with _lock:
        # Found by the first thread that enters, not at import: the program may have set its own since.
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


def first_gif_frame(data: bytes) -> bytes:
    """Cut a GIF down to its first frame: grow the screen to hold it, and drop the rule for disposing of it.

    Malformed bytes are left for the decoder to refuse. Raises ImageError for a side of 0 or above 65,535.
    """
    if len(data) < GIF_HEADER_BYTES:
        return data
    patched = bytearray(data)
    flags = data[10]
    # A global colour table of 2^(n+1) entries of 3 bytes follows the header where bit 7 of the flags is set.
    at = GIF_HEADER_BYTES + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while at < len(data):
        if data[at] == ord("!"):
            if data[at + 1 : at + 2] == b"\xf9" and len(data) > at + 3:
                patched[at + 3] &= ~0x1C & 0xFF  # clears the disposal method, bits 2 to 4
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
    """Find the offset behind a chain of GIF sub-blocks: each is a length byte and its bytes, the last one is empty."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


def still_png(data: bytes) -> bytes:
    """Drop the animation chunks of a PNG; its default image, usually the first frame, remains."""
    if b"acTL" not in data:
        return data
    kept, at = [data[:PNG_SIGNATURE_BYTES]], PNG_SIGNATURE_BYTES
    while at < len(data):
        # A chunk is its length (4 bytes, big-endian), its type (4), its data and a checksum (4).
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in ANIMATION_CHUNKS:
            # A length that leads beyond the file keeps what is there, which the decoder then refuses.
            kept.append(data[at:end])
        at = end
    return b"".join(kept)
