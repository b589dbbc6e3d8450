"""The plan of an extension: the images of a label set that get more crops, in its own shards; then the new images.

Its digest is that of the label set's plan where no image is new, else over that digest and the new keys and targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ferkd_data.builder.base import Base
from ferkd_data.builder.known_images import KnownImages
from ferkd_data.builder.plan import Plan, PlanWriter, open_plan, save_plan
from ferkd_data.builder.rejects import read_rejects, readable
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.errors import SettingsMismatchError, SourceError
from ferkd_data.images import ImageSource, Reject
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.shards import parquet, webdataset
from ferkd_data.shards.columns import UNKNOWN_TARGET


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
        self.num_known = base.manifest.num_images
        self.num_new = 0
        self.num_found = 0
        self.max_target = -1

    def plan(self) -> Plan:
        manifest = self.base.manifest
        plan_sha256 = manifest.source.plan_sha256
        with KnownImages() as known, PlanWriter(self.folder, digest_of=plan_sha256) as writer:
            self._learn(known)
            self._list(known, writer)
            for reject in read_rejects(self.base.out / manifest.rejects.path):
                if not known.is_listed(reject.key):
                    writer.add_reject(reject)
            if self.more_crops:
                self._add_known_shards(known, writer)
            self._add_new_shards(known, writer)
        shards = len(manifest.shards)
        summary = writer.summary(self.source.class_names)
        changes = {
            "max_target": max(self.max_target, summary.max_target),
            "sha256": summary.sha256 if self.num_new else plan_sha256,
            "first_shard": 0 if self.more_crops else shards,
            "known_shards": shards if self.more_crops else 0,
            "known_images": self.num_known if self.more_crops else 0,
            "known_crops": manifest.num_crops,
            "all_listed": self.num_found == self.num_known,
        }
        return save_plan(self.folder, summary.model_copy(update=changes))

    def _learn(self, known: KnownImages) -> None:
        row = 0
        for keys, targets, _ in self._rows():
            known.add_labelled(row, keys, targets)
            row += len(keys)
        known.add_rejected(reject.key for reject in read_rejects(self.base.out / self.base.manifest.rejects.path))

    def _list(self, known: KnownImages, writer: PlanWriter) -> None:
        """Every image of the source gets its row: the one that it has, or one after all of those."""
        for item in self.source.list_images():
            known.note_listed(readable(item.key))
            if isinstance(item, Reject):
                writer.add_reject(item)
                continue
            found = known.find(item.key)
            if found is None:
                known.place(self.num_known + self.num_new, item)
                self.num_new += 1
                continue
            self.num_found += 1
            self.max_target = max(self.max_target, -1 if item.target is None else item.target)
            if item.target != found.target:
                raise SettingsMismatchError(
                    f"{self.base.out}: image {item.key!r} has another target in {self.source.description}: saved "
                    f"{found.target}, now {item.target}; give the --classes that the label set was built with"
                )
            if self.more_crops:
                known.place(found.row, item)

    def _add_known_shards(self, known: KnownImages, writer: PlanWriter) -> None:
        row = 0
        for keys, _, digests in self._rows():
            placed = known.placed(row, row + len(keys))
            for number, key in enumerate(keys, row):
                if number not in placed:
                    raise SourceError(
                        f"image {key!r} has labels in {self.base.out}, and is not in {self.source.description}: it "
                        "cannot get more crops. Put it back, or leave out --crops to add new images alone"
                    )
            writer.add_shard(list(placed.values()), digests)
            row += len(keys)

    def _add_new_shards(self, known: KnownImages, writer: PlanWriter) -> None:
        end = self.num_known + self.num_new
        for start in range(self.num_known, end, self.images_per_shard):
            writer.add_shard(list(known.placed(start, min(start + self.images_per_shard, end)).values()))

    def _rows(self) -> Iterator[tuple[list[str], list[int | None], list[bytes]]]:
        """(keys, targets, digests) of each shard of the label set; digests in layout parquet alone."""
        for entry in self.base.manifest.shards:
            if not entry.rows:
                yield [], [], []
                continue
            with self.labels.open(entry.files[0]) as file:
                if self.base.manifest.layout == "parquet":
                    yield parquet.read_identities(file.path, rows=entry.rows)
                    continue
                samples = list(webdataset.scan(file.path))
            targets = [None if sample.target == UNKNOWN_TARGET else sample.target for sample in samples]
            yield [sample.key for sample in samples], targets, []
