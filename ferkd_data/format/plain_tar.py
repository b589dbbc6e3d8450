"""Read tars that are just as `webdataset.Writer` makes them, without a Python object for each member.

tarfile takes 40 us for a member, as long as hashing 50 KB. Here the headers are compared as one array: all of them must
be alike but for name, size and checksum. Anything else is left to `webdataset.scan`, which knows every rule and every
error; so this module decides nothing, it only saves time (benchmarks/plain_tars.py: `verify` takes a quarter).

Legend: R images, N crops per image, k kept classes, M members, B bytes.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import ImageError, ShardError
from ferkd_data.format import crop_arrays
from ferkd_data.images.decode import ANY_SIZE, JPEG_START, image_size, jpeg_size
from ferkd_data.labels.rows import DIGEST_BYTES, UNKNOWN_TARGET, ShardLabels
from ferkd_data.storage import image_digest

# The header of POSIX: name, mode and owners, size as 11 octal digits and an end, time, checksum as 6 digits and an end,
# then type, link name and the rest.
BLOCK, NAME, NAME_BYTES = tarfile.BLOCKSIZE, slice(0, 100), 100
OWNERS, SIZE, SIZE_END, TIME = slice(100, 124), slice(124, 135), 135, slice(136, 148)
CHECKSUM, CHECKSUM_END, CHECKSUM_BYTES = slice(148, 154), slice(154, 156), slice(148, 156)
REST, PREFIX = slice(156, BLOCK), slice(345, BLOCK)
REGULAR = b"0"
END = bytes(BLOCK)
ARRAYS = "".join(rf"{re.escape(suffix)}\n\1\." for suffix in crop_arrays.SUFFIXES)
SAMPLE = re.compile(rf"^((?:[\w-]+/)*[\w-]+)\.(?:(cls)\n\1\.)?{ARRAYS}(?!cls\n)\w+\n", re.ASCII | re.MULTILINE)
"""The members of one sample, one name a line, in the order in which `webdataset.Writer` writes them."""
TARGET_END, TARGET_BYTES = b".cls\0", 10
"""Targets of more than 9 digits are left to `webdataset.scan`."""
NO_DIGEST = bytes(DIGEST_BYTES)
START_BYTES = 1024
"""Bytes of an image that are read: most JPEGs state their size within these."""

Read = Callable[[int, int], bytes]
"""Bytes of the tar by offset and length."""


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Positions of the members within a sample, the same for all samples of a tar."""

    has_target: bool
    arrays: tuple[tuple[int, int], ...]
    """The label members: bytes from the sample's start to their content, and their size."""
    image_at: int

    @property
    def headers_at(self) -> list[int]:
        contents = [*(at for at, _ in self.arrays), self.image_at]
        return [*([0] if self.has_target else []), *(at - BLOCK for at in contents)]


@dataclass(frozen=True, kw_only=True)
class _Samples:
    shape: _Shape
    table: npt.NDArray[np.uint8]
    """(R, B): the first bytes of each sample, up to START_BYTES of its image."""
    images: list[tuple[int, int]]
    """(R,) of offset and size."""


def read_labels(read: Read, *, num_crops: int, top_k: int, index_dtype: Any, digests: bool) -> ShardLabels | None:
    """Read the rows of a tar, as views of its arrays where possible; None where `webdataset.read_rows` is to decide.

    Without `digests`, those of the images are not computed and left 0.
    """
    try:
        samples = _walk(read)
        return None if samples is None else _labels(read, samples, (num_crops, top_k), index_dtype, digests)
    except (ImageError, ShardError, OSError, ValueError):
        # `webdataset.read_rows` meets the same fault and explains it.
        return None


def _walk(read: Read) -> _Samples | None:
    """Read the start of each sample, one after the other."""
    shape = _shape(read)
    if shape is None:
        return None
    size_at, size_end = shape.image_at - BLOCK + SIZE.start, shape.image_at - BLOCK + SIZE.stop
    length = shape.image_at + START_BYTES
    starts, images = [], []
    at = 0
    # One read for each sample gets all its labels and the start of its image. At a truncated end the size is no number,
    # which raises ValueError, and the tar is left to the other reader.
    while (start := read(at, length))[:BLOCK] != END:
        size = int(start[size_at:size_end], 8)
        if size < 0:
            return None
        starts.append(start if len(start) == length else start.ljust(length, b"\0"))
        images.append((at + shape.image_at, size))
        at += shape.image_at + _padded(size)
    table = np.frombuffer(b"".join(starts), np.uint8).reshape(-1, length)
    return _Samples(shape=shape, table=table, images=images)


def _shape(read: Read) -> _Shape | None:
    """Return the positions in the first sample."""
    has_target = TARGET_END in read(0, BLOCK)[NAME]
    at = 2 * BLOCK if has_target else 0
    arrays = []
    for _ in crop_arrays.SUFFIXES:
        size = int(read(at, BLOCK)[SIZE], 8)
        if not 0 <= size <= crop_arrays.MAX_ARRAYS_BYTES - at:
            return None
        arrays.append((at + BLOCK, size))
        at += BLOCK + _padded(size)
    return _Shape(has_target=has_target, arrays=tuple(arrays), image_at=at + BLOCK)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _labels(
    read: Read, samples: _Samples, shape: tuple[int, int], index_dtype: Any, digests: bool
) -> ShardLabels | None:
    keys = _keys(samples)
    targets = _targets(samples)
    arrays = _arrays(samples, shape, index_dtype)
    fields = None if arrays is None else crop_arrays.to_fields(*arrays)
    if keys is None or targets is None or fields is None:
        return None
    starts = samples.table[:, samples.shape.image_at :]
    sizes = [_image_size(read, *image, start) for image, start in zip(samples.images, starts, strict=True)]
    hashed = (image_digest(read(*image)) if digests else NO_DIGEST for image in samples.images)
    heights, widths = np.array(sizes, np.uint16).T
    return ShardLabels(
        keys=keys,
        image_digest=np.frombuffer(b"".join(hashed), np.uint8).reshape(len(keys), DIGEST_BYTES),
        height=heights,
        width=widths,
        target=targets,
        **fields,
    )


