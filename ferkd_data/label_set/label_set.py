"""The rows of a finished label set, read from its files.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from ferkd_data import rng
from ferkd_data.errors import ShardError, UsageError
from ferkd_data.format import parquet, plain_tar, webdataset
from ferkd_data.format.manifest import FileEntry, Manifest, ShardEntry
from ferkd_data.html_tables import html_table
from ferkd_data.label_set.files import DEFAULT_BYTES, CachedFiles, Files, LocalFiles
from ferkd_data.labels.checks import check_rows, check_targets
from ferkd_data.labels.rows import ImageLabels, ShardLabels, class_index_dtype, concat_crops, identity_of_images
from ferkd_data.labels.statistics import Statistics
from ferkd_data.storage import OpenFile

VerifyLabels = Literal["first_read", "never"]
"""When a file's SHA-256 is compared with the manifest: when a process first reads the file, or never."""
SHARDS_KEPT = 2
"""Shards that `labels[key]` keeps in memory."""


class StoredLabels:
    """Rows are numbered 0 .. len - 1 in the order of the shards. `LabelSet` is what users get."""

    def __init__(
        self,
        files: Files,
        manifest: Manifest,
        num_crops: int,
        identity: str,
        verify_labels: VerifyLabels = "first_read",
    ) -> None:
        self.files = files
        _check_word(verify_labels)
        self.verify_labels = verify_labels
        self.manifest = manifest
        self.num_crops = num_crops
        """N: crops per image that this view shows."""
        self.identity = identity
        """64 hex digits: two label sets are the same where these are. SHA-256 of the manifest; of a view, also of what
        it shows."""
        self.first_row = np.cumsum([0, *(shard.rows for shard in manifest.shards)], dtype=np.int64)
        """(shards + 1,): the number of each shard's first row."""
        self._thresholds = manifest.thresholds.absolute()
        self._recent: OrderedDict[int, ShardLabels] = OrderedDict()
        self._images: dict[int, tuple[int, bytes]] = {}
        """By shard: the block that was read first, and the digest of what it says of its images."""
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

    def _repr_html_(self) -> str:
        """What a notebook shows: the set in a few lines."""
        manifest = self.manifest
        thresholds = manifest.thresholds
        rows = [
            ("images", f"{len(self):,}"),
            ("crops", f"{self.num_crops:,} of each image, in {self.num_blocks:,} crop blocks"),
            ("soft labels", f"top-{self.top_k} of {self.num_classes:,} classes"),
            ("teachers", ", ".join(teacher.name for teacher in manifest.teachers)),
            ("thresholds", f"{thresholds.low:g}, {thresholds.mid:g}, {thresholds.top:g}"),
            ("layout", manifest.layout),
            ("source", manifest.source.description),
        ]
        return html_table(repr(self), rows)

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
        """Statistics of all crops that were labelled, also where this view shows fewer crops of each image."""
        return self.manifest.statistics

    @property
    def num_blocks(self) -> int:
        """Crop blocks that this view touches."""
        if self.manifest.layout == "webdataset":
            return 1
        return -(-self.num_crops // self.manifest.crops_per_block)

    def keys(self) -> Iterator[str]:
        """Every image's key, in row order, one shard in memory at a time."""
        for entry in self.filled_shards():
            yield from self.keys_of(entry.index)

    def filled_shards(self) -> Iterator[ShardEntry]:
        """The shards that have rows."""
        return (entry for entry in self.manifest.shards if entry.rows)

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
        return (self.shard(entry.index) for entry in self.filled_shards())

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
        check_rows(path, labels, self.num_classes, self._thresholds)
        self._check_same_images(shard, block, labels)
        return labels

    def _check_same_images(self, shard: int, block: int, labels: ShardLabels) -> None:
        """Raises ShardError where a block speaks of other images than the first block of the shard that was read."""
        entry = self.manifest.shards[shard]
        if len(entry.files) == 1:
            return
        said = identity_of_images(labels)
        first, known = self._images.setdefault(shard, (block, said))
        if said != known:
            raise ShardError(
                f"{self.location}/{entry.files[block].path}: the keys, digests, sizes or targets of its images are not "
                f"those of {entry.files[first].path}; do not train on this label set"
            )

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
                    operation_words=self.manifest.operation_words,
                )
            # The table reader knows no operations: a set that has them, or claims to, is read sample by sample.
            plain = None if self.manifest.operation_words else self.plain_rows(shard, file.read)
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

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        """Open a file of this set on this host, with the size and the SHA-256 of the manifest.

        The digest is not compared without `check`, nor in a set that was opened with `verify_labels="never"`. The
        path is good for as long as the file is open: the cache may drop it afterwards.

        Raises ShardError for a local file that is missing or another, RemoteError for one that cannot be fetched.
        """
        return self.files.open(entry, check=check and self.verify_labels != "never")

    def check_sizes(self) -> None:
        """Raises ShardError where a local file of this view is missing, or is not as large as the manifest says.

        For whoever is about to reserve memory or disk for all rows, before a file is read. What lies on a server is
        checked as it arrives.
        """
        if isinstance(self.files, LocalFiles):
            for entry in self.filled_shards():
                for file in entry.files[: self.num_blocks]:
                    self.files.check_size(file)

    def verified(self, verify_labels: VerifyLabels) -> Self:
        """The same label set, its files compared with the manifest's digests when they are first read, or never.

        Raises UsageError for another word.
        """
        _check_word(verify_labels)
        other = copy.copy(self)
        other.verify_labels = verify_labels
        return other

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
        entry = self.manifest.shards[shard]
        # A tar is not hashed for its keys: they are in its headers, which have checksums; its images would be read too.
        with self.open(entry.files[0], check=self.manifest.layout == "parquet") as file:
            if self.manifest.layout == "parquet":
                return parquet.read_keys(file.path, rows=entry.rows)
            return [sample.key for sample in webdataset.scan(file.path)]

    def targets_of(self, shard: int) -> npt.NDArray[np.int32]:
        """The ground truths (R,) of one shard's rows, -1 where unknown. Raises ShardError as `shard` does."""
        if self.manifest.layout == "webdataset":
            return self.block(shard, 0).target
        entry = self.manifest.shards[shard]
        with self.open(entry.files[0]) as file:
            targets = parquet.read_targets(file.path, rows=entry.rows)
            check_targets(str(file.path), targets, self.num_classes)
        return targets

    def image_places(self, shard: int) -> npt.NDArray[np.int64]:
        """(R, 2): offset and length in bytes of each image within its shard's tar, in layout webdataset."""
        with self.open(self.manifest.shards[shard].files[0]) as tar:
            places = [(sample.image_offset, sample.image_bytes) for sample in webdataset.scan(tar.path)]
        return np.array(places, np.int64).reshape(-1, 2)

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
            if row.operations.shape[1] != self.manifest.operation_words:
                told = ", ".join(self.manifest.augmentations or ()) or "none"
                raise ShardError(
                    f"{path}: image {row.key!r} has {row.operations.shape[1]} words of recorded operations, the "
                    f"manifest's augmentations ({told}) take {self.manifest.operation_words}"
                )
        return ShardLabels.from_rows(rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": OrderedDict(), "_key_index": None}


def _check_word(verify_labels: str) -> None:
    known = get_args(VerifyLabels)
    if verify_labels not in known:
        raise UsageError(f"verify_labels must be one of {', '.join(known)}, got {verify_labels!r}")
