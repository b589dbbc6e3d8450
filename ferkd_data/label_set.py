"""A finished label set, opened for reading.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.buckets import Thresholds
from ferkd_data.errors import LabelSetError, ManifestError, RemoteError, ShardError, UsageError
from ferkd_data.manifest import (
    FILE_NAME,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    ShardEntry,
    TeacherEntry,
    parse_manifest,
    read_manifest_bytes,
)
from ferkd_data.merging import merge_labels
from ferkd_data.remote import Remote, is_remote, open_remote
from ferkd_data.shard_cache import DEFAULT_BYTES, ShardCache
from ferkd_data.shards import parquet, plain_tar, webdataset
from ferkd_data.shards.checks import check_classes, check_probabilities
from ferkd_data.shards.columns import ImageLabels, ShardLabels, class_index_dtype, concat_crops
from ferkd_data.statistics import Statistics
from ferkd_data.storage import OpenFile, default_cache_dir, inside

SHARDS_KEPT = 2
"""Shards that `labels[key]` keeps in memory."""


class Files(Protocol):
    """Where a label set's files lie. Can be pickled."""

    @property
    def location(self) -> str: ...

    def open(self, entry: FileEntry) -> OpenFile:
        """The file on this host, of the size that the manifest says. Raises LabelSetError, RemoteError."""


def open_labels(
    path: str | Path | Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    crops: int | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: int = DEFAULT_BYTES,
) -> LabelSet:
    """Open the label set in a folder, or at an http(s)://, s3://, gs:// or hf://datasets/ORG/NAME URL.

    With `crops`, only the first so many crops of each image are shown, and only the crop blocks that hold them are ever
    touched. Files of a remote set are fetched when first needed, checked, and kept in `cache_dir` (default:
    $FERKD_DATA_CACHE or the user's cache folder), which holds at most `cache_bytes`.

    Several label sets of the same crops by different teachers are opened as their ensemble, with `weights` (default:
    the teachers' own): nothing is written, and each training run may choose its teachers. See ferkd_data.merging.

    Raises ManifestError when there is no finished label set, RemoteError when it cannot be fetched, UsageError when it
    has fewer crops, LabelSetError when several do not hold the same crops.
    """
    if not isinstance(path, (str, Path)):
        sets = [open_labels(one, crops=crops, cache_dir=cache_dir, cache_bytes=cache_bytes) for one in path]
        return sets[0] if len(sets) == 1 and weights is None else EnsembleLabels(sets, weights)
    if weights is not None:
        raise UsageError("weights are for several label sets: open_labels([A, B], weights=[2, 1])")
    files: Files
    if is_remote(path):
        remote = open_remote(str(path))
        text = read_remote_manifest(remote)
        cache = ShardCache(Path(cache_dir or default_cache_dir()) / "shards", cache_bytes)
        files = CachedFiles(remote, cache)
    else:
        folder = Path(str(path).removeprefix("file://"))
        text = read_manifest_bytes(folder)
        files = LocalFiles(folder)
    manifest = parse_manifest(text, f"{files.location}/{FILE_NAME}")
    if crops is not None and not 1 <= crops <= manifest.num_crops:
        raise UsageError(f"{files.location}: crops must be 1..{manifest.num_crops} (what was labelled), got {crops}")
    identity = hashlib.sha256(text).hexdigest()
    return LabelSet(files, manifest, manifest.num_crops if crops is None else crops, identity)


def read_remote_manifest(remote: Remote) -> bytes:
    """Raises ManifestError where there is none, RemoteError."""
    try:
        return remote.read(FILE_NAME, max_bytes=MAX_MANIFEST_BYTES)
    except RemoteError as error:
        if error.status == 404:
            raise ManifestError(
                f"{remote.url}: no {FILE_NAME}; is this the URL of a published label set? While one is sent, or where "
                "that was interrupted, there is none: it comes last"
            ) from error
        raise


@dataclass(frozen=True)
class LocalFiles:
    folder: Path

    @property
    def location(self) -> str:
        return str(self.folder)

    def open(self, entry: FileEntry) -> OpenFile:
        path = inside(self.folder, entry.path)
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise ShardError(f"{path}: the shard is missing; restore it or build the label set again") from error
        if not path.is_file():
            raise ShardError(f"{path}: is not a regular file")
        if size != entry.bytes:
            raise ShardError(f"{path}: {size} bytes, the manifest says {entry.bytes}; fetch or build it again")
        return OpenFile(path)


