"""Shards labelled one after the other, each written and saved while the next one is labelled.

Compression, the disk and the store cost the teachers no time. Three threads share the work:

- the labelling thread, which calls `WriteBehind.label`, makes rows and owns the shard's rejects and teacher counts;
- two writing threads: one takes the rows of the shard in work out of its `RowQueue`, the other may still be saving the
  shard before.

Everything passes from the labelling thread to a writing thread through the queue: rows, and at the end a `ShardEnd`.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ferkd_data.builder.labelling.job import Tools
from ferkd_data.builder.labelling.label_shard import LabelledBatch, TeacherCounts, label_shard
from ferkd_data.builder.locks import explain_unwritable
from ferkd_data.builder.plan import Plan
from ferkd_data.builder.shard_files import ShardRecord
from ferkd_data.builder.state import BuildFolder
from ferkd_data.errors import BuildError
from ferkd_data.format.writers import Row, write_shard
from ferkd_data.images import Reject
from ferkd_data.labels import statistics
from ferkd_data.labels.rows import ImageLabels, ShardLabels
from ferkd_data.labels.statistics import Statistics

ROWS_AHEAD = 64
"""Rows that may wait to be written. A slow disk then slows the teachers down, and does not fill the memory."""
LOOK_SECONDS = 0.5
"""Seconds after which a labelling thread that waits for room in the queue looks whether its writer has failed."""

OnBatch = Callable[[int, int], None]
"""Called with the number of crops just labelled, and of images rejected so far in this shard."""
OnSaved = Callable[[ShardRecord], None]


ROWS_AT_ONCE = 64
"""Rows that are counted together."""


class RowCounts:
    """Accumulator of the statistics of rows. Belongs to the thread that writes the rows."""

    def __init__(self) -> None:
        self._pending: list[ImageLabels] = []
        self._total = Statistics()

    def add(self, labels: ImageLabels) -> None:
        # In groups, since NumPy's calls have a price, however short the arrays.
        self._pending.append(labels)
        if len(self._pending) == ROWS_AT_ONCE:
            self._count()

    def total(self) -> Statistics:
        self._count()
        return self._total

    def _count(self) -> None:
        if self._pending:
            rows = ShardLabels.from_rows(self._pending)
            self._total = statistics.add([self._total, statistics.shard_statistics(rows)])
            self._pending = []


class BrokenOffError(Exception):
    """Raised in the writing thread: the shard is not labelled to its end."""


@dataclass(frozen=True, kw_only=True)
class ShardEnd:
    """Follows the last row of a shard: all that is known of the shard besides its rows."""

    rejects: tuple[Reject, ...]
    counts: TeacherCounts


class RowQueue:
    """The rows of one shard: put in by the labelling thread, iterated by a writing thread."""

    def __init__(self) -> None:
        self.end: ShardEnd | None = None
        """Set in the iterating thread, when its iteration is over."""
        self._rows: queue.Queue[Row | ShardEnd | None] = queue.Queue(ROWS_AHEAD)
        """None only wakes a writer up, to see that the shard was broken off."""
        self._broken_off = False

    def put(self, row: Row, writer: Future[Any]) -> None:
        """Wait for room and add a row. Raises what `writer` raised."""
        self._put(row, writer)
        # A writer takes rows until the ShardEnd. One that is done before has failed, and says how.
        if writer.done():
            writer.result()

    def close(self, end: ShardEnd, writer: Future[Any]) -> None:
        """Say that there are no more rows."""
        self._put(end, writer)

    def break_off(self) -> None:
        """Make the writer raise BrokenOffError: there will be no more rows, and those before are of no use."""
        # The flag before the wake-up: whatever the writer takes next, it sees the flag.
        self._broken_off = True
        with contextlib.suppress(queue.Full):  # a writer that has rows to take sees it with the next one
            self._rows.put_nowait(None)

    def __iter__(self) -> Iterator[Row]:
        while True:
            row = self._rows.get()
            if self._broken_off or row is None:
                raise BrokenOffError
            if isinstance(row, ShardEnd):
                self.end = row
                return
            yield row

    def _put(self, row: Row | ShardEnd, writer: Future[Any]) -> None:
        # Not a plain put: the queue of a writer that has failed stays full for ever. The row is dropped then; `put` or
        # `settle` raises what the writer raised.
        while not writer.done():
            try:
                self._rows.put(row, timeout=LOOK_SECONDS)
                return
            except queue.Full:
                continue


class WriteBehind:
    """A context that labels shards. Leaving it waits for the shard that is being written, also after an error.

    At most two shards are in memory: the one that is labelled, and the one before.
    """

    def __init__(self, folder: BuildFolder, plan: Plan, tools: Tools, on_saved: OnSaved) -> None:
        """Start no thread yet. `on_saved` will be called in the thread that calls `label` and `settle`."""
        self.folder = folder
        self.plan = plan
        self.tools = tools
        self.on_saved = on_saved
        # Two are enough: `label` returns when the shard before is saved, so no third is being written.
        self._writers = ThreadPoolExecutor(2, thread_name_prefix="ferkd-data-write")
        self._before: Future[ShardRecord] | None = None
        """The shard that is labelled, and may not be written yet."""

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writers.shutdown()

    def label(self, shard: int, on_batch: OnBatch) -> None:
        """Return when all of the shard is labelled and the shard before is saved.

        Raises what labelling it, or writing either of them, raised; BuildError for an image that has labels already,
        and cannot be used any more or is another now. Nothing can be labelled after that.
        """
        rows = RowQueue()
        try:
            writer = self._writers.submit(self._write_and_save, shard, rows)
            rejects: list[Reject] = []
            counts = TeacherCounts.zeros(len(self.tools.teachers))
            for item in self._labelled(shard):
                if isinstance(item, Reject):
                    rejects.append(item)
                    continue
                counts += item.counts
                on_batch(item.crops, len(rejects))
                for row in item.rows:
                    rows.put(row, writer)
                    # Between rows, since a shard may take an hour: its record then does not wait for the next shard.
                    if self._before is not None and self._before.done():
                        self.settle()
            # Before the end is handed over: only then can this shard become the one before.
            self.settle()
            rows.close(ShardEnd(rejects=tuple(rejects), counts=counts), writer)
        except BaseException:
            rows.break_off()
            # The error may end this process, and the shard before is whole: it must be saved first.
            self._writers.shutdown()
            raise
        self._before = writer

    def settle(self) -> None:
        """Return when all that is labelled is saved. Raises what that raised."""
        if self._before is not None:
            # Cleared first, so that an error is raised once.
            before, self._before = self._before, None
            self.on_saved(before.result())

    def _labelled(self, shard: int) -> Iterator[LabelledBatch | Reject]:
        batches = label_shard(self.plan.refs(shard), self.tools, self.plan.first_crop(shard))
        return _unchanged(batches, self.plan.digests(shard)) if self.plan.is_known(shard) else batches

    def _write_and_save(self, shard: int, rows: RowQueue) -> ShardRecord:
        """Write a shard, in a writing thread. The record is saved after the files, since it vouches for them."""
        with explain_unwritable(self.folder.location):
            record = self._files_and_record(shard, rows)
            self.folder.files.save(record)
        return record

    def _files_and_record(self, shard: int, rows: RowQueue) -> ShardRecord:
        job = self.tools.job
        first_crop = self.plan.first_crop(shard)
        row_counts = RowCounts()
        num_rows, files = write_shard(
            self.folder.out,
            shard,
            _counted(rows, row_counts),
            layout=job.settings.layout,
            # An extension labels crops from `first_crop` on, where a block begins: those of its files start there.
            block_starts=[start - first_crop for start in job.settings.block_starts if start >= first_crop],
            first_block=first_crop // job.settings.crops_per_block,
        )
        # Not reached in practice, since `rows` raises it itself; type checkers do not know that.
        if rows.end is None:
            raise BrokenOffError
        return ShardRecord(
            index=shard,
            rows=num_rows,
            files=files,
            rejects=rows.end.rejects,
            statistics=row_counts.total().model_copy(update=rows.end.counts.statistics()),
            thresholds=(job.thresholds.low, job.thresholds.mid, job.thresholds.top),
        )


def _counted(rows: Iterable[Row], row_counts: RowCounts) -> Iterator[Row]:
    for labels, image in rows:
        row_counts.add(labels)
        yield labels, image


def _unchanged(batches: Iterable[LabelledBatch | Reject], digests: Sequence[bytes]) -> Iterator[LabelledBatch | Reject]:
    """Check that every image is the one that has labels already, since all its crops must be of the same pixels."""
    expected = iter(digests)
    for item in batches:
        if isinstance(item, Reject):
            raise BuildError(
                f"image {item.key!r} has labels already and cannot get more crops ({item.reason}: {item.detail}); "
                "bring back the file that was labelled and run the same command again"
            )
        for labels, _ in item.rows:
            if labels.image_digest != next(expected):
                raise BuildError(
                    f"image {labels.key!r} is not the one that was labelled: its bytes have changed since, so it "
                    "cannot get more crops. Bring the old file back, or label the images as they are now into another "
                    "folder"
                )
        yield item
