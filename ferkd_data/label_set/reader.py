"""`RowReader`, the interface to the rows of a label set, and `StoredReader`, which reads them from files.

A `LabelSet` is what users hold. It asks one `RowReader` for its rows: a `StoredReader` for a label set on disk or on a
server, an `EnsembleReader` for several of the same crops, a `SelectionReader` or a `MappedReader` for a view. Readers
hold other readers; the three views share `View`, which passes calls on to the reader below.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from ferkd_data.errors import ShardError, UsageError
from ferkd_data.format import parquet, plain_tar, webdataset
from ferkd_data.format.manifest import FileEntry, Manifest, ShardEntry
from ferkd_data.label_set.files import DEFAULT_BYTES, CachedFiles, Files, LocalFiles
from ferkd_data.labels.checks import check_rows, check_targets
from ferkd_data.labels.rows import ImageLabels, ShardLabels, class_index_dtype, identity_of_images
from ferkd_data.labels.statistics import Statistics
from ferkd_data.storage import OpenFile

VerifyLabels = Literal["first_read", "never"]
"""When a file's SHA-256 is compared with the manifest: when a process first reads the file, or never."""


class RowReader(Protocol):
    """The rows of a label set by shard and crop block. Every method that reads raises ShardError or RemoteError.

    `LabelSet` has these methods too, so that functions which take a reader also take a label set.
    """

    @property
    def manifest(self) -> Manifest:
        """The manifest, changed where this reader shows other rows or classes than the files hold."""

    @property
    def num_crops(self) -> int:
        """N: crops per image that are shown; the files may hold more."""

    @property
    def identity(self) -> str:
        """64 hex digits: two readers show the same rows where these are the same."""

    @property
    def statistics(self) -> Statistics | None:
        """Statistics of the rows that are shown; None where these have to be counted first."""

    @property
    def location(self) -> str:
        """The folder or the URL, for messages."""

    @property
    def is_local(self) -> bool:
        """Whether all files lie on this host, so that reading every key costs little."""

    @property
    def cache_bytes(self) -> int:
        """Bytes that a cache may hold of these files."""

    @property
    def is_verified(self) -> bool:
        """Whether the files' digests are compared with the manifest when they are first read."""

    def block(self, shard: int, block: int) -> ShardLabels:
        """Read one crop block of one shard, whole: also the crops beyond `num_crops`."""

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        """Read a block as `block` does, with the right shapes and types but whatever values the file holds."""

    def keys_of(self, shard: int, block: int = 0) -> list[str]:
        """Read the keys (R,) of one shard out of this crop block's file; every block of a shard has the same."""

    def targets_of(self, shard: int, block: int = 0) -> npt.NDArray[np.int32]:
        """Read the ground truths (R,) of one shard, -1 where unknown, out of this crop block's file."""

    def image_locations(self, shard: int) -> npt.NDArray[np.int64]:
        """Read (R, 2): offset and length in bytes of each image within its shard's tar, in layout webdataset."""

    def fetch(self, shard: int, block: int) -> None:
        """Make sure that `block(shard, block)` finds its files on this host."""

    def check_size(self, shard: int, block: int) -> None:
        """Raise ShardError where a local file of the block is missing, or not as large as the manifest says."""

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        """Open a file on this host: it has the size of the manifest and, with `check`, its SHA-256."""

    def verified(self, verify_labels: VerifyLabels) -> RowReader:
        """Return a reader of the same rows that compares digests as `verify_labels` says."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StoredReader:
    """One label set, read from its files."""

    files: Files
    manifest: Manifest
    num_crops: int
    identity: str
    """SHA-256 of manifest.json."""
    verify_labels: VerifyLabels = "first_read"
    _images: dict[int, tuple[int, bytes]] = field(default_factory=dict, init=False)
    """By shard: the block that was read first, and the digest of what it says of its images."""

    def __post_init__(self) -> None:
        known = get_args(VerifyLabels)
        if self.verify_labels not in known:
            raise UsageError(f"verify_labels must be one of {', '.join(known)}, got {self.verify_labels!r}")

    def __repr__(self) -> str:
        manifest = self.manifest
        return (
            f"LabelSet({self.location!r}, images={manifest.num_images}, crops={self.num_crops}, top_k={manifest.top_k})"
        )

    @property
    def statistics(self) -> Statistics:
        """Statistics of all crops that were labelled, also where fewer crops of each image are shown."""
        return self.manifest.statistics

    @property
    def location(self) -> str:
        return self.files.location

    @property
    def is_local(self) -> bool:
        return isinstance(self.files, LocalFiles)

    @property
    def cache_bytes(self) -> int:
        # Local files take none of a cache, but the loader unpacks them into one.
        return self.files.cache.limit if isinstance(self.files, CachedFiles) else DEFAULT_BYTES

    @property
    def is_verified(self) -> bool:
        return self.verify_labels == "first_read"

    def block(self, shard: int, block: int) -> ShardLabels:
        """Read one crop block of one shard and check its values, so that no impossible label reaches a training."""
        labels = self.raw_block(shard, block)
        path = f"{self.location}/{self.manifest.shards[shard].files[block].path}"
        check_rows(path, labels, self.manifest.num_classes)
        self._check_same_images(shard, block, labels)
        return labels

    def _check_same_images(self, shard: int, block: int, labels: ShardLabels) -> None:
        """Raise ShardError where a block speaks of other images than the block of the shard that was read first."""
        entry = self.manifest.shards[shard]
        # One block has no other that it could contradict, and hashing its keys would cost for nothing.
        if len(entry.files) == 1:
            return
        digest = identity_of_images(labels)
        # Threads may read blocks of one shard at the same time: setdefault is atomic, so that all compare with one.
        first, known = self._images.setdefault(shard, (block, digest))
        if digest != known:
            raise ShardError(
                f"{self.location}/{entry.files[block].path}: the keys, digests, sizes or targets of its images are not "
                f"those of {entry.files[first].path}; do not train on this label set"
            )

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        entry = self.manifest.shards[shard]
        # Open while it is read: the cache removes no open file, and the path below stays good.
        with self.open(entry.files[block]) as file:
            if self.manifest.layout == "parquet":
                return parquet.read_labels(
                    file.path,
                    rows=entry.rows,
                    num_crops=self.manifest.block_crops(block),
                    top_k=self.manifest.top_k,
                    num_classes=self.manifest.num_classes,
                    operation_words=self.manifest.operation_words,
                )
            # The fast reader takes tars without anything unusual; it decides nothing (docs/decisions.md, record 40).
            plain = read_plain_tar(self.manifest, shard, file.read)
            if plain is not None:
                return plain
            return _checked_rows(file.path, self.manifest, entry, [row for row, _ in webdataset.read_rows(file.path)])

    def keys_of(self, shard: int, block: int = 0) -> list[str]:
        entry = self.manifest.shards[shard]
        # A tar is not hashed for its keys: they are in its headers, which have checksums; its images would be read too.
        with self.open(entry.files[block], check=self.manifest.layout == "parquet") as file:
            if self.manifest.layout == "parquet":
                return parquet.read_keys(file.path, rows=entry.rows)
            return [sample.key for sample in webdataset.scan(file.path)]

    def targets_of(self, shard: int, block: int = 0) -> npt.NDArray[np.int32]:
        if self.manifest.layout == "webdataset":
            # A tar has no column of targets: each lies in a member of its own, `KEY.cls`.
            return self.block(shard, 0).target
        entry = self.manifest.shards[shard]
        with self.open(entry.files[block]) as file:
            targets = parquet.read_targets(file.path, rows=entry.rows)
            check_targets(str(file.path), targets, self.manifest.num_classes)
        return targets

    def image_locations(self, shard: int) -> npt.NDArray[np.int64]:
        with self.open(self.manifest.shards[shard].files[0]) as tar:
            found = [(sample.image_offset, sample.image_bytes) for sample in webdataset.scan(tar.path)]
        return np.array(found, np.int64).reshape(-1, 2)

    def fetch(self, shard: int, block: int) -> None:
        self.open(self.manifest.shards[shard].files[block]).close()

    def check_size(self, shard: int, block: int) -> None:
        # Files on a server are checked as they arrive.
        if isinstance(self.files, LocalFiles):
            self.files.check_size(self.manifest.shards[shard].files[block])

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        return self.files.open(entry, check=check and self.verify_labels != "never")

    def verified(self, verify_labels: VerifyLabels) -> StoredReader:
        return replace(self, verify_labels=verify_labels)


def read_plain_tar(manifest: Manifest, shard: int, read: plain_tar.Read, *, digests: bool = True) -> ShardLabels | None:
    """Read the rows of a tar without anything unusual through `read`; None where `webdataset.read_rows` is to decide.

    Without `digests`, those of the images are left 0.
    """
    # The table reader knows no operations: a set that has them, or claims to, is read sample by sample.
    if manifest.operation_words:
        return None
    rows = plain_tar.read_labels(
        read,
        num_crops=manifest.num_crops,
        top_k=manifest.top_k,
        index_dtype=class_index_dtype(manifest.num_classes),
        digests=digests,
    )
    return rows if rows is not None and len(rows) == manifest.shards[shard].rows else None


def _checked_rows(path: Path, manifest: Manifest, entry: ShardEntry, rows: list[ImageLabels]) -> ShardLabels:
    """Join the rows of a tar. Raises ShardError where they have not the number and the shapes of the manifest."""
    expected = (manifest.num_crops, manifest.top_k)
    if len(rows) != entry.rows:
        raise ShardError(f"{path}: holds {len(rows)} rows, the manifest says {entry.rows}")
    dtype = class_index_dtype(manifest.num_classes)
    for row in rows:
        if row.class_index.shape != expected or row.class_index.dtype != dtype:
            raise ShardError(
                f"{path}: image {row.key!r} has (crops, k) = {row.class_index.shape} of {row.class_index.dtype}, "
                f"the manifest says {expected} of {np.dtype(dtype)}"
            )
        if row.operations.shape[1] != manifest.operation_words:
            names = ", ".join(manifest.augmentations or ()) or "none"
            raise ShardError(
                f"{path}: image {row.key!r} has {row.operations.shape[1]} words of recorded operations, the "
                f"manifest's augmentations ({names}) take {manifest.operation_words}"
            )
    return ShardLabels.from_rows(rows)
