"""`LabelSet`: a finished label set as users have it, and views of one: some of its images, or other classes.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from ferkd_data.class_map import ClassMap, NewClasses, make_class_map, map_columns
from ferkd_data.format.manifest import Manifest
from ferkd_data.label_set.label_set import StoredLabels, VerifyLabels
from ferkd_data.label_set.selection import Rows, Where, chosen_rows, in_classes, rows_by_target, split_rows
from ferkd_data.labels.rows import ShardLabels
from ferkd_data.labels.statistics import Statistics, add, shard_statistics

MAPPED_COLUMNS = ("class_index", "class_prob", "target", "target_prob", "bucket")


class LabelSet(StoredLabels):
    """Soft labels of images, one row each. Made by `open_labels`.

    Rows are numbered 0 .. len - 1 in the order of the shards. `select`, `split` and `map_classes` give views: label
    sets themselves, which everything takes that takes a label set.

        labels = fd.open_labels("out")
        train, held_out = labels.select(classes=["cat", "dog"]).split(0.1)
    """

    @property
    def unmapped(self) -> LabelSet:
        """The same images in terms of the teacher's classes; `self` where there is no class map."""
        return self

    @property
    def class_map(self) -> ClassMap | None:
        """The class map of `map_classes`."""
        return None

    def select(
        self,
        *,
        keys: Iterable[str] | None = None,
        classes: int | str | Iterable[int | str] | None = None,
        rows: Iterable[int] | slice | npt.NDArray[Any] | None = None,
        where: Where | None = None,
    ) -> LabelSet:
        """The images that meet every criterion given, as a view of this label set, in this label set's order.

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

    def split(self, share: float, *, seed: int = 0) -> tuple[LabelSet, LabelSet]:
        """Two disjoint views: all images but about `share` of them, and these.

        The side of an image depends on (seed, key) alone: it stays where it is when images are added or left out.

            train, held_out = labels.split(0.1)

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
        """This label set in terms of other classes, as a view: fewer of them, merged ones, or other numbers.

        classes: one of
            a dict {old: new}: old classes by number or name, new ones by number, by name, or None where dropped.
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

            labels.map_classes({"tabby": "cat", "tiger cat": "cat", "beagle": "dog"})

        Raises UsageError for classes that do not exist, or when no class or no image is left.
        """
        class_map = make_class_map(
            classes, num_old=self.num_classes, old_names=self.class_names, num_classes=num_classes, names=names
        )
        kept: LabelSet = self
        if class_map.drops and not keep_images:
            stays = class_map.new >= 0
            kept = self._with_rows(rows_by_target(self, lambda target: (target < 0) | in_classes(target, stays)))
        return MappedLabels.of(kept, class_map)

    def _with_rows(self, rows: Rows) -> LabelSet:
        """These rows of this label set, ascending."""
        return self if len(rows) == len(self) else Selection(self, rows)


class _View(LabelSet):
    """A label set whose files are another one's."""

    def __init__(self, base: LabelSet, manifest: Manifest, *told: str | bytes) -> None:
        # Its own statistics are counted when asked for; those of a build are of other rows or classes.
        manifest = manifest.model_copy(update={"statistics": Statistics()})
        digest = hashlib.sha256(base.identity.encode())
        for part in told:
            digest.update(part.encode() if isinstance(part, str) else part)
        super().__init__(base.files, manifest, base.num_crops, digest.hexdigest(), base.verify_labels)
        self.base = base
        self._statistics: Statistics | None = None

    def verified(self, verify_labels: VerifyLabels) -> Self:
        other = super().verified(verify_labels)
        other.base = self.base.verified(verify_labels)
        return other

    @property
    def location(self) -> str:
        return self.base.location

    @property
    def is_local(self) -> bool:
        return self.base.is_local

    @property
    def cache_bytes(self) -> int:
        return self.base.cache_bytes

    @property
    def statistics(self) -> Statistics:
        """Statistics of the crops that this view shows, without those per teacher; the first call reads every shard."""
        if self._statistics is None:
            self._statistics = add(map(shard_statistics, self.shards()))
        return self._statistics

    def fetch(self, shard: int, block: int) -> None:
        self.base.fetch(shard, block)


