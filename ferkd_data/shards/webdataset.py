"""Layout `webdataset`: the original images and their labels in the same tar, one sample per image.

`KEY.jpg` (the encoded bytes as they came, under the extension of their format), `KEY.cls` (absent where the target
is unknown) and `KEY.crops.npy` (N records of `record_dtype`). The stock webdataset library reads it.
"""

from __future__ import annotations

import io
import math
import tarfile
import threading
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset

from ferkd_data.errors import ImageError, ShardError
from ferkd_data.images.decode import image_extension, image_size
from ferkd_data.shards.columns import UNKNOWN_TARGET, ImageLabels
from ferkd_data.storage import image_digest

CROPS_SUFFIX = "crops.npy"
MAX_CROPS_BYTES = 256 * 2**20
"""A `.crops.npy` above this is refused before it is read; 500 crops at top-10 take 26 KB."""

MAX_HEADER_BYTES = 2**16
_HEADERS = threading.Lock()

TAR_ERRORS = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError, RecursionError)
"""What tarfile raises for headers that nobody wrote in earnest."""
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
"""What NumPy raises for headers that are not its own."""


def file_name(shard: int) -> str:
    return f"shards/{shard:05d}.tar"


def record_dtype(top_k: int, index_dtype: Any) -> np.dtype[np.void]:
    """One crop as one packed little-endian record; published in docs/format.md."""
    index = np.dtype(index_dtype).newbyteorder("<")
    return np.dtype(
        [
            ("box_top", "<u2"),
            ("box_left", "<u2"),
            ("box_height", "<u2"),
            ("box_width", "<u2"),
            ("flip", "?"),
            ("bucket", "u1"),
            ("class_index", index, (top_k,)),
            ("class_prob", "<f2", (top_k,)),
            ("target_prob", "<f2"),
        ]
    )


def to_records(labels: ImageLabels) -> npt.NDArray[np.void]:
    num_crops, top_k = labels.class_index.shape
    records = np.empty(num_crops, record_dtype(top_k, labels.class_index.dtype))
    for i, side in enumerate(("box_top", "box_left", "box_height", "box_width")):
        records[side] = labels.boxes[:, i]
    for name in ("flip", "bucket", "class_index", "class_prob", "target_prob"):
        records[name] = getattr(labels, name)
    return records


class Writer:
    """Appends samples to a tar; times and owners are fixed, so the same rows give the same bytes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0, user="", group="")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._tar.close()
        finally:
            self._file.close()

    def add(self, labels: ImageLabels, image: bytes) -> None:
        sample: dict[str, Any] = {"__key__": labels.key, image_extension(image): image}
        if labels.target != UNKNOWN_TARGET:
            sample["cls"] = str(labels.target).encode()
        sample[CROPS_SUFFIX] = npy_bytes(to_records(labels))
        self._tar.write(sample)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Where one image's members lie in the tar: byte offsets of their contents."""

    key: str
    image_offset: int
    image_bytes: int
    crops_offset: int
    crops_bytes: int
    target: int


def scan(path: Path) -> Iterator[Sample]:
    """Walk the headers of a tar that `Writer` wrote, seeking over the contents.

    Raises ShardError for links, devices, absolute or climbing names, duplicate or incomplete samples, truncation.
    """
    seen: set[str] = set()
    parts: dict[str, tarfile.TarInfo] = {}
    key = ""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]
                member_key, suffix = _split_member(path, member)
                if not 0 <= member.size <= size - member.offset_data:
                    raise ShardError(f"{path}: truncated: {size} bytes, member {member.name!r} claims {member.size}")
                if member_key != key and parts:
                    yield _sample(path, key, parts, stream)
                    parts = {}
                if member_key != key and member_key in seen:
                    raise ShardError(f"{path}: sample {member_key!r} appears twice")
                seen.add(member_key)
                key = member_key
                if suffix in parts:
                    raise ShardError(f"{path}: member {member.name!r} appears twice")
                parts[suffix] = member
            if parts:
                yield _sample(path, key, parts, stream)
            _check_end(path, stream, tar.offset)
    except FileNotFoundError as error:
        raise ShardError(f"{path}: the shard is missing; restore it or build the label set again") from error
    except TAR_ERRORS as error:
        raise ShardError(f"{path}: cannot be read as a tar ({error})") from error


def read_rows(path: Path) -> Iterator[tuple[ImageLabels, bytes]]:
    """Every sample of a tar with its image; one image in memory at a time. Raises ShardError as `scan` does."""
    with path.open("rb") if path.exists() else _missing(path) as stream:
        for sample in scan(path):
            stream.seek(sample.image_offset)
            image = stream.read(sample.image_bytes)
            stream.seek(sample.crops_offset)
            records = parse_npy(stream.read(sample.crops_bytes), f"{path}: {sample.key}.{CROPS_SUFFIX}")
            yield from_records(path, sample.key, sample.target, records, image), image


