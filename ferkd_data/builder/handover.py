"""Rows on their way from the thread that labels a shard to the thread that writes it."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from ferkd_data.shards.writers import Row

ROWS_AHEAD = 64
"""Rows that wait to be written: a disk that is slow then slows the teachers down, and does not fill the memory."""
LOOK_SECONDS = 0.5
"""How soon whoever waits for room notices that the writer has failed."""


class Handover:
    """Filled by one thread, iterated by another."""

    def __init__(self) -> None:
        self._rows: queue.Queue[Row | _End] = queue.Queue(ROWS_AHEAD)

    def put(self, row: Row, writer: Future[Any]) -> None:
        """Waits for room. Raises what `writer` raised."""
        self._put(row, writer)
        if writer.done():
            writer.result()

    def end(self, writer: Future[Any]) -> None:
        """There are no more rows."""
        self._put(_End(whole=True), writer)

    def break_off(self, writer: Future[Any]) -> None:
        """There will be no more rows, and those that there were are of no use: the writer raises BrokenOffError."""
        self._put(_End(whole=False), writer)

    def __iter__(self) -> Iterator[Row]:
        while not isinstance(row := self._rows.get(), _End):
            yield row
        if not row.whole:
            raise BrokenOffError

    def _put(self, row: Row | _End, writer: Future[Any]) -> None:
        while not writer.done():
            try:
                self._rows.put(row, timeout=LOOK_SECONDS)
                return
            except queue.Full:
                continue


class BrokenOffError(Exception):
    """The shard is not labelled to its end."""


class _End:
    def __init__(self, *, whole: bool) -> None:
        self.whole = whole
