"""Rows on their way from the thread that labels a shard to the thread that writes it."""

from __future__ import annotations

import contextlib
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
