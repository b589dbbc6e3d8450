"""The engine of one process: the shards one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ferkd_data import statistics
from ferkd_data.builder.crop_batches import Rejected
from ferkd_data.builder.forwards import Nobody
from ferkd_data.builder.label_shard import OnBatch, TeacherCounts, Tools, label_shard
from ferkd_data.builder.plan import Plan
from ferkd_data.builder.progress import ProgressCounter
from ferkd_data.builder.state import BuildFolder, RejectRecord, ShardRecord
from ferkd_data.builder.stop import Stop
from ferkd_data.errors import BuildError
from ferkd_data.shards.columns import ImageLabels, ShardLabels
from ferkd_data.shards.writers import Row, write_shard
from ferkd_data.statistics import Statistics

STATISTICS_ROWS = 64
"""Rows whose statistics are taken at a time."""


def label_here(
    folder: BuildFolder, plan: Plan, tools: Tools, shards: Sequence[int], counter: ProgressCounter, stop: Stop
) -> None:
    counter.worker_started(0, tools.device)
    for shard in shards:
        if stop.requested:
            raise stop.error()
        counter.shard_begun(shard)

        def on_batch(crops: int, rejects: int, shard: int = shard) -> None:
            counter.batch(shard, crops, rejects)
            if stop.expired:
                raise stop.error()

        record = label_one(folder, plan, tools, shard, on_batch)
        folder.save(record)
        counter.shard_done(record)


class Reporting(Nobody):
    """Passes on what the teachers of this process are at, as far as anybody wants to know."""

    def __init__(self, counter: ProgressCounter) -> None:
        self.counter = counter

    def halved(self, teacher: str, crops: int) -> None:
        self.counter.halved(teacher, crops)


def label_one(folder: BuildFolder, plan: Plan, tools: Tools, shard: int, on_batch: OnBatch) -> ShardRecord:
    """Write the files of one shard. The record that is returned is not saved yet.

    Raises BuildError for an image that has labels already, and cannot be used any more or is another now.
    """
    settings = tools.settings
    first_crop = plan.first_crop(shard)
    tools = replace(tools, first_crop=first_crop)
    rejected = Rejected()
    counts = TeacherCounts.zeros(len(tools.teachers))
    tally = _Tally()
    rows: Iterator[Row] = label_shard(plan.refs(shard), tools, rejected, counts, on_batch)
    if plan.is_known(shard):
        rows = _unchanged(rows, plan.digests(shard), rejected)
    num_rows, files = write_shard(
        folder.out,
        shard,
        (tally.see(labels, image) for labels, image in rows),
        layout=settings.layout,
        block_starts=[start - first_crop for start in settings.block_starts if start >= first_crop],
        first_block=first_crop // settings.crops_per_block,
    )
    thresholds = tools.thresholds
    return ShardRecord(
        index=shard,
        rows=num_rows,
        files=files,
        rejects=tuple(RejectRecord(key=item.key, reason=item.reason, detail=item.detail) for item in rejected.items),
        statistics=tally.total().model_copy(
            update={
                "teacher_top1_matches_target": tuple(counts.matches.tolist()),
                "teacher_agreement": tuple(tuple(row) for row in counts.agreement.tolist()),
            }
        ),
        thresholds=(thresholds.low, thresholds.mid, thresholds.top),
    )


def _unchanged(rows: Iterable[Row], digests: Sequence[bytes], rejected: Rejected) -> Iterator[Row]:
    """Every crop of an image must be of the same image."""
    for (labels, image), digest in zip(rows, digests, strict=False):
        _none_rejected(rejected)
        if labels.image_digest != digest:
            raise BuildError(
                f"image {labels.key!r} is not the one that was labelled: its bytes have changed since, so it cannot "
                "get more crops. Bring the old file back, or label the images as they are now into another folder"
            )
        yield labels, image
    _none_rejected(rejected)


def _none_rejected(rejected: Rejected) -> None:
    if rejected.items:
        first = rejected.items[0]
        raise BuildError(
            f"image {first.key!r} has labels already and cannot get more crops ({first.reason}: {first.detail}); bring "
            "back the file that was labelled and run the same command again"
        )


class _Tally:
    """Statistics of rows as they pass by."""

    def __init__(self) -> None:
        self._pending: list[ImageLabels] = []
        self._parts: list[Statistics] = []

    def see(self, labels: ImageLabels, image: bytes) -> tuple[ImageLabels, bytes]:
        self._pending.append(labels)
        if len(self._pending) == STATISTICS_ROWS:
            self._count()
        return labels, image

    def total(self) -> Statistics:
        self._count()
        return statistics.add(self._parts)

    def _count(self) -> None:
        if self._pending:
            rows = ShardLabels.from_rows(self._pending)
            self._parts = [statistics.add([*self._parts, shard_statistics(rows)])]
            self._pending = []


def shard_statistics(labels: ShardLabels) -> Statistics:
    return statistics.crop_statistics(
        class_index=labels.class_index,
        class_prob=labels.class_prob,
        target_prob=labels.target_prob,
        bucket=labels.bucket,
        target=labels.target,
    )
