"""Tars just as `webdataset.Writer` makes them, read without a Python object for each member.

tarfile takes 40 us for a member, which is as long as hashing 50 KB. Here the headers are compared as one array: all of
them must be alike but for name, size and checksum. Whatever is the least bit different is left to `webdataset.scan`,
which knows every rule and every error.

Legend: R images, N crops per image, k kept classes, M members.
"""

from __future__ import annotations

import mmap
import re
import tarfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import ImageError, ShardError
from ferkd_data.images.decode import image_size
from ferkd_data.shards import webdataset
from ferkd_data.shards.columns import CROP_FIELDS, DIGEST_BYTES, UNKNOWN_TARGET, ShardLabels
from ferkd_data.storage import OpenFile, image_digest

BLOCK, NAME, NAME_BYTES = tarfile.BLOCKSIZE, slice(0, 100), 100
OWNERS, SIZE, SIZE_END, TIME = slice(100, 124), slice(124, 135), 135, slice(136, 148)
CHECKSUM, CHECKSUM_BYTES, REST, PREFIX = slice(148, 154), slice(148, 156), slice(156, BLOCK), slice(345, BLOCK)
REGULAR = b"0"
END = bytes(BLOCK)
SAMPLE = re.compile(r"^((?:[\w-]+/)*[\w-]+)\.(?:(cls)\n\1\.)?crops\.npy\n\1\.(?!cls\n)\w+\n", re.ASCII | re.MULTILINE)
"""The members of one sample, a name to a line, in the order in which webdataset writes them."""
TARGET_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Members:
    names: str
    """Each with a line feed behind it."""
    offsets: list[int]
    """(M,) of their contents."""
    sizes: list[int]
    """(M,)"""


def read_labels(path: Path, *, num_crops: int, top_k: int, index_dtype: Any, digests: bool) -> ShardLabels | None:
    """The rows of a tar, as views of its records; None where `webdataset.read_rows` is to decide.

    Without `digests`, those of the images are not computed and left 0.
    """
    try:
        with OpenFile(path) as file:
            data = file.map()
    except (OSError, ValueError):
        return None
    members = plain_members(data)
    return None if members is None else _labels(data, members, (num_crops, top_k), index_dtype, digests)


def plain_members(data: mmap.mmap) -> Members | None:
    headers: list[bytes] = []
    offsets: list[int] = []
    sizes: list[int] = []
    at = 0
    while (header := data[at : at + BLOCK]) != END:
        digits = header[SIZE]
        if not digits.isdigit():
            return None
        try:
            size = int(digits, 8)
        except ValueError:
            return None
        headers.append(header)
        offsets.append(at + BLOCK)
        sizes.append(size)
        at += BLOCK + -(-size // BLOCK) * BLOCK
    names = _names(headers) if headers else None
    return None if names is None else Members(names=names, offsets=offsets, sizes=sizes)


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
    if (table[:, SIZE_END] != 0).any() or not _checksums_hold(table):
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
    data: mmap.mmap, members: Members, shape: tuple[int, int], index_dtype: Any, digests: bool
) -> ShardLabels | None:
    samples = SAMPLE.findall(members.names)
    keys = [key for key, _ in samples]
    ends = list(accumulate(3 if cls else 2 for _, cls in samples))
    if not keys or ends[-1] != len(members.sizes) or len(set(keys)) != len(keys):
        return None
    view = memoryview(data)
    offsets, sizes = members.offsets, members.sizes
    images = [view[offsets[end - 1] : offsets[end - 1] + sizes[end - 1]] for end in ends]
    records = _records(view, [(offsets[end - 2], sizes[end - 2]) for end in ends], shape, index_dtype)
    texts = [
        data[offsets[end - 3] : offsets[end - 3] + min(sizes[end - 3], TARGET_BYTES)] if cls else None
        for end, (_, cls) in zip(ends, samples, strict=True)
    ]
    if records is None or not all(text is None or text.isdigit() for text in texts):
        return None
    targets = [UNKNOWN_TARGET if text is None else int(text) for text in texts]
    try:
        image_sizes = np.array([image_size(image) for image in images], np.uint16)
    except ImageError:
        return None
    if max(targets) > np.iinfo(np.int32).max:
        return None
    digest = b"".join(map(image_digest, images)) if digests else bytes(DIGEST_BYTES * len(keys))
    return ShardLabels(
        keys=keys,
        image_digest=np.frombuffer(digest, np.uint8).reshape(len(keys), DIGEST_BYTES),
        height=image_sizes[:, 0],
        width=image_sizes[:, 1],
        target=np.array(targets, np.int32),
        **{name: records[name] for name in CROP_FIELDS},
    )


def _records(
    view: memoryview, places: list[tuple[int, int]], shape: tuple[int, int], index_dtype: Any
) -> npt.NDArray[np.void] | None:
    """(R, N) crop records with their box as one field; None unless all have the header of the first."""
    num_crops, top_k = shape
    start, size = places[0]
    if size > webdataset.MAX_CROPS_BYTES or any(other != size for _, other in places):
        return None
    dtype = webdataset.record_dtype(top_k, index_dtype)
    try:
        first = webdataset.parse_npy(bytes(view[start : start + size]), "")
    except ShardError:
        return None
    header = size - first.nbytes
    if first.dtype != dtype or len(first) != num_crops:
        return None
    if b"".join(view[at : at + header] for at, _ in places) != bytes(view[start : start + header]) * len(places):
        return None
    body = b"".join(view[at + header : at + size] for at, _ in places)
    others = (dtype.names or ())[4:]
    whole_box = np.dtype([("boxes", "<u2", (4,)), *((name, dtype[name]) for name in others)])
    return np.frombuffer(body, whole_box).reshape(len(places), num_crops)
