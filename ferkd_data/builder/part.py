"""One part of a build for a batch system: every n-th shard."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ferkd_data.errors import UsageError

PATTERN = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, kw_only=True)
class Part:
    number: int
    """1 .. of"""
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise UsageError(f"a part is 1/N .. N/N, got {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Part:
        found = PATTERN.fullmatch(text.strip())
        if found is None:
            raise UsageError(f"a part is I/N such as 3/8, got {text!r}")
        return cls(number=int(found[1]), of=int(found[2]))

    def has(self, shard: int) -> bool:
        return shard % self.of == self.number - 1

    def shards(self, planned: range) -> list[int]:
        """Spread over the whole, since a source's images are often sorted by size or class."""
        return [shard for shard in planned if self.has(shard)]