@dataclass(frozen=True)
class CachedFiles:
    remote: Remote
    cache: ShardCache

    @property
    def location(self) -> str:
        return self.remote.url

    def open(self, entry: FileEntry) -> OpenFile:
        return self.cache.fetch(self.remote, entry)


class LabelSet:
    """Rows are numbered 0 .. len - 1 in the order of the shards. Made by `open_labels`."""

    def __init__(self, files: Files, manifest: Manifest, num_crops: int, identity: str) -> None:
        self.files = files
        self.manifest = manifest
        self.num_crops = num_crops
        """N: crops per image that this view shows."""
        self.identity = identity
        """SHA-256 of the manifest: two label sets are the same where this is."""
        self.first_row = np.cumsum([0, *(shard.rows for shard in manifest.shards)], dtype=np.int64)
        """(shards + 1,): the number of each shard's first row."""
        self._recent: OrderedDict[int, ShardLabels] = OrderedDict()
        self._key_index: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]] | None = None

    @property
    def location(self) -> str:
        """The folder or the URL."""
        return self.files.location

    @property
    def is_local(self) -> bool:
        """Whether all files lie on this host, so that reading every key costs little."""
        return isinstance(self.files, LocalFiles)

    @property
    def cache_bytes(self) -> int:
        """What a cache may hold of this set."""
        return self.files.cache.limit if isinstance(self.files, CachedFiles) else DEFAULT_BYTES

    def __repr__(self) -> str:
        return f"LabelSet({self.location!r}, images={len(self)}, crops={self.num_crops}, top_k={self.top_k})"

    def __len__(self) -> int:
        return self.manifest.num_images

    @property
    def top_k(self) -> int:
        return self.manifest.top_k

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.manifest.class_names

    @property
    def statistics(self) -> Statistics:
        """Of all crops that were labelled, also where this view shows fewer."""
        return self.manifest.statistics

    @property
    def num_blocks(self) -> int:
        """Crop blocks that this view touches."""
        if self.manifest.layout == "webdataset":
            return 1
        return -(-self.num_crops // self.manifest.crops_per_block)

    def keys(self) -> Iterator[str]:
        """Every image's key, in row order, one shard in memory at a time."""
        for entry in self.manifest.shards:
            if entry.rows:
                yield from self._read_keys(entry)

    def key_hashes(self) -> npt.NDArray[np.uint64]:
        """(images,): a hash of each key, in row order. Raises ShardError."""
        # Without `count`, which would take memory for as many keys as a manifest claims.
        hashes = np.fromiter((rng.hash64(key) for key in self.keys()), np.uint64)
        if len(hashes) != len(self):
            raise ShardError(f"{self.location}: holds {len(hashes)} keys, the manifest says {len(self)}")
        return hashes

    def __iter__(self) -> Iterator[ImageLabels]:
        for labels in self.shards():
            yield from labels

    def shards(self) -> Iterator[ShardLabels]:
        """The shards one after the other, empty ones left out; arrays (R, N, ...)."""
        return (self.shard(entry.index) for entry in self.manifest.shards if entry.rows)

    def shard(self, index: int) -> ShardLabels:
        """All rows of one image shard with the N crops of this view.

        Raises ShardError when a file is missing, truncated, or does not hold what the manifest says.
        """
        if not 0 <= index < len(self.manifest.shards):
            raise UsageError(f"{self.location}: shard {index} of {len(self.manifest.shards)} does not exist")
        parts = [self.block(index, block) for block in range(self.num_blocks)]
        whole = concat_crops(parts)
        return whole if whole.num_crops == self.num_crops else whole.crop_range(0, self.num_crops)

    def block(self, shard: int, block: int) -> ShardLabels:
        """One crop block of one shard, whole (also the crops beyond this view). Raises ShardError as `shard`."""
        labels = self.raw_block(shard, block)
        path = f"{self.location}/{self.manifest.shards[shard].files[block].path}"
        check_classes(path, labels, self.num_classes)
        check_probabilities(path, labels)
        return labels

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        """As `block`, with the right shape and types but whatever values the file holds."""
        entry = self.manifest.shards[shard]
        with self.open(entry.files[block]) as file:
            if self.manifest.layout == "parquet":
                return parquet.read_labels(
                    file.path,
                    rows=entry.rows,
                    num_crops=self.manifest.block_crops(block),
                    top_k=self.top_k,
                    num_classes=self.num_classes,
                )
            plain = self.plain_rows(shard, file.read)
            if plain is not None:
                return plain
            return self._checked(file.path, entry, [row for row, _ in webdataset.read_rows(file.path)])

    def plain_rows(self, shard: int, read: plain_tar.Read, *, digests: bool = True) -> ShardLabels | None:
        """As `raw_block`, for a tar without anything unusual, through a function that reads it; None for others.

        Without `digests`, those of its images are left 0.
        """
        rows = plain_tar.read_labels(
            read,
            num_crops=self.manifest.num_crops,
            top_k=self.top_k,
            index_dtype=class_index_dtype(self.num_classes),
            digests=digests,
        )
        return rows if rows is not None and len(rows) == self.manifest.shards[shard].rows else None

    def open(self, entry: FileEntry) -> OpenFile:
        """A file of this set on this host, of the size that the manifest says. Raises ShardError, RemoteError.

        Its path is good for as long as it is open: the cache may drop it afterwards.
        """
        return self.files.open(entry)

    def locate(self, key: str) -> tuple[int, int]:
        """(shard, row in the shard) of an image. Raises KeyError.

        The first call reads the keys of all shards and keeps 16 bytes for each image.
        """
        hashes, rows = self._load_key_index()
        wanted = np.uint64(rng.hash64(key))
        at = int(np.searchsorted(hashes, wanted))
        while at < len(hashes) and hashes[at] == wanted:
            shard, row = self.position(int(rows[at]))
            if self._shard_cached(shard).keys[row] == key:
                return shard, row
            at += 1
        raise KeyError(key)

    def position(self, row: int) -> tuple[int, int]:
        """(shard, row in the shard) of row number `row`."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return shard, row - int(self.first_row[shard])

    def __getitem__(self, key: str | int) -> ImageLabels:
        """The labels of an image by its key or its row number. Raises KeyError or IndexError."""
        shard, row = self.locate(key) if isinstance(key, str) else self.position(key)
        return self._shard_cached(shard)[row]

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        try:
            self.locate(key)
        except KeyError:
            return False
        return True

    def _shard_cached(self, index: int) -> ShardLabels:
        if index not in self._recent:
            self._recent[index] = self.shard(index)
            if len(self._recent) > SHARDS_KEPT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(index)
        return self._recent[index]

    def _load_key_index(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        if self._key_index is None:
            hashes = self.key_hashes()
            order = np.argsort(hashes, kind="stable")
            self._key_index = hashes[order], order
        return self._key_index

    def keys_of(self, shard: int) -> list[str]:
        """The keys of one shard's rows. Raises ShardError as `shard` does."""
        return self._read_keys(self.manifest.shards[shard])

    def _read_keys(self, entry: ShardEntry) -> list[str]:
        with self.open(entry.files[0]) as file:
            if self.manifest.layout == "parquet":
                return parquet.read_keys(file.path, rows=entry.rows)
            return [sample.key for sample in webdataset.scan(file.path)]

    def fetch(self, shard: int, block: int) -> None:
        """See to it that `block(shard, block)` finds its files on this host. Raises ShardError, RemoteError."""
        self.open(self.manifest.shards[shard].files[block]).close()

    def _checked(self, path: Path, entry: ShardEntry, rows: list[ImageLabels]) -> ShardLabels:
        expected = (self.manifest.num_crops, self.top_k)
        if len(rows) != entry.rows:
            raise ShardError(f"{path}: holds {len(rows)} rows, the manifest says {entry.rows}")
        dtype = class_index_dtype(self.num_classes)
        for row in rows:
            if row.class_index.shape != expected or row.class_index.dtype != dtype:
                raise ShardError(
                    f"{path}: image {row.key!r} has (crops, k) = {row.class_index.shape} of {row.class_index.dtype}, "
                    f"the manifest says {expected} of {np.dtype(dtype)}"
                )
        return ShardLabels.from_rows(rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": OrderedDict(), "_key_index": None}


class EnsembleLabels(LabelSet):
    """Several label sets of the same crops, read as one: blocks are merged as they are read."""

    def __init__(self, sets: Sequence[LabelSet], weights: Sequence[float] | None) -> None:
        first = sets[0]
        self.sets = tuple(sets)
        self.shares = ensemble_shares(sets, weights)
        for labels in sets[1:]:
            check_same_classes(first, labels)
            _check_same_shards(first, labels)
        manifest = first.manifest.model_copy(
            update={
                "teachers": combined_teachers(sets, weights),
                "ensemble": "mean",
                "top_k": max(labels.top_k for labels in sets),
                "statistics": Statistics(),
            }
        )
        told = "".join(f"{labels.identity}{share!r}" for labels, share in zip(sets, self.shares, strict=True))
        super().__init__(first.files, manifest, first.num_crops, hashlib.sha256(told.encode()).hexdigest())

    @property
    def location(self) -> str:
        return " + ".join(labels.location for labels in self.sets)

    @property
    def is_local(self) -> bool:
        return all(labels.is_local for labels in self.sets)

    @property
    def cache_bytes(self) -> int:
        return min(labels.cache_bytes for labels in self.sets)

    def block(self, shard: int, block: int) -> ShardLabels:
        stored = self.manifest.thresholds
        return merge_labels(
            [labels.block(shard, block) for labels in self.sets],
            self.shares,
            num_classes=self.num_classes,
            thresholds=Thresholds(low=stored.low, mid=stored.mid, top=stored.top, confidence=stored.confidence),
            where=f"{self.location}: shard {shard}, crop block {block}",
        ).labels

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        return self.block(shard, block)

    def fetch(self, shard: int, block: int) -> None:
        for labels in self.sets:
            labels.fetch(shard, block)

    def keys_of(self, shard: int) -> list[str]:
        return self.sets[0].keys_of(shard)


def ensemble_shares(sets: Sequence[LabelSet], weights: Sequence[float] | None) -> list[float]:
    """The weight of each label set: as given, or the sum of its teachers'.

    Raises UsageError for weights that are none, or a set whose teachers were combined otherwise than by the mean.
    """
    for labels in sets:
        if len(labels.manifest.teachers) > 1 and labels.manifest.ensemble != "mean":
            raise UsageError(
                f"{labels.location}: its {len(labels.manifest.teachers)} teachers were combined by "
                f"{labels.manifest.ensemble!r}, which cannot be done with teachers of another set; only 'mean' can"
            )
    if weights is None:
        return [sum(teacher.weight for teacher in labels.manifest.teachers) for labels in sets]
    if len(weights) != len(sets) or not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise UsageError(f"weights must be {len(sets)} positive numbers, one for each label set; got {list(weights)}")
    return [float(weight) for weight in weights]


def combined_teachers(sets: Sequence[LabelSet], weights: Sequence[float] | None) -> tuple[TeacherEntry, ...]:
    """All teachers, their weights such that the ensemble of all is the one of the sets."""
    entries = []
    for labels, share in zip(sets, ensemble_shares(sets, weights), strict=True):
        own = sum(teacher.weight for teacher in labels.manifest.teachers)
        for teacher in labels.manifest.teachers:
            entries.append(teacher.model_copy(update={"weight": teacher.weight * share / own}))
    return tuple(entries)


def check_same_classes(a: LabelSet, b: LabelSet) -> None:
    """Raises LabelSetError where class numbers cannot mean the same."""
    where = f"{a.location} and {b.location}"
    if a.num_classes != b.num_classes:
        raise LabelSetError(f"{where}: num_classes differs: {a.num_classes} and {b.num_classes}")
    if a.class_names and b.class_names and a.class_names != b.class_names:
        number = next(i for i, (x, y) in enumerate(zip(a.class_names, b.class_names, strict=True)) if x != y)
        raise LabelSetError(
            f"{where}: class {number} is {a.class_names[number]!r} in one and {b.class_names[number]!r} in the other"
        )


def _check_same_shards(a: LabelSet, b: LabelSet) -> None:
    for name in ("seed", "crop_distribution", "num_crops", "crops_per_block", "layout"):
        ours, theirs = getattr(a.manifest, name), getattr(b.manifest, name)
        if ours != theirs:
            raise LabelSetError(f"{a.location} and {b.location}: {name} differs: {ours} and {theirs}")
    if [shard.rows for shard in a.manifest.shards] != [shard.rows for shard in b.manifest.shards]:
        raise LabelSetError(
            f"{a.location} and {b.location}: their images are not in the same shards; write them as one with: "
            f"ferkd-data merge {a.location} {b.location} OUT"
        )


__all__ = ["LabelSet", "LabelSetError", "open_labels"]
