"""The shards that wait for a worker, and those that were with workers when these died."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from ferkd_data.errors import BuildError

DEATHS_PER_SHARD = 3
"""A shard that was with so many workers when they died is not given to another."""


class Backlog:
    def __init__(self) -> None:
        self.shards: deque[int] = deque()
        self.deaths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.shards)

    def add(self, shards: Sequence[int]) -> None:
        self.shards.extend(shards)

    def take(self) -> int:
        return self.shards.popleft()

    def give_back(self, shard: int, how: str) -> None:
        """Its worker died, `how`. Raises BuildError where that happened too often."""
        self.deaths[shard] += 1
        if self.deaths[shard] >= DEATHS_PER_SHARD:
            raise BuildError(
                f"shard {shard}: {self.deaths[shard]} workers died while they labelled it, the last was {how}; if the "
                "system ran out of memory, use fewer --processes or a smaller --batch-size"
            )
        self.shards.appendleft(shard)
