"""The plan of an extension: the images of a label set that get more crops, in its own shards; then the new images.

Its digest is that of the label set's plan where no image is new, else over that digest and the new keys and targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat, takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa

from ferkd_data.builder.extension.base import Base
from ferkd_data.builder.extension.known_images import KnownImages
from ferkd_data.builder.plan import Plan, PlanWriter, open_plan, save_plan
from ferkd_data.builder.rejects import check_rejects, read_rejects, readable
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.errors import SettingsMismatchError, SourceError
from ferkd_data.images import ImageRef, ImageSource, Reject, in_groups
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.shards.columns import DIGEST_BYTES, UNKNOWN_TARGET

CHUNK = 4096
"""Items that are dealt with together."""


def load_or_make_extension(source: ImageSource, folder: Path, base: Base, settings: BuildSettings) -> Plan:
    """The plan that an earlier run of this extension made, or a new one.

    Raises SourceError for a labelled image that is to get more crops and is not in the source any more,
    SettingsMismatchError for one that has another target there.
    """
    if (folder / "plan.json").exists():
        return open_plan(folder)
    return _Extension(source, folder, base, settings).plan()


class _Extension:
    def __init__(self, source: ImageSource, folder: Path, base: Base, settings: BuildSettings) -> None:
        self.source = source
        self.folder = folder
        self.base = base
        self.labels: LabelSet = open_labels(base.out)
        self.images_per_shard = settings.shard_images
        self.more_crops = settings.crops > base.manifest.num_crops
        self.rejects_path = base.out / base.manifest.rejects.path

    def plan(self) -> Plan:
        manifest = self.base.manifest
        plan_sha256 = manifest.source.plan_sha256
        with self.labels.open(manifest.rejects) as rejects:
            check_rejects(rejects.path, manifest.rejects.rows)
        num_known, num_rejected = manifest.num_images, manifest.rejects.rows
        with KnownImages(num_known, num_rejected) as known, PlanWriter(self.folder, digest_of=plan_sha256) as writer:
            self._learn(known)
            self._list(known, writer)
            known.join(place_known=self.more_crops)
            self._check(known)
            for reject, is_gone in zip(read_rejects(self.rejects_path), known.is_gone, strict=True):
                if is_gone:
                    writer.add_reject(reject)
            known_sizes = [entry.rows for entry in manifest.shards] if self.more_crops else []
            shards = known.placed(chain(known_sizes, repeat(self.images_per_shard)))
            for rows in islice(shards, len(known_sizes)):
                writer.add_shard(rows, are_known=True)
            for rows in takewhile(len, shards):
                writer.add_shard(rows)
        num_shards = len(manifest.shards)
        summary = writer.summary(self.source)
        changes = {
            "max_target": known.max_target,
            "sha256": plan_sha256 if known.num_found == known.num_listed else summary.sha256,
            "first_shard": 0 if self.more_crops else num_shards,
            "known_shards": num_shards if self.more_crops else 0,
            "known_images": num_known if self.more_crops else 0,
            "known_crops": manifest.num_crops,
            "all_listed": known.num_found == num_known,
        }
        return save_plan(self.folder, summary.model_copy(update=changes))

    def _learn(self, known: KnownImages) -> None:
        row = 0
        for keys, targets, digests in self._identities():
            known.add_labelled(row, keys, targets, digests)
            row += len(keys)
        for rejects in in_groups(enumerate(read_rejects(self.rejects_path)), CHUNK):
            known.add_rejected(rejects[0][0], [reject.key for _, reject in rejects])

    def _list(self, known: KnownImages, writer: PlanWriter) -> None:
        for items in in_groups(self.source.list_images(), CHUNK):
            known.add_listed([item for item in items if isinstance(item, ImageRef)])
            rejects = [item for item in items if isinstance(item, Reject)]
            known.add_named([readable(reject.key) for reject in rejects])
            for reject in rejects:
                writer.add_reject(reject)

    def _check(self, known: KnownImages) -> None:
        if known.mismatch is not None:
            _, key, saved, now = known.mismatch
            raise SettingsMismatchError(
                f"{self.base.out}: image {key!r} has another target in {self.source.description}: saved "
                f"{saved}, now {now}; give the --classes that the label set was built with"
            )
        if known.missing is not None and self.more_crops:
            raise SourceError(
                f"image {known.missing.key!r} has labels in {self.base.out}, and is not in {self.source.description}: "
                "it cannot get more crops. Put it back, or leave out --crops to add new images alone"
            )

    def _identities(self) -> Iterator[tuple[Sequence[str], pa.Array, Any]]:
        """(keys, targets, digests) of each shard of the label set; digests in layout parquet alone.

        Every file of the label set is read and checked, since the extended set vouches for the old files too. Raises
        ShardError for one that was damaged, or that says what no label set may say.
        """
        for entry in filter(attrgetter("rows"), self.base.manifest.shards):
            first = self.labels.block(entry.index, 0)
            for block in range(1, self.labels.num_blocks):
                self.labels.block(entry.index, block)
            targets = pa.array(first.target, mask=first.target == UNKNOWN_TARGET)
            if self.base.manifest.layout == "parquet":
                digests = pa.array(map(bytes, first.image_digest), pa.binary(DIGEST_BYTES))
                yield first.keys, targets, digests
            else:
                yield first.keys, targets, [None] * len(first)
