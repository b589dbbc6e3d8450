"""The labels of one image in a tar: four plain NumPy arrays, which `np.load`, webdataset and datasets read as they are.

`crops.npy` holds boxes, flips and buckets; `class_index.npy` and `class_prob.npy` the kept classes; `target_prob.npy`
the probability of the ground truth. Drafts of version 1 (before 2026-11-27) had one structured array, `crops.npy`,
which datasets cannot load; it is still read.

Legend: N crops per image, k kept classes.
"""

from __future__ import annotations

import io
import math
import threading
import tokenize
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data.augment.operations import BOX_WORDS, Operations, check_operations
from ferkd_data.errors import ShardError, UsageError
from ferkd_data.labels.rows import ImageLabels, to_float16

CROPS = "crops.npy"
SUFFIXES = (CROPS, "class_index.npy", "class_prob.npy", "target_prob.npy")
"""The members of a sample that hold labels, in the order in which they are written."""
OPERATIONS = "operations.npy"
"""A fifth member where crops have recorded augmentations: one row a crop, of codes, values and the erased box."""
CROPS_COLUMNS = ("top", "left", "height", "width", "flip", "bucket")
FLIP, BUCKET = 4, 5
INDEX_DTYPES = (np.dtype("<u2"), np.dtype("<u4"))
MAX_ARRAYS_BYTES = 256 * 2**20
"""Largest label members of a sample, checked before they are read; 500 crops at top-10 take 48 KB."""
MAX_HEADER_BYTES = 2**16
"""Bytes of a .npy header that are parsed; ours has 128, and more than this is a hostile literal."""

# Held while NumPy parses a header, by whichever thread of this process reads a tar (see `read_header`).
_HEADERS = threading.Lock()
NPY_ERRORS = (
    ValueError,
    EOFError,
    OSError,
    SyntaxError,
    TypeError,
    MemoryError,
    OverflowError,
    RecursionError,
    tokenize.TokenError,
)
"""Errors of NumPy for malformed headers."""

Fields = dict[str, npt.NDArray[Any]]
"""The fields of `ImageLabels` that have an axis N, by their names."""


def shapes(num_crops: int, top_k: int, index_dtype: Any) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return type and shape of each member; published in docs/format.md."""
    return {
        CROPS: (np.dtype("<u2"), (num_crops, len(CROPS_COLUMNS))),
        "class_index.npy": (np.dtype(index_dtype).newbyteorder("<"), (num_crops, top_k)),
        "class_prob.npy": (np.dtype("<f4"), (num_crops, top_k)),
        "target_prob.npy": (np.dtype("<f4"), (num_crops,)),
    }


def to_members(labels: ImageLabels) -> dict[str, bytes]:
    """Return the label members of a sample, in the order of `SUFFIXES`."""
    crops = np.column_stack([labels.boxes, labels.flip, labels.bucket])
    arrays = (crops, labels.class_index, labels.class_prob, labels.target_prob)
    num_crops, top_k = labels.class_index.shape
    described = shapes(num_crops, top_k, labels.class_index.dtype)
    members = {
        suffix: npy_bytes(array.astype(dtype))
        for (suffix, (dtype, _)), array in zip(described.items(), arrays, strict=True)
    }
    if labels.operations.shape[1]:
        members[OPERATIONS] = npy_bytes(_to_array(Operations.unpack(labels.operations)))
    return members


def _to_array(operations: Operations) -> npt.NDArray[np.int32]:
    """Return (N, 2A + 4): a crop's codes, then its values, then top, left, height and width of its erased box."""
    parts = (operations.codes, operations.values, operations.erase)
    return np.concatenate([part.astype("<i4") for part in parts], axis=1)


def _from_array(array: npt.NDArray[Any], num_crops: int, where: str) -> npt.NDArray[np.uint16]:
    """Return the packed operations (N, W) that `_to_array` wrote. Raises ShardError for any others."""
    slots, odd = divmod(array.shape[1] - BOX_WORDS, 2) if array.ndim == 2 else (0, 1)
    if odd or slots < 0 or len(array) != num_crops or array.dtype != np.dtype("<i4"):
        raise ShardError(f"{where}: is {array.dtype}{list(array.shape)}, expected int32[{num_crops}, 2 * A + 4]")
    codes, values, erase = array[:, :slots], array[:, slots : 2 * slots], array[:, 2 * slots :]
    operations = Operations(codes=codes.astype(np.uint8), values=values.astype(np.int16), erase=erase.astype(np.uint16))
    # Back and forth: the conversions above wrap, so an impossible number comes back as another one.
    if not np.array_equal(_to_array(operations), array):
        raise ShardError(f"{where}: holds numbers that no operation has")
    try:
        check_operations(operations)
    except UsageError as error:
        raise ShardError(f"{where}: {error}") from error
    return operations.pack()


