"""Encoded bytes to RGB pixels, exactly as Pillow's `convert("RGB")` gives them.

JPEGs go through simplejpeg (libjpeg-turbo without Pillow's overhead) where it can take them; Pillow decodes the rest
and has the last word on what is broken. EXIF orientation is ignored.
"""

from __future__ import annotations

import io
import re
import struct

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from ferkd_data.crops import check_size
from ferkd_data.errors import ImageError
from ferkd_data.images.animation import first_gif_frame, still_png

DEFAULT_MAX_PIXELS = 89_478_485
"""Pillow's own threshold for a decompression bomb: 256 MiB of RGB."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
NO_SIZE = "not identified by this driver"
"""What Pillow says of a header that it understands, but whose width or height is 0."""
JPEG_START = b"\xff\xd8\xff"
JPEG_FRAME = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]")
"""The marker before a JPEG's size; a file without one ended too early."""
OTHER_FORMATS = (
    ("TIFF", 0, b"II*\0"),
    ("TIFF", 0, b"MM\0*"),
    ("AVIF", 4, b"ftypavi"),
    ("HEIF", 4, b"ftyphe"),
    ("HEIF", 4, b"ftypmif1"),
    ("JPEG 2000", 4, b"jP  "),
    ("JPEG 2000", 0, b"\xff\x4f\xff\x51"),
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 4, b"JXL "),
    *(("PNM", 0, b"P%d" % kind + space) for kind in range(1, 7) for space in (b"\n", b" ")),
)
"""(name, offset of its first bytes, the bytes): what people have in image folders and we do not decode."""


class _PlainJpeg(JpegImageFile):
    """Without EXIF, which Pillow reads for its resolution only, warning of what is broken in it."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


PLAIN: dict[str, type[JpegImageFile]] = {"JPEG": _PlainJpeg}
"""In place of Pillow's own, which looks for more pictures behind the first (MPO) and warns of a broken list of them."""


def decode_rgb(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Pixels (H, W, 3) uint8, C-contiguous and writable. Raises ImageError with one of `images.REASONS`."""
    if data.startswith(JPEG_START):
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            return pixels
    with _opened(data, max_pixels) as image:
        try:
            image.load()
            if image.mode == "P":
                # Pillow would warn that RGB has no room for it; the pixels are the same without.
                image.info.pop("transparency", None)
            return np.array(image.convert("RGB"))
        except (
            OSError,
            ValueError,
            SyntaxError,
            IndexError,
            EOFError,
            MemoryError,
            Image.DecompressionBombError,
        ) as error:
            reason = "truncated" if "truncated" in str(error) else "corrupt"
            raise ImageError(reason, str(error) or type(error).__name__) from error


def image_size(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """(height, width) from the header alone. Raises ImageError as `decode_rgb` does."""
    if data.startswith(JPEG_START):
        size = jpeg_size(data, max_pixels)
        if size is not None:
            return size
    with _opened(data, max_pixels) as image:
        return image.height, image.width


def image_extension(data: bytes) -> str:
    """The file name extension of the format, such as `jpg`. Raises ImageError."""
    if data.startswith(JPEG_START):
        return "jpg"
    with _opened(data, max_pixels=None) as image:
        return EXTENSIONS[str(image.format)]


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
    Image.preinit()
    if "WEBP" not in Image.OPEN:
        Image.init()
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(data[:16]) is not True:
            continue
        try:
            return PLAIN.get(name, factory)(io.BytesIO(_first_picture(name, data)), "")
        except (OSError, ValueError, SyntaxError, IndexError, EOFError, TypeError, struct.error) as error:
            if accept is None:
                continue
            if str(error) == NO_SIZE and (name != "JPEG" or JPEG_FRAME.search(data)):
                raise ImageError("zero_sized", f"a {name} file whose header gives no size") from error
            reason = "truncated" if len(data) < 1024 or "truncated" in str(error) else "corrupt"
            raise ImageError(reason, f"starts like a {name} file, but: {error}") from error
    known = next((kind for kind, offset, magic in OTHER_FORMATS if data.startswith(magic, offset)), None)
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