def from_records(path: Path, key: str, target: int, records: npt.NDArray[np.void], image: bytes) -> ImageLabels:
    try:
        height, width = image_size(image)
    except ImageError as error:
        raise ShardError(f"{path}: image of sample {key!r}: {error}") from error
    boxes = np.stack([records[f"box_{side}"] for side in ("top", "left", "height", "width")], axis=1)
    return ImageLabels(
        key=key,
        image_digest=image_digest(image),
        height=height,
        width=width,
        target=target,
        boxes=boxes,
        **{name: records[name] for name in ("flip", "class_index", "class_prob", "target_prob", "bucket")},
    )


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def parse_npy(data: bytes, where: str) -> npt.NDArray[np.void]:
    """Crop records from .npy bytes, never unpickling. Raises ShardError for anything but `record_dtype`."""
    width = 2 if data[6:7] == b"\x01" else 4
    end = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    try:
        with _HEADERS:
            shape, dtype = _parse_header(data[: min(end, MAX_HEADER_BYTES)])
        if dtype.hasobject:
            raise ValueError("Python objects, which are never unpickled")
        records = np.frombuffer(data, dtype, math.prod(shape), end)
    except NPY_ERRORS as error:
        raise ShardError(f"{where}: not a plain NumPy array ({error})") from error
    if len(shape) != 1 or "class_index" not in (dtype.names or ()):
        raise ShardError(f"{where}: does not hold crop records")
    index = records.dtype["class_index"]
    top_k = index.shape[0] if index.shape else 0
    if index.base not in (np.dtype("<u2"), np.dtype("<u4")) or records.dtype != record_dtype(top_k, index.base):
        raise ShardError(f"{where}: crop records are {records.dtype}, expected {record_dtype(5, np.uint16)}")
    return records


@lru_cache(maxsize=64)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a .npy file from all that comes before its data; those of one label set are alike.

    NumPy evaluates a literal for it, which Python 3.11 cannot do in two threads at once, and which takes longer than
    reading the records.
    """
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version} of the .npy format")
    return shape, dtype


def _split_member(path: Path, member: tarfile.TarInfo) -> tuple[str, str]:
    name = member.name
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        raise ShardError(f"{path}: member {name!r} is not a regular file; links and devices are refused")
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not dot or not stem or name.startswith("/") or "\\" in name or ".." in folder.split("/"):
        raise ShardError(f"{path}: member name {name!r} is not KEY.EXTENSION inside the tar")
    return (f"{folder}/{stem}" if folder else stem), suffix


def _sample(path: Path, key: str, parts: dict[str, tarfile.TarInfo], stream: io.BufferedReader) -> Sample:
    images = [suffix for suffix in parts if suffix not in ("cls", CROPS_SUFFIX)]
    if len(images) != 1 or CROPS_SUFFIX not in parts:
        raise ShardError(f"{path}: sample {key!r} needs one image and one {CROPS_SUFFIX}, has {sorted(parts)}")
    crops = parts[CROPS_SUFFIX]
    if crops.size > MAX_CROPS_BYTES:
        raise ShardError(f"{path}: {key}.{CROPS_SUFFIX} claims {crops.size} bytes; at most {MAX_CROPS_BYTES}")
    return Sample(
        key=key,
        image_offset=parts[images[0]].offset_data,
        image_bytes=parts[images[0]].size,
        crops_offset=crops.offset_data,
        crops_bytes=crops.size,
        target=_read_target(path, key, parts.get("cls"), stream),
    )


def _read_target(path: Path, key: str, member: tarfile.TarInfo | None, stream: io.BufferedReader) -> int:
    if member is None:
        return UNKNOWN_TARGET
    position = stream.tell()
    stream.seek(member.offset_data)
    text = stream.read(min(member.size, 16))
    stream.seek(position)
    if not text.isdigit() or int(text) > np.iinfo(np.int32).max:
        raise ShardError(f"{path}: {key}.cls holds {text!r}, expected a class number")
    return int(text)


def _check_end(path: Path, stream: io.BufferedReader, end: int) -> None:
    stream.seek(0, io.SEEK_END)
    if stream.tell() < end:
        raise ShardError(f"{path}: truncated: {stream.tell()} bytes, its members need {end}")


def _missing(path: Path) -> Any:
    raise ShardError(f"{path}: the shard is missing; restore it or build the label set again")
