"""Layout `webdataset`: the original images and their labels in the same tar, one sample per image.

`KEY.cls` (absent where the target is unknown), the label members of `crop_arrays`, and `KEY.jpg` (the encoded bytes as
they came, under the extension of their format). The libraries webdataset and datasets read it with their own decoders.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ferkd_data.errors import ImageError, ShardError
from ferkd_data.format import crop_arrays
from ferkd_data.images.decode import image_extension, image_size
from ferkd_data.images.tars import TAR_ERRORS
from ferkd_data.labels.rows import NO_OPERATIONS, UNKNOWN_TARGET, ImageLabels, shard_folder
from ferkd_data.storage import image_digest

MEMBER_MODE = 0o444


def file_name(shard: int) -> str:
    return f"{shard_folder('shards', shard)}/{shard:05d}.tar"


class Writer:
    """Appends samples to a tar. Times and owners are fixed, so the same rows give the same bytes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)

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
        """Append a sample: its labels before the image, so that a reader gets them in one read without the image."""
        if labels.target != UNKNOWN_TARGET:
            self._member(f"{labels.key}.cls", str(labels.target).encode())
        for suffix, content in crop_arrays.to_members(labels).items():
            self._member(f"{labels.key}.{suffix}", content)
        self._member(f"{labels.key}.{image_extension(image)}", image)

    def _member(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), MEMBER_MODE
        self._tar.addfile(member, io.BytesIO(content))
        # Forget it: tarfile keeps an object for each member that it has written.
        self._tar.members = []  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Positions of one image's members in a tar."""

    key: str
    image_suffix: str
    image_offset: int
    image_bytes: int
    arrays: dict[str, tuple[int, int]]
    """Label members by their suffix: offset and size of their contents."""
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
        # `r:` and not `r`: no decompression, whose output nothing bounds.
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                # tarfile would keep an object for each member that it has passed.
                tar.members = []  # type: ignore[attr-defined]
                member_key, suffix = _split_member(path, member)
                if not 0 <= member.size <= size - member.offset_data:
                    raise ShardError(f"{path}: truncated: {size} bytes, member {member.name!r} claims {member.size}")
                # The members of a sample are neighbours: another key ends the sample.
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
    """Yield every sample of a tar with its image, one at a time. Raises ShardError as `scan` does."""
    with path.open("rb") if path.exists() else _missing(path) as stream:
        for sample in scan(path):
            stream.seek(sample.image_offset)
            image = stream.read(sample.image_bytes)
            members = {}
            for suffix, (offset, size) in sample.arrays.items():
                stream.seek(offset)
                members[suffix] = stream.read(size)
            fields = crop_arrays.from_members(members, f"{path}: {sample.key}")
            yield _labels(path, sample, fields, image), image


def _labels(path: Path, sample: Sample, fields: crop_arrays.Fields, image: bytes) -> ImageLabels:
    try:
        height, width = image_size(image)
    except ImageError as error:
        raise ShardError(f"{path}: image of sample {sample.key!r}: {error}") from error
    return ImageLabels(
        key=sample.key,
        image_digest=image_digest(image),
        height=height,
        width=width,
        target=sample.target,
        boxes=fields["boxes"],
        flip=fields["flip"],
        class_index=fields["class_index"],
        class_prob=fields["class_prob"],
        target_prob=fields["target_prob"],
        bucket=fields["bucket"],
        operations=fields.get("operations", NO_OPERATIONS),
    )


def _split_member(path: Path, member: tarfile.TarInfo) -> tuple[str, str]:
    name = member.name
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        raise ShardError(f"{path}: member {name!r} is not a regular file; links and devices are refused")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ShardError(f"{path}: member name {name!r} is not UTF-8") from error
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not dot or not stem or name.startswith("/") or "\\" in name or ".." in folder.split("/"):
        raise ShardError(f"{path}: member name {name!r} is not KEY.EXTENSION inside the tar")
    return (f"{folder}/{stem}" if folder else stem), suffix


def _sample(path: Path, key: str, parts: dict[str, tarfile.TarInfo], stream: io.BufferedReader) -> Sample:
    labels = [suffix for suffix in (*crop_arrays.SUFFIXES, crop_arrays.OPERATIONS) if suffix in parts]
    images = [suffix for suffix in parts if suffix not in ("cls", *labels)]
    # Drafts of version 1 have the first of the label members alone.
    whole = labels[: len(crop_arrays.SUFFIXES)] == list(crop_arrays.SUFFIXES) or labels == [crop_arrays.CROPS]
    if len(images) != 1 or not whole:
        raise ShardError(
            f"{path}: sample {key!r} needs one image and {', '.join(crop_arrays.SUFFIXES)}, has {sorted(parts)}"
        )
    size = sum(parts[suffix].size for suffix in labels)
    if size > crop_arrays.MAX_ARRAYS_BYTES:
        raise ShardError(
            f"{path}: the labels of sample {key!r} claim {size} bytes; at most {crop_arrays.MAX_ARRAYS_BYTES}"
        )
    return Sample(
        key=key,
        image_suffix=images[0],
        image_offset=parts[images[0]].offset_data,
        image_bytes=parts[images[0]].size,
        arrays={suffix: (parts[suffix].offset_data, parts[suffix].size) for suffix in labels},
        target=_read_target(path, key, parts.get("cls"), stream),
    )


def _read_target(path: Path, key: str, member: tarfile.TarInfo | None, stream: io.BufferedReader) -> int:
    if member is None:
        return UNKNOWN_TARGET
    # Put back afterwards: tarfile uses this stream too.
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
