"""`rejects.parquet`: the images that could not be used, each with its key and the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from ferkd_data.format import parquet
from ferkd_data.format.manifest import RejectsEntry
from ferkd_data.images import Reject
from ferkd_data.storage import sha256_file

REJECTS_NAME = "rejects.parquet"
REJECTS_FILE = re.compile(r"rejects(-\d+)?\.parquet")
"""Names of rejects files: an extension writes a new one, so that the old manifest stays true until its end."""
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
BUFFERED = 4096
LONGEST_TEXT = 16384
"""Largest text in bytes: a path may have 4,096, each shown as an escape of 4."""


class RejectWriter:
    """Appends rejects to a Parquet file with bounded memory."""

    def __init__(self, path: Path) -> None:
        # Absolute: Arrow takes a relative path with a colon in it for a URI.
        self._writer = pq.ParquetWriter(path.absolute(), SCHEMA, compression="zstd")
        self._pending: list[Reject] = []
        self.rows = 0

    def __enter__(self) -> RejectWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # After an error nobody keeps the file: `write_atomically` removes it, and only the descriptor has to be
            # closed.
            if kind is None:
                self._flush()
        finally:
            self._writer.close()

    def add(self, reject: Reject) -> None:
        self.rows += 1
        self._pending.append(reject)
        # A build may reject millions of images: memory holds BUFFERED of them.
        if len(self._pending) == BUFFERED:
            self._flush()

    def extend(self, rejects: Iterable[Reject]) -> None:
        for reject in rejects:
            self.add(reject)

    def copy_from(self, path: Path) -> None:
        self.extend(read_rejects(path))

    def _flush(self) -> None:
        columns = {name: [readable(getattr(reject, name)) for reject in self._pending] for name in SCHEMA.names}
        self._writer.write_table(pa.table(columns, schema=SCHEMA))
        self._pending = []


def read_rejects(path: Path) -> Iterator[Reject]:
    """Yield the rejects of a file that this process wrote, with bounded memory."""
    with pq.ParquetFile(path.absolute()) as file:
        for batch in file.iter_batches(BUFFERED, columns=SCHEMA.names):
            yield from (Reject(**row) for row in batch.to_pylist())


def rejects_entry(path: Path, rows: int) -> RejectsEntry:
    """Return the manifest's entry for a rejects file that was written beside it."""
    return RejectsEntry(path=path.name, rows=rows, bytes=path.stat().st_size, sha256=sha256_file(path))


def check_rejects(path: Path, rows: int) -> None:
    """Raise ShardError for a file that does not hold `rows` rejects, or whose texts are too long."""
    for name in SCHEMA.names:
        # Column by column, so that one of them is in memory.
        parquet.read_texts(path, name, rows=rows, longest=LONGEST_TEXT)


def readable(value: str) -> str:
    """Make a file name that is not UTF-8 readable, with the bytes at fault as escapes."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
