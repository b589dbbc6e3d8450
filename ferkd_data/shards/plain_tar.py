"""Tars just as `webdataset.Writer` makes them, read without a Python object for each member.

tarfile takes 40 us for a member, which is as long as hashing 50 KB. Here the headers are compared as one array: all of
them must be alike but for name, size and checksum. Whatever is the least bit different is left to `webdataset.scan`,
which knows every rule and every error.

Legend: R images, N crops per image, k kept classes, M members.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import ImageError, ShardError
from ferkd_data.images.decode import DEFAULT_MAX_PIXELS, JPEG_START, image_size, jpeg_size
from ferkd_data.shards import webdataset
from ferkd_data.shards.columns import CROP_FIELDS, DIGEST_BYTES, UNKNOWN_TARGET, ShardLabels
from ferkd_data.storage import image_digest

BLOCK, NAME, NAME_BYTES = tarfile.BLOCKSIZE, slice(0, 100), 100
OWNERS, SIZE, SIZE_END, TIME = slice(100, 124), slice(124, 135), 135, slice(136, 148)
CHECKSUM, CHECKSUM_BYTES, REST, PREFIX = slice(148, 154), slice(148, 156), slice(156, BLOCK), slice(345, BLOCK)
REGULAR = b"0"
END = bytes(BLOCK)
SAMPLE = re.compile(r"^((?:[\w-]+/)*[\w-]+)\.(?:(cls)\n\1\.)?crops\.npy\n\1\.(?!cls\n)\w+\n", re.ASCII | re.MULTILINE)
"""The members of one sample, a name to a line, in the order in which webdataset writes them."""
CROPS_END = f".{webdataset.CROPS_SUFFIX}\0".encode()
TARGET = re.compile(rb"[0-9]{1,9}")
"""Larger targets than 9 digits are left to `webdataset.scan`."""
NO_DIGEST = bytes(DIGEST_BYTES)
START_BYTES, WINDOW_BYTES = 2048, 3 * 2**12
"""Of an image: most JPEGs say their size before. Of a sample: more than its records and their headers."""


Read = Callable[[int, int], bytes]
"""Bytes of the tar by offset and length."""


@dataclass(frozen=True, kw_only=True)
class _Members:
    names: str
    """Each with a line feed behind it."""
    places: list[tuple[int, int]]
    """(M,) of offset and size of their contents."""
    starts: list[bytes]
    """(M,) of crop records the whole content; of others, what is needed to begin with."""


def read_labels(read: Read, *, num_crops: int, top_k: int, index_dtype: Any, digests: bool) -> ShardLabels | None:
    """The rows of a tar, as views of its records; None where `webdataset.read_rows` is to decide.

    Without `digests`, those of the images are not computed and left 0.
    """
    try:
        members = _walk(read)
        return None if members is None else _labels(read, members, (num_crops, top_k), index_dtype, digests)
    except (ImageError, ShardError, OSError, ValueError):
        # Found again there, and explained.
        return None


def _walk(read: Read) -> _Members | None:
    """From header to header; a read brings the next headers along with what is needed."""
    headers, places, starts = [], [], []
    at = window_at = 0
    window = b""
    while True:
        header = window[at - window_at : at - window_at + BLOCK]
        if len(header) < BLOCK:
            window, window_at = read(at, WINDOW_BYTES), at
            header = window[:BLOCK]
        if header == END:
            break
        size = int(header[SIZE], 8)
        needed = size if CROPS_END in header else min(size, START_BYTES)
        if size < 0 or needed > webdataset.MAX_CROPS_BYTES:
            return None
        at += BLOCK
        start = window[at - window_at : at - window_at + needed]
        headers.append(header)
        places.append((at, size))
        starts.append(start if len(start) == needed else read(at, needed))
        at += -(-size // BLOCK) * BLOCK
    names = _names(headers) if headers else None
    return None if names is None else _Members(names=names, places=places, starts=starts)


def _names(headers: list[bytes]) -> str | None:
    """The names, or None for headers of which tarfile might think otherwise."""
    try:
        first = tarfile.TarInfo.frombuf(headers[0], "utf-8", "strict")
    except (tarfile.HeaderError, ValueError):
        return None
    table = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    alike = all((table[:, part] == table[0, part]).all() for part in (OWNERS, TIME, REST))
    if not alike or first.type != REGULAR or first.linkname or table[0, PREFIX].any():
        return None
    digits = table[:, SIZE]
    if ((digits < ord("0")) | (digits > ord("7"))).any() or table[:, SIZE_END].any() or not _checksums_hold(table):
        return None
    names = np.ascontiguousarray(table[:, NAME]).view(f"S{NAME_BYTES}")[:, 0].tolist()
    text = b"\n".join(names)
    if not text.isascii() or b"\0" in text or text.count(b"\n") != len(names) - 1:
        return None
    return text.decode() + "\n"


def _checksums_hold(table: npt.NDArray[np.uint8]) -> bool:
    digits = table[:, CHECKSUM].astype(np.int64) - ord("0")
    if ((digits < 0) | (digits > 7)).any():
        return False
    stored = digits @ (8 ** np.arange(digits.shape[1])[::-1])
    total = table.sum(axis=1, dtype=np.int64) - table[:, CHECKSUM_BYTES].sum(axis=1, dtype=np.int64)
    blanks = (CHECKSUM_BYTES.stop - CHECKSUM_BYTES.start) * ord(" ")
    return bool((stored == total + blanks).all())


def _labels(
    read: Read, members: _Members, shape: tuple[int, int], index_dtype: Any, digests: bool
) -> ShardLabels | None:
    samples = SAMPLE.findall(members.names)
    keys = [key for key, _ in samples]
    ends = list(accumulate(3 if cls else 2 for _, cls in samples))
    if not keys or ends[-1] != len(members.places) or len(set(keys)) != len(keys):
        return None
    records = _records([members.starts[end - 2] for end in ends], shape, index_dtype)
    texts = [members.starts[end - 3] if cls else None for end, (_, cls) in zip(ends, samples, strict=True)]
    if records is None or not all(text is None or TARGET.fullmatch(text) for text in texts):
        return None
    images = [members.places[end - 1] for end in ends]
    sizes = [_image_size(read, *members.places[end - 1], members.starts[end - 1]) for end in ends]
    hashed = (image_digest(read(*place)) for place in images) if digests else (NO_DIGEST for _ in images)
    heights, widths = np.array(sizes, np.uint16).T
    return ShardLabels(
        keys=keys,
        image_digest=np.frombuffer(b"".join(hashed), np.uint8).reshape(len(keys), DIGEST_BYTES),
        height=heights,
        width=widths,
        target=np.array([UNKNOWN_TARGET if text is None else int(text) for text in texts], np.int32),
        **{name: records[name] for name in CROP_FIELDS},
    )


def _records(contents: list[bytes], shape: tuple[int, int], index_dtype: Any) -> npt.NDArray[np.void] | None:
    """(R, N) crop records, their box as one field; None unless all have the header and the size of the first."""
    num_crops, top_k = shape
    dtype = webdataset.record_dtype(top_k, index_dtype)
    first = webdataset.parse_npy(contents[0], "")
    size = len(contents[0])
    header = contents[0][: size - first.nbytes]
    if first.dtype != dtype or len(first) != num_crops:
        return None
    if not all(len(content) == size and content.startswith(header) for content in contents):
        return None
    others = [(name, dtype[name]) for name in (dtype.names or ())[4:]]
    crops = np.dtype([("boxes", "<u2", (4,)), *others])
    whole = np.dtype([("header", np.void, len(header)), ("crops", crops, (num_crops,))])
    records: npt.NDArray[np.void] = np.frombuffer(b"".join(contents), whole)["crops"]
    return records


def _image_size(read: Read, at: int, size: int, start: bytes) -> tuple[int, int]:
    """As `image_size` of the whole image: a JPEG's first bytes say the same, or nothing."""
    found = jpeg_size(start, DEFAULT_MAX_PIXELS) if start.startswith(JPEG_START) else None
    return found or image_size(read(at, size))
