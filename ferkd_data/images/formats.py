"""Image formats by the first bytes of a file, and by the extensions that people give them."""

from __future__ import annotations

HEAD_BYTES = 32
"""Enough to tell every format here."""
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib")
"""Files with these names are taken for images without a look at them."""
UNSUPPORTED = (
    ".tif",
    ".tiff",
    ".heic",
    ".heif",
    ".hif",
    ".avif",
    ".jp2",
    ".j2k",
    ".jxl",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".svg",
    ".tga",
    ".psd",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".ico",
)
"""Images that are rejected, unless their first bytes are those of a format that is decoded."""
NO_IMAGES = (
    ".txt",
    ".json",
    ".jsonl",
    ".xml",
    ".csv",
    ".tsv",
    ".md",
    ".html",
    ".htm",
    ".yaml",
    ".yml",
    ".log",
    ".py",
    ".sh",
    ".pdf",
    ".npy",
    ".npz",
    ".mat",
    ".pt",
    ".pth",
    ".pkl",
    ".h5",
    ".tar",
    ".gz",
    ".tgz",
    ".zip",
    ".parquet",
    ".arrow",
    ".mp4",
    ".mov",
    ".avi",
    ".wav",
    ".mp3",
    ".cls",
)
"""Left out without a look at the bytes, so that annotations beside images cost no reading."""

_DECODED = (
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("GIF", 0, b"GIF87a"),
    ("GIF", 0, b"GIF89a"),
    ("WEBP", 8, b"WEBPVP8"),
)
_OTHERS = (
    ("TIFF", 0, b"II*\0"),
    ("TIFF", 0, b"MM\0*"),
    ("TIFF", 0, b"II+\0"),
    ("TIFF", 0, b"MM\0+"),
    ("AVIF", 4, b"ftypavi"),
    ("HEIF", 4, b"ftyphe"),
    ("HEIF", 4, b"ftypmif1"),
    ("HEIF", 4, b"ftypmsf1"),
    ("JPEG 2000", 4, b"jP  "),
    ("JPEG 2000", 0, b"\xff\x4f\xff\x51"),
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 4, b"JXL "),
    ("Photoshop", 0, b"8BPS"),
    *(("PNM", 0, b"P%d" % kind + space) for kind in range(1, 7) for space in (b"\n", b" ")),
)
"""(name, offset of its first bytes, the bytes)."""
_DIB_HEADERS = (12, 40, 52, 56, 64, 108, 124)
"""Sizes in bytes that the second header of a BMP file can have."""


def decoded_kind(head: bytes) -> str | None:
    """JPEG, PNG, GIF, WEBP or BMP for bytes that begin like one, else None. `head` has at least HEAD_BYTES, if any."""
    found = _match(head, _DECODED)
    if found or not head.startswith(b"BM"):
        return found
    # Two letters are too few: a text may begin with them.
    return "BMP" if int.from_bytes(head[14:18], "little") in _DIB_HEADERS else None


def other_kind(head: bytes) -> str | None:
    """The name of an image format that is not decoded here, such as `TIFF`, else None."""
    return _match(head, _OTHERS)


def _match(head: bytes, kinds: tuple[tuple[str, int, bytes], ...]) -> str | None:
    return next((kind for kind, offset, magic in kinds if head.startswith(magic, offset)), None)