class Selection(_View):
    """Some rows of a label set, as `LabelSet.select` makes it."""

    def __init__(self, base: LabelSet, rows: Rows) -> None:
        counts = np.diff(np.searchsorted(rows, base.first_row)).tolist()
        shards = tuple(
            entry.model_copy(update={"rows": count, "files": entry.files if count else ()})
            for entry, count in zip(base.manifest.shards, counts, strict=True)
        )
        manifest = base.manifest.model_copy(update={"num_images": len(rows), "shards": shards})
        super().__init__(base, manifest, "rows", np.ascontiguousarray(rows, "<i8").tobytes())
        self.rows = rows
        """(len,) int64: the rows of the label set that was opened, ascending."""

    def __repr__(self) -> str:
        return f"<{len(self)} of {self.base!r}>"

    def _with_rows(self, rows: Rows) -> LabelSet:
        return self if len(rows) == len(self) else Selection(self.base, self.rows[rows])

    def _rows_in(self, shard: int) -> Rows:
        """Rows within one of the base's shards."""
        mine = slice(int(self.first_row[shard]), int(self.first_row[shard + 1]))
        return np.asarray(self.rows[mine] - self.base.first_row[shard], np.int64)

    def block(self, shard: int, block: int) -> ShardLabels:
        return self.base.block(shard, block).take(self._rows_in(shard))

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        return self.base.raw_block(shard, block).take(self._rows_in(shard))

    def keys_of(self, shard: int) -> list[str]:
        keys = self.base.keys_of(shard)
        return [keys[row] for row in self._rows_in(shard).tolist()]

    def targets_of(self, shard: int) -> npt.NDArray[np.int32]:
        return self.base.targets_of(shard)[self._rows_in(shard)]

    def image_places(self, shard: int) -> npt.NDArray[np.int64]:
        return self.base.image_places(shard)[self._rows_in(shard)]


class MappedLabels(_View):
    """A label set in terms of other classes, as `LabelSet.map_classes` makes it."""

    def __init__(self, base: LabelSet, class_map: ClassMap) -> None:
        manifest = base.manifest.model_copy(
            update={
                "num_classes": class_map.num_classes,
                "class_names": class_map.names,
                "top_k": min(base.top_k, class_map.num_classes),
            }
        )
        super().__init__(base, manifest, f"classes {class_map.num_classes}", class_map.new.astype("<i8").tobytes())
        self._class_map = class_map

    @classmethod
    def of(cls, labels: LabelSet, class_map: ClassMap) -> MappedLabels:
        """`labels`, which may have a class map already, through one more."""
        before = labels.class_map
        return cls(labels.unmapped, class_map if before is None else before.then(class_map))

    @property
    def unmapped(self) -> LabelSet:
        return self.base

    @property
    def class_map(self) -> ClassMap:
        return self._class_map

    def __repr__(self) -> str:
        return f"<{self.num_classes} classes out of the {self.base.num_classes} of {self.base!r}>"

    def _with_rows(self, rows: Rows) -> LabelSet:
        return self if len(rows) == len(self) else MappedLabels(self.base._with_rows(rows), self._class_map)

    def block(self, shard: int, block: int) -> ShardLabels:
        return self._mapped(self.base.block(shard, block))

    def raw_block(self, shard: int, block: int) -> ShardLabels:
        return self._mapped(self.base.raw_block(shard, block))

    def _mapped(self, labels: ShardLabels) -> ShardLabels:
        columns = {name: getattr(labels, name) for name in MAPPED_COLUMNS}
        changed: dict[str, Any] = {**map_columns(self._class_map, columns, self.manifest.thresholds.absolute())}
        return replace(labels, **changed)

    def keys_of(self, shard: int) -> list[str]:
        return self.base.keys_of(shard)

    def targets_of(self, shard: int) -> npt.NDArray[np.int32]:
        return self._class_map.targets(self.base.targets_of(shard)).astype(np.int32)

    def image_places(self, shard: int) -> npt.NDArray[np.int64]:
        return self.base.image_places(shard)
