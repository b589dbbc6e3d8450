"""Statistics of a shard's rows, taken as they pass by."""

from __future__ import annotations

from ferkd_data import statistics
from ferkd_data.shards.columns import ImageLabels, ShardLabels
from ferkd_data.statistics import Statistics

ROWS_AT_ONCE = 64


class Tally:
    def __init__(self) -> None:
        self._pending: list[ImageLabels] = []
        self._parts: list[Statistics] = []

    def see(self, labels: ImageLabels) -> None:
        self._pending.append(labels)
        if len(self._pending) == ROWS_AT_ONCE:
            self._count()

    def total(self) -> Statistics:
        self._count()
        return statistics.add(self._parts)

    def _count(self) -> None:
        if self._pending:
            rows = ShardLabels.from_rows(self._pending)
            self._parts = [statistics.add([*self._parts, statistics.shard_statistics(rows)])]
            self._pending = []