def from_members(members: Mapping[str, bytes], where: str) -> Fields:
    """Read the labels of a sample from its members, never unpickling. Raises ShardError that begins with `where`.

    Example: `from_members({"crops.npy": b"...", "class_index.npy": b"...", ...}, "00000.tar: cat/1")["boxes"]`
    """
    # One label member, `crops.npy`: a draft of version 1. `webdataset._sample` has refused any other number.
    if len(members) == 1:
        return _from_draft(parse_npy(members[CROPS], f"{where}.{CROPS}"), f"{where}.{CROPS}")
    arrays = {suffix: parse_npy(content, f"{where}.{suffix}") for suffix, content in members.items()}
    index = arrays["class_index.npy"]
    num_crops, top_k = index.shape if index.ndim == 2 else (0, 0)
    # Any other type is compared with uint16 below, and named in the error.
    index_dtype = index.dtype if index.dtype in INDEX_DTYPES else INDEX_DTYPES[0]
    for suffix, (dtype, shape) in shapes(num_crops, top_k, index_dtype).items():
        if arrays[suffix].dtype != dtype or arrays[suffix].shape != shape:
            raise ShardError(
                f"{where}.{suffix}: is {arrays[suffix].dtype}{list(arrays[suffix].shape)}, "
                f"expected {dtype}{list(shape)}"
            )
    fields = to_fields(*(arrays[suffix] for suffix in SUFFIXES))
    if fields is None:
        raise ShardError(f"{where}.{CROPS}: a flip must be 0 or 1, and a bucket below 256")
    if OPERATIONS in arrays:
        fields["operations"] = _from_array(arrays[OPERATIONS], num_crops, f"{where}.{OPERATIONS}")
    return fields


def to_fields(
    crops: npt.NDArray[np.uint16],
    class_index: npt.NDArray[Any],
    class_prob: npt.NDArray[np.float32],
    target_prob: npt.NDArray[np.float32],
) -> Fields | None:
    """Turn arrays of the members' types, with any leading axes, into fields; None for an impossible flip or bucket."""
    flip, bucket = crops[..., FLIP], crops[..., BUCKET]
    if flip.max(initial=0) > 1 or bucket.max(initial=0) > np.iinfo(np.uint8).max:
        return None
    return {
        "boxes": crops[..., :FLIP],
        "flip": flip.astype(np.bool_),
        "bucket": bucket.astype(np.uint8),
        "class_index": class_index,
        "class_prob": to_float16(class_prob),
        "target_prob": to_float16(target_prob),
    }


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def parse_npy(data: bytes, where: str) -> npt.NDArray[Any]:
    """Return a view of the array in .npy bytes, never unpickling. Raises ShardError for anything else."""
    try:
        shape, dtype, start = read_header(data)
        array = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
    except NPY_ERRORS as error:
        raise ShardError(f"{where}: not a plain NumPy array ({error})") from error
    # Bytes behind the values would be copied from label set to label set, and seen by nobody.
    if start + array.nbytes != len(data):
        raise ShardError(f"{where}: not a plain NumPy array ({len(data) - start} bytes for {array.nbytes} of values)")
    return array


def read_header(data: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return (shape, type, offset of the values) of .npy bytes. Raises one of `NPY_ERRORS`."""
    # Magic number (6 bytes), version (2), then the header's length: 2 bytes in version 1.0, 4 in 2.0.
    width = 2 if data[6:7] == b"\x01" else 4
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    # NumPy parses a header with ast.literal_eval, which Python 3.11 cannot do in two threads at once.
    with _HEADERS:
        shape, dtype = _parse_header(data[: min(start, MAX_HEADER_BYTES)])
    if dtype.hasobject:
        raise ValueError("Python objects, which are never unpickled")
    return shape, dtype, start


@lru_cache(maxsize=64)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Parse a header; cached, since those of a label set are alike and parsing takes longer than reading the values."""
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version} of the .npy format")
    # NumPy writes such a file for a transposed array; as a view of the bytes it would be read crossed.
    if fortran and len(shape) > 1:
        raise ValueError("in Fortran's order")
    return shape, dtype


def draft_dtype(top_k: int, index_dtype: Any) -> np.dtype[np.void]:
    """Return the type of one crop in drafts of version 1: a packed record."""
    boxes = [(f"box_{side}", "<u2") for side in CROPS_COLUMNS[:FLIP]]
    index = ("class_index", np.dtype(index_dtype).newbyteorder("<"), (top_k,))
    return np.dtype(
        [*boxes, ("flip", "?"), ("bucket", "u1"), index, ("class_prob", "<f2", (top_k,)), ("target_prob", "<f2")]
    )


def _from_draft(records: npt.NDArray[Any], where: str) -> Fields:
    dtype = records.dtype
    if records.ndim != 1 or "class_index" not in (dtype.names or ()):
        raise ShardError(f"{where}: does not hold crop records, and the sample has no {', '.join(SUFFIXES[1:])}")
    index = dtype["class_index"]
    top_k = index.shape[0] if index.shape else 0
    if index.base not in INDEX_DTYPES or dtype != draft_dtype(top_k, index.base):
        raise ShardError(f"{where}: crop records are {dtype}, expected {draft_dtype(5, np.uint16)}")
    boxes = np.stack([records[f"box_{side}"] for side in CROPS_COLUMNS[:FLIP]], axis=1)
    names = ("flip", "bucket", "class_index", "class_prob", "target_prob")
    return {"boxes": boxes, **{name: records[name] for name in names}}
