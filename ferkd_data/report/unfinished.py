"""Read a build that still runs, or was interrupted: its finished shards form a label set that grows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ferkd_data
from ferkd_data.builder.plan import open_plan
from ferkd_data.builder.seal import SealedContents, manifest_of
from ferkd_data.builder.shard_files import FOLDER, DiskFiles, ShardRecord
from ferkd_data.builder.state import BuildFolder
from ferkd_data.errors import BuildError
from ferkd_data.format.manifest import UNKNOWN_SHA256, RejectsEntry, ShardEntry
from ferkd_data.format.manifest_file import FILE_NAME
from ferkd_data.format.rejects import REJECTS_NAME
from ferkd_data.label_set import LabelSet, LocalFiles, StoredReader
from ferkd_data.labels import statistics
from ferkd_data.labels.buckets import Thresholds
from ferkd_data.labels.statistics import Statistics
from ferkd_data.remote import is_remote
from ferkd_data.report.collect import Collected, Collector
from ferkd_data.storage import label_folder


@dataclass(frozen=True, kw_only=True)
class ShardProgress:
    """ShardProgress of a build that has not ended."""

    shards_done: int
    shards_total: int
    images_total: int
    provisional: bool = False
    """Whether others stand in for the thresholds, which were asked for as shares of all crops, until the build ends."""


def open_unfinished(path: str | Path) -> Unfinished | None:
    """Open the build in a folder; None for a URL, and for a folder with a finished label set or none at all.

    Raises BuildError where the build has not begun to label.
    """
    if is_remote(path):
        return None
    out = label_folder(path)
    # With a manifest the set is finished, also where an extension runs in it: that has its old files as they are.
    if (out / FILE_NAME).exists() or not (out / FOLDER).is_dir():
        return None
    if not BuildFolder(out).is_begun:
        raise BuildError(f"{out}: its build has not labelled anything yet; look again when its first shard is done")
    return Unfinished(BuildFolder(out))


class Unfinished:
    """Collect the shards of a build as they are finished."""

    def __init__(self, folder: BuildFolder) -> None:
        self._folder = folder
        self._settings, self._facts = folder.saved_settings(), folder.saved_facts()
        self._plan = open_plan(folder.path)
        # Shards not seen as finished yet. The build writes a record for each when its files are in place.
        self._left = set(self._plan.shards)
        self._entries: list[ShardEntry] = []
        self._rejects = 0
        self._statistics = Statistics()
        self._thresholds: tuple[float, float, float] | None = None
        self._collector = Collector(self.labels())

    @property
    def progress(self) -> ShardProgress:
        """Number of shards added so far, and in all."""
        summary = self._plan.summary
        total = len(self._plan.shards)
        return ShardProgress(
            shards_done=total - len(self._left),
            shards_total=total,
            images_total=summary.images,
            provisional=not isinstance(self._settings.thresholds, Thresholds),
        )

    def add_new_shards(self) -> int:
        """Add the shards that were finished since the last call; return their number."""
        found = [record for _, record in self._folder.files.records(sorted(self._left)) if record is not None]
        for record in found:
            self._add(record)
        return len(found)

    def _add(self, record: ShardRecord) -> None:
        self._left.discard(record.index)
        # Numbered in the order of their end: a label set's shards have no gaps.
        files = DiskFiles(self._folder.out).files_now(record) if record.successors else record.files
        self._entries.append(ShardEntry(index=len(self._entries), rows=record.rows, files=files))
        self._statistics = statistics.add([self._statistics, record.statistics])
        self._rejects += len(record.rejects)
        self._thresholds = record.thresholds
        for reject in record.rejects:
            self._collector.add_reject(reject)
        if record.rows:
            self._collector.add(self.labels().shard(len(self._entries) - 1))

    def found(self) -> Collected:
        """Return what was collected from the shards so far."""
        return self._collector.finish(self.labels())

    def labels(self) -> LabelSet:
        """Open the shards so far as a label set, with the manifest that the build would write if it ended now."""
        settings, asked = self._settings, self._settings.thresholds
        # Quantile thresholds are resolved at the end of a build; until then, buckets are provisional.
        low, mid, top = self._thresholds or (
            (asked.low, asked.mid, asked.top) if isinstance(asked, Thresholds) else (0.0, 0.0, 1.0)
        )
        contents = SealedContents(
            shards=tuple(self._entries),
            rejects=RejectsEntry(path=REJECTS_NAME, rows=self._rejects, bytes=0, sha256=UNKNOWN_SHA256),
            images_seen=sum(entry.rows for entry in self._entries) + self._rejects,
            statistics=self._statistics,
            thresholds=Thresholds(low=low, mid=mid, top=top, confidence=asked.confidence),
        )
        manifest = manifest_of(settings, self._facts, self._plan, contents, ferkd_data.__version__)
        return LabelSet(
            StoredReader(
                files=LocalFiles(self._folder.out),
                manifest=manifest,
                num_crops=settings.crops,
                # Never used as a cache's or state's key: this label set is only read here.
                identity="unfinished",
            )
        )
