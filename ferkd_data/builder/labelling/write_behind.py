"""Rows on their way from the thread that labels a shard to the thread that writes it.

Shards labelled one after the other, each written and saved while the next one is labelled.

What is written costs the teachers nothing: not the compression, not the disk, not the store that it is sent to.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any

from ferkd_data.builder.labelling.counts import Tally, TeacherCounts
from ferkd_data.builder.labelling.crop_batches import Rejected
from ferkd_data.builder.labelling.label_shard import OnBatch, Tools, label_shard
from ferkd_data.builder.locks import explain_unwritable
from ferkd_data.builder.plan import Plan
from ferkd_data.builder.state import BuildFolder, RejectRecord, ShardRecord
from ferkd_data.errors import BuildError
from ferkd_data.format.writers import Row, write_shard
from ferkd_data.labels.rows import ImageLabels

ROWS_AHEAD = 64
"""Rows that wait to be written: a disk that is slow then slows the teachers down, and does not fill the memory."""
LOOK_SECONDS = 0.5
"""How soon whoever waits for room notices that the writer has failed."""


class Handover:
    """Filled by one thread, iterated by another."""

    def __init__(self) -> None:
        self._rows: queue.Queue[Row | None] = queue.Queue(ROWS_AHEAD)
        """None is the end."""
        self._broken_off = False

    def put(self, row: Row, writer: Future[Any]) -> None:
        """Waits for room. Raises what `writer` raised."""
        self._put(row, writer)
        if writer.done():
            writer.result()

    def end(self, writer: Future[Any]) -> None:
        """There are no more rows."""
        self._put(None, writer)

    def break_off(self) -> None:
        """There will be no more rows, and those that there were are of no use: the writer raises BrokenOffError."""
        self._broken_off = True
        with contextlib.suppress(queue.Full):  # a writer that has rows to take sees it with the next one
            self._rows.put_nowait(None)

    def __iter__(self) -> Iterator[Row]:
        while (row := self._rows.get()) is not None and not self._broken_off:
            yield row
        if self._broken_off:
            raise BrokenOffError

    def _put(self, row: Row | None, writer: Future[Any]) -> None:
        while not writer.done():
            try:
                self._rows.put(row, timeout=LOOK_SECONDS)
                return
            except queue.Full:
                continue


class BrokenOffError(Exception):
    """The shard is not labelled to its end."""


OnSaved = Callable[[ShardRecord], None]


class WriteBehind:
    """A context: what is being written when it is left is written to its end, also after an error.

    At most two shards are in memory: one that is labelled, and the one before.
    """

    def __init__(self, folder: BuildFolder, plan: Plan, tools: Tools, on_saved: OnSaved) -> None:
        """`on_saved` is called in the thread that calls `label` and `settle`."""
        self.folder = folder
        self.plan = plan
        self.tools = tools
        self.on_saved = on_saved
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="ferkd-data-write")
        self._before: Future[ShardRecord] | None = None
        """The shard that is labelled, and may not be written yet."""

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()

    def label(self, shard: int, on_batch: OnBatch) -> None:
        """Returns when all of it is labelled and the shard before is saved.

        Raises what labelling it, or writing either of them, raised; BuildError for an image that has labels already,
        and cannot be used any more or is another now. Nothing can be labelled after that.
        """
        work = _Work(shard, len(self.tools.teachers))
        try:
            writer = self._threads.submit(self._write, work)
            for row in self._rows(work, on_batch):
                work.rows.put(row, writer)
                if self._before is not None and self._before.done():
                    self.settle()
            self.settle()
            work.rows.end(writer)
        except BaseException:
            work.rows.break_off()
            # Whoever hears of the error may end this process, and the shard before is whole.
            self._threads.shutdown()
            raise
        self._before = writer

    def settle(self) -> None:
        """Returns when all that is labelled is saved. Raises what that raised."""
        if self._before is not None:
            before, self._before = self._before, None
            self.on_saved(before.result())

    def _rows(self, work: _Work, on_batch: OnBatch) -> Iterator[Row]:
        tools = replace(self.tools, first_crop=self.plan.first_crop(work.shard))
        rows = label_shard(self.plan.refs(work.shard), tools, work.rejected, work.counts, on_batch)
        if self.plan.is_known(work.shard):
            return _unchanged(rows, self.plan.digests(work.shard), work.rejected)
        return rows

    def _write(self, work: _Work) -> ShardRecord:
        with explain_unwritable(self.folder.place):
            record = self._write_shard(work)
            self.folder.save(record)
        return record

    def _write_shard(self, work: _Work) -> ShardRecord:
        settings, thresholds = self.tools.settings, self.tools.thresholds
        first_crop = self.plan.first_crop(work.shard)
        tally = Tally()
        num_rows, files = write_shard(
            self.folder.out,
            work.shard,
            _counted(work.rows, tally),
            layout=settings.layout,
            block_starts=[start - first_crop for start in settings.block_starts if start >= first_crop],
            first_block=first_crop // settings.crops_per_block,
        )
        return ShardRecord(
            index=work.shard,
            rows=num_rows,
            files=files,
            rejects=tuple(
                RejectRecord(key=item.key, reason=item.reason, detail=item.detail) for item in work.rejected.items
            ),
            statistics=tally.total().model_copy(update=work.counts.statistics()),
            thresholds=(thresholds.low, thresholds.mid, thresholds.top),
        )


class _Work:
    """A shard between the threads: what is filled by the one that labels is read by the one that writes."""

    def __init__(self, shard: int, num_teachers: int) -> None:
        self.shard = shard
        self.rows = Handover()
        self.rejected = Rejected()
        """Whole when the rows have ended, as `counts` is."""
        self.counts = TeacherCounts.zeros(num_teachers)


def _counted(rows: Iterable[Row], tally: Tally) -> Iterator[Row]:
    for labels, image in rows:
        tally.see(labels)
        yield labels, image


def _unchanged(
    rows: Iterable[tuple[ImageLabels, bytes]], digests: Sequence[bytes], rejected: Rejected
) -> Iterator[Row]:
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