def _keys(samples: _Samples) -> list[str] | None:
    """Return the keys (R,); None for headers that tarfile might read otherwise."""
    headers = np.stack([samples.table[:, at : at + BLOCK] for at in samples.shape.headers_at], axis=1)
    # All members of all samples as one table of headers.
    names = _names(headers.reshape(-1, BLOCK)) if len(headers) else None
    if names is None:
        return None
    found = SAMPLE.findall(names)
    keys = [key for key, _ in found]
    # A pattern that skipped something, such as a foreign member, has found fewer samples than there are.
    whole = len(found) == len(headers) and all(bool(target) == samples.shape.has_target for _, target in found)
    return keys if whole and len(set(keys)) == len(keys) else None


def _targets(samples: _Samples) -> npt.NDArray[np.int32] | None:
    if not samples.shape.has_target:
        return np.full(len(samples.table), UNKNOWN_TARGET, np.int32)
    sizes = _numbers(samples.table[:, SIZE])
    texts = np.ascontiguousarray(samples.table[:, BLOCK : BLOCK + TARGET_BYTES]).view(f"S{TARGET_BYTES}")[:, 0].tolist()
    fine = (sizes < TARGET_BYTES).all() and all(map(bytes.isdigit, texts))
    # The writer fills up with zeros behind a text.
    if not fine or [len(text) for text in texts] != sizes.tolist():
        return None
    return np.array([int(text) for text in texts], np.int32)


def _arrays(samples: _Samples, shape: tuple[int, int], index_dtype: Any) -> list[npt.NDArray[Any]] | None:
    """Return (R, N, ...) of each label member; None unless all have the label set's type and shape."""
    arrays = []
    expected = crop_arrays.shapes(*shape, index_dtype).values()
    for (at, size), (dtype, wanted) in zip(samples.shape.arrays, expected, strict=True):
        # One .npy header is parsed; all others have to be equal to it, byte by byte.
        first = crop_arrays.parse_npy(samples.table[0, at : at + size].tobytes(), "")
        if first.dtype != dtype or first.shape != wanted:
            return None
        values_at = at + size - first.nbytes
        # The size in the tar's header, and the .npy header.
        for part in (samples.table[:, at - BLOCK :][:, SIZE], samples.table[:, at:values_at]):
            if (part != part[0]).any():
                return None
        arrays.append(samples.table[:, values_at : at + size].view(dtype).reshape(-1, *wanted))
    return arrays


def _image_size(read: Read, at: int, size: int, start: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Return `image_size` of the whole image; a JPEG's first bytes give the same size, or none."""
    begins = start[:size].tobytes()
    found = jpeg_size(begins, ANY_SIZE) if begins.startswith(JPEG_START) else None
    return found or image_size(read(at, size))


def _names(table: npt.NDArray[np.uint8]) -> str | None:
    """Return the names in (M, 512) headers, one a line; None for headers that differ in anything else."""
    try:
        first = tarfile.TarInfo.frombuf(table[0].tobytes(), "utf-8", "strict")
    except tarfile.HeaderError:
        return None
    # The first header is tarfile's to judge. One that equals it but for name, size and checksum is judged the same.
    alike = all((table[:, part] == table[0, part]).all() for part in (OWNERS, TIME, CHECKSUM_END, REST))
    if not alike or first.type != REGULAR or first.linkname or table[0, PREFIX].any():
        return None
    # tarfile also takes blanks, signs and base 256 for a size; this reader knows digits alone.
    digits = table[:, SIZE]
    if ((digits < ord("0")) | (digits > ord("7"))).any() or table[:, SIZE_END].any() or not _checksums_hold(table):
        return None
    names = np.ascontiguousarray(table[:, NAME]).view(f"S{NAME_BYTES}")[:, 0].tolist()
    text = b"\n".join(names)
    if not text.isascii() or b"\0" in text or text.count(b"\n") != len(names) - 1:
        return None
    return text.decode() + "\n"


def _checksums_hold(table: npt.NDArray[np.uint8]) -> bool:
    digits = table[:, CHECKSUM]
    if ((digits < ord("0")) | (digits > ord("7"))).any():
        return False
    # A checksum is the sum of the header's bytes with blanks in place of the checksum itself.
    total = table.sum(axis=1, dtype=np.int64) - table[:, CHECKSUM_BYTES].sum(axis=1, dtype=np.int64)
    blanks = (CHECKSUM_BYTES.stop - CHECKSUM_BYTES.start) * ord(" ")
    return bool((_numbers(digits) == total + blanks).all())


def _numbers(digits: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return (M, D) octal digits as numbers (M,)."""
    # 11 octal digits have 33 bits.
    powers = 8 ** np.arange(digits.shape[1], dtype=np.int64)[::-1]
    numbers: npt.NDArray[np.int64] = (digits.astype(np.int64) - ord("0")) @ powers
    return numbers
