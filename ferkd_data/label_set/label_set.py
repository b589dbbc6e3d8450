"""`LabelSet`: a finished label set as users hold it, or a view of one.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.class_map import ClassMap, NewClasses, class_numbers, make_class_map
from ferkd_data.crop_kinds import CropKind
from ferkd_data.errors import ShardError, UsageError
from ferkd_data.format.manifest import FileEntry, Manifest, ShardEntry
from ferkd_data.html_tables import html_table
from ferkd_data.label_set.reader import RowReader, VerifyLabels
from ferkd_data.label_set.selection import Rows, Where, chosen_rows, in_classes, rows_by_target, split_rows
from ferkd_data.label_set.views import MappedReader, first_rows, map_reader, select_kind, select_rows
from ferkd_data.labels.rows import ImageLabels, ShardLabels, concat_crops
from ferkd_data.labels.statistics import Statistics, add, shard_statistics
from ferkd_data.storage import OpenFile

SHARDS_KEPT = 2
"""Shards that `labels[key]` keeps in memory."""


class LabelSet:
    """Soft labels of images, one row each. Made by `open_labels`.

    Rows are numbered 0 .. len - 1 in the order of the shards. `select`, `split` and `map_classes` give views: label
    sets themselves, which everything takes that takes a label set.

    >>> len(labels), labels.num_crops, labels.top_k
    (4, 5, 2)
    >>> row = labels["class0/photo0"]  # or labels[0]
    >>> row.boxes.shape, row.class_prob.shape
    ((5, 4), (5, 2))
    >>> labels.select(classes=["name 1"])
    <2 of LabelSet(..., images=4, crops=5, top_k=2)>
    """

    def __init__(self, reader: RowReader) -> None:
        self.reader = reader
        """Reads the rows; the label set adds numbering, look-up by key, views and what is kept in memory."""
        self.first_row = first_rows(reader.manifest)
        """(shards + 1,): the number of each shard's first row."""
        self._recent: OrderedDict[int, ShardLabels] = OrderedDict()
        self._key_index: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]] | None = None
        self._counted: Statistics | None = None
        self._unmapped: LabelSet | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What can be read again does not travel to worker processes.
        return {**self.__dict__, "_recent": OrderedDict(), "_key_index": None}

    def __repr__(self) -> str:
        return repr(self.reader)

    def _repr_html_(self) -> str:
        """The set in a few lines, for notebooks."""
        manifest = self.manifest
        thresholds = manifest.thresholds
        rows = [
            ("images", f"{len(self):,}"),
            ("crops", f"{self.num_crops:,} of each image, in {self.num_blocks:,} crop blocks"),
            *((f"crop kind {kind.name}", f"{kind.crops:,}, {kind.size} px") for kind in self.crop_kinds),
            ("soft labels", f"top-{self.top_k} of {self.num_classes:,} classes"),
            ("teachers", ", ".join(teacher.name for teacher in manifest.teachers)),
            ("thresholds", f"{thresholds.low:g}, {thresholds.mid:g}, {thresholds.top:g}"),
            ("layout", manifest.layout),
            ("source", manifest.source.description),
        ]
        return html_table(repr(self), rows)

    @property
    def manifest(self) -> Manifest:
        """The manifest; of a view, with the rows and classes of the view."""
        return self.reader.manifest

    @property
    def num_crops(self) -> int:
        """N: crops per image that this label set shows."""
        return self.reader.num_crops

    @property
    def crop_kinds(self) -> tuple[CropKind, ...]:
        """The kinds of crops, in the order of their crop numbers; empty where all crops are of one distribution."""
        return self.manifest.kinds

    @property
    def identity(self) -> str:
        """64 hex digits: two label sets are the same where these are.

        It is the SHA-256 of the manifest; that of a view also depends on what the view shows.
        """
        return self.reader.identity

    @property
    def location(self) -> str:
        """The folder or the URL."""
        return self.reader.location

    @property
    def is_local(self) -> bool:
        """Whether all files lie on this host, so that reading every key costs little."""
        return self.reader.is_local

    @property
    def cache_bytes(self) -> int:
        """Bytes that a cache may hold of this label set."""
        return self.reader.cache_bytes

    @property
    def is_verified(self) -> bool:
        """Whether the files' digests are compared with the manifest when they are first read (`verify_labels`)."""
        return self.reader.is_verified

    def __len__(self) -> int:
        return self.manifest.num_images

    @property
    def top_k(self) -> int:
        """k: classes kept for each crop."""
        return self.manifest.top_k

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.manifest.class_names

    @property
    def class_folders(self) -> tuple[str, ...] | None:
        """The class folder of each class, where the build numbered the classes by these; None under a class map."""
        return None if self.class_map is not None else self.manifest.source.class_folders

    def class_numbers(self, classes: int | str | Iterable[int | str]) -> npt.NDArray[np.int64]:
        """Return the numbers (n,) of classes given by name, by a synonym in their name, by class folder or by number.

        Data sets number classes for themselves: torchvision's ImageFolder sorts its folders, of which an evaluation set
        may have fewer. So its targets become those of this label set:

            number = torch.from_numpy(labels.class_numbers(dataset.classes))  # number[target]

        >>> labels.class_numbers(["name 3", 0]).tolist()
        [3, 0]

        Raises UsageError that lists some of the unknown ones, and for a word that several classes have.
        """
        return class_numbers(classes, num_classes=self.num_classes, names=self.class_names, folders=self.class_folders)

    @property
    def statistics(self) -> Statistics:
        """Statistics of all crops that were labelled, also where fewer crops of each image are shown.

        A view or an ensemble counts its crops when first asked, which reads every shard; it has no statistics per
        teacher.
        """
        known = self.reader.statistics
        if known is not None:
            return known
        # Kept: a view's rows never change.
        if self._counted is None:
            self._counted = add(map(shard_statistics, self.shards()))
        return self._counted

    @property
    def num_blocks(self) -> int:
        """Crop blocks that hold the N crops of each image."""
        if self.manifest.layout == "webdataset":
            return 1
        # By the crops that are shown, so that a set opened with crops=50 never touches the blocks behind.
        return -(-self.num_crops // self.manifest.crops_per_block)

    @property
    def class_map(self) -> ClassMap | None:
        """The class map of `map_classes`; None where the classes are the teacher's."""
        # A mapped reader is always the outermost: see `select_rows` and `map_reader`.
        return self.reader.class_map if isinstance(self.reader, MappedReader) else None

    @property
    def unmapped(self) -> LabelSet:
        """The same images in terms of the teacher's classes; `self` where there is no class map."""
        if not isinstance(self.reader, MappedReader):
            return self
        # Kept, since it holds recent shards and an index of keys of its own.
        if self._unmapped is None:
            self._unmapped = LabelSet(self.reader.base)
        return self._unmapped

    def keys(self) -> Iterator[str]:
        """Yield every image's key, in row order, with one shard in memory at a time."""
        for entry in self.filled_shards():
            yield from self.keys_of(entry.index)

    def filled_shards(self) -> Iterator[ShardEntry]:
        """Yield the shards that have rows."""
        return (entry for entry in self.manifest.shards if entry.rows)

    def key_hashes(self) -> npt.NDArray[np.uint64]:
        """Return (images,): a hash of each key, in row order. Raises ShardError."""
        # Without `count`, which would take memory for as many keys as a manifest claims.
        hashes = np.fromiter((rng.hash64(key) for key in self.keys()), np.uint64)
        # Callers index rows by position in this array, so that a shard with fewer keys would shift all later ones.
        if len(hashes) != len(self):
            raise ShardError(f"{self.location}: holds {len(hashes)} keys, the manifest says {len(self)}")
        return hashes

    def __iter__(self) -> Iterator[ImageLabels]:
        for labels in self.shards():
            yield from labels

    def shards(self) -> Iterator[ShardLabels]:
        """Yield the shards one after the other, empty ones left out; arrays (R, N, ...)."""
        return (self.shard(entry.index) for entry in self.filled_shards())

    def shard(self, index: int) -> ShardLabels:
        """Read all rows of one image shard with N crops each.

        Raises ShardError when a file is missing, truncated, or does not hold what the manifest says.
        """
        if not 0 <= index < len(self.manifest.shards):
            raise UsageError(f"{self.location}: shard {index} of {len(self.manifest.shards)} does not exist")
        parts = [self.block(index, block) for block in range(self.num_blocks)]
        whole = concat_crops(parts)
        # The last block may hold crops beyond those shown.
        return whole if whole.num_crops == self.num_crops else whole.crop_range(0, self.num_crops)

    def block(self, shard: int, block: int) -> ShardLabels:
        """Read one crop block of one shard, whole (also the crops beyond N). Raises ShardError as `shard` does."""
        return self.reader.block(shard, block)

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        """Read a block as `block` does, with the right shapes and types but whatever values the file holds."""
        return self.reader.raw_block(shard, block)

    def keys_of(self, shard: int, block: int = 0) -> list[str]:
        """Read the keys of one shard's rows out of this block's file. Raises ShardError as `shard` does."""
        return self.reader.keys_of(shard, block)

    def targets_of(self, shard: int, block: int = 0) -> npt.NDArray[np.int32]:
        """Read the ground truths (R,) of one shard's rows, -1 where unknown. Raises ShardError as `shard` does."""
        return self.reader.targets_of(shard, block)

    def image_locations(self, shard: int) -> npt.NDArray[np.int64]:
        """Read (R, 2): offset and length in bytes of each image within its shard's tar, in layout webdataset."""
        return self.reader.image_locations(shard)

    def fetch(self, shard: int, block: int) -> None:
        """Make sure that `block(shard, block)` finds its files on this host. Raises ShardError, RemoteError."""
        self.reader.fetch(shard, block)

    def open(self, entry: FileEntry, *, check: bool = True) -> OpenFile:
        """Open a file of this set on this host, with the size and the SHA-256 of the manifest.

        The digest is not compared without `check`, nor in a set that was opened with `verify_labels="never"`. The
        path is good for as long as the file is open: the cache may drop it afterwards.

        Raises ShardError for a local file that is missing or another, RemoteError for one that cannot be fetched.
        """
        return self.reader.open(entry, check=check)

    def check_size(self, shard: int, block: int) -> None:
        """Raise ShardError where a local file of the block is missing, or not as large as the manifest says."""
        self.reader.check_size(shard, block)

    def check_sizes(self) -> None:
        """Raise ShardError where a local file is missing, or is not as large as the manifest says.

        Call it before memory or disk is reserved for all rows. What lies on a server is checked as it arrives.
        """
        for entry in self.filled_shards():
            for block in range(self.num_blocks):
                self.check_size(entry.index, block)

    def verified(self, verify_labels: VerifyLabels) -> LabelSet:
        """Return the same label set with its files' digests compared when they are first read, or never.

        Raises UsageError for another word.
        """
        return LabelSet(self.reader.verified(verify_labels))

    def locate(self, key: str) -> tuple[int, int]:
        """Find (shard, row in the shard) of an image. Raises KeyError.

        The first call reads the keys of all shards and keeps 16 bytes for each image.
        """
        hashes, rows = self._load_key_index()
        wanted = np.uint64(rng.hash64(key))
        at = int(np.searchsorted(hashes, wanted))
        # Keys may share a hash: every row with this one is compared by its key.
        while at < len(hashes) and hashes[at] == wanted:
            shard, row = self.position(int(rows[at]))
            if self._shard_cached(shard).keys[row] == key:
                return shard, row
            at += 1
        # Most mistakes are a file name in place of a key, which a key of the set shows.
        raise KeyError(f"{self.location}: no image has the key {key!r}; keys look like {next(self.keys(), '')!r}")

    def position(self, row: int) -> tuple[int, int]:
        """Find (shard, row in the shard) of row number `row`. Raises IndexError, TypeError for anything else."""
        row = operator.index(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return shard, row - int(self.first_row[shard])

    def __getitem__(self, key: str | int) -> ImageLabels:
        """Return the labels of an image by its key or its row number; -1 is the last row.

        Raises KeyError, IndexError or TypeError, for a slice too: `select(rows=...)` takes slices.
        """
        # Also a caller without a type checker gets an answer to the first thing that one tries with a sequence.
        if isinstance(key, slice):  # type: ignore[unreachable]
            raise TypeError("one image at a time: labels.select(rows=slice(0, 3)) gives a label set of several")
        if isinstance(key, str):
            shard, row = self.locate(key)
        else:
            number = operator.index(key)
            # As in a list. Rows of `position` are never negative, where one would be a mistake of ours.
            shard, row = self.position(number + len(self) if -len(self) <= number < 0 else number)
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
            # Oldest first: `move_to_end` below keeps the shards in the order of their last use.
            if len(self._recent) > SHARDS_KEPT:
                self._recent.popitem(last=False)
        self._recent.move_to_end(index)
        return self._recent[index]

    def _load_key_index(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        if self._key_index is None:
            hashes = self.key_hashes()
            # Sorted hashes with their rows: a look-up is a binary search, and no key stays in memory.
            order = np.argsort(hashes, kind="stable")
            self._key_index = hashes[order], order
        return self._key_index

    def select(
        self,
        *,
        keys: Iterable[str] | None = None,
        classes: int | str | Iterable[int | str] | None = None,
        rows: Iterable[int] | slice | npt.NDArray[Any] | None = None,
        where: Where | None = None,
    ) -> LabelSet:
        """Select the images that meet every criterion given, as a view in this label set's order.

        keys: image keys.
        classes: ground-truth classes, by number or name. Images of unknown ground truth have none of them.
        rows: row numbers of this label set, a slice, or a bool mask of shape (len(self),).
        where: a function of a shard's labels (`ShardLabels`: arrays with a leading axis R) that returns a bool mask
            (R,), such as `lambda s: s.class_prob[..., 0].max(axis=1) > 0.5`. It is called shard by shard.

        Views can be selected from again. A view holds 8 bytes for each of its images. Its `identity` depends on the
        rows alone, so that the same selection always fits a saved loader state and another one never does.

        Raises UsageError when nothing is selected, or for a key, class or row that does not exist.
        """
        return self._with_rows(chosen_rows(self, keys=keys, classes=classes, rows=rows, where=where))

    def crop_kind(self, name: str, *, crops: int | None = None) -> LabelSet:
        """Select the crops of one kind, as a view: a label set whose crops 0 .. N - 1 are those of the kind.

        With `crops`, only the first so many of them are shown. Of a label set of layout parquet on a server, only the
        crop blocks of this kind are fetched.

        Raises UsageError for a kind that the label set does not have, and for more crops than there are.
        """
        return LabelSet(select_kind(self.reader, name, crops))

    def split(self, share: float, *, seed: int = 0) -> tuple[LabelSet, LabelSet]:
        """Split into two disjoint views: all images but about `share` of them, and these.

        The side of an image depends on (seed, key) alone: it stays where it is when images are added or left out.

        >>> train, held_out = labels.split(0.3, seed=1)
        >>> len(train) + len(held_out) == len(labels)
        True

        Raises UsageError for a share that is not between 0 and 1, or where one side has no image.
        """
        most, rest = split_rows(self, share, seed)
        return self._with_rows(most), self._with_rows(rest)

    def map_classes(
        self,
        classes: NewClasses,
        *,
        num_classes: int | None = None,
        names: Sequence[str] | None = None,
        keep_images: bool = False,
    ) -> LabelSet:
        """Express this label set in other classes, as a view: fewer of them, merged ones, or other numbers.

        classes: one of
            a dict {old: new}: old classes by number or name, new ones by number, by name, or None where dropped. A
                name may be a synonym ("tench" of "tench, Tinca tinca"), or the class folder.
                Old classes that it leaves out are dropped.
            a list of the new class of every old one: a number, a name, or None (or -1) where dropped.
            a list of names of old classes: these are kept, in this order.
        num_classes: classes of the new numbering, where there are more than the map uses.
        names: names of the new classes. Otherwise as the map gives them, or after the old ones.
        keep_images: where classes are dropped, keep the images of those classes too, with unknown ground truth.
            Otherwise they are left out. Images of unknown ground truth always stay.

        Training targets are recovered over the old classes, mapped, and rescaled to sum to 1. The labels that this
        view shows have the probabilities that the teacher gave to the new classes, not rescaled; buckets follow these,
        so that a crop of something that was dropped counts as hard. See docs/selection.md.

        >>> labels.map_classes({0: "cat", 1: "cat", 2: "dog"}).class_names
        ('cat', 'dog')

        Raises UsageError for classes that do not exist, or when no class or no image is left.
        """
        class_map = make_class_map(
            classes,
            num_old=self.num_classes,
            old_names=self.class_names,
            old_folders=self.class_folders,
            num_classes=num_classes,
            names=names,
        )
        kept: LabelSet = self
        # In terms of the old classes, before the map: afterwards a dropped class looks like an unknown one.
        if class_map.drops and not keep_images:
            stays = class_map.new >= 0
            kept = self._with_rows(rows_by_target(self, lambda target: (target < 0) | in_classes(target, stays)))
        return LabelSet(map_reader(kept.reader, class_map))

    def _with_rows(self, rows: Rows) -> LabelSet:
        """Return these rows of this label set, ascending."""
        # A selection of everything keeps the identity of the set, and so its cache and the states saved with it.
        return self if len(rows) == len(self) else LabelSet(select_rows(self.reader, rows))
