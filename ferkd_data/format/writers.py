"""Write an image shard in either layout: aside first, renamed when whole."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ferkd_data.format import parquet, webdataset
from ferkd_data.format.manifest import BlockEntry, Layout
from ferkd_data.labels.rows import ImageLabels, ShardLabels
from ferkd_data.storage import sha256_file, write_atomically

SHARD_FILE = re.compile(r"\d{5,}(-\d{3,})?\.(parquet|tar)")
"""Names of the files that `write_shard` writes, in their folders."""

Row = tuple[ImageLabels, bytes]
"""Labels of an image, and its encoded bytes (used by layout webdataset alone)."""
Announce = Callable[[tuple[BlockEntry, ...]], None]


def write_shard(
    folder: Path,
    index: int,
    rows: Iterable[Row],
    *,
    layout: Layout,
    block_starts: Iterable[int],
    first_block: int = 0,
    announce: Announce = lambda files: None,
) -> tuple[int, tuple[BlockEntry, ...]]:
    """Write the files of shard `index`; returns (rows, files), no files when there are no rows.

    `announce(files)` is called when all files are written and none has its final name yet.

    Raises StorageFullError when the disk is full; nothing half-written stays under a final name.
    """
    if layout == "webdataset":
        return _write_tar(folder, index, rows, announce)
    return _write_blocks(folder, index, rows, list(block_starts), first_block, announce)


def _write_blocks(
    folder: Path, index: int, rows: Iterable[Row], starts: list[int], first_block: int, announce: Announce
) -> tuple[int, tuple[BlockEntry, ...]]:
    # A block file holds a column after the other, so the shard has to be complete first; a tar is written row by row.
    collected = [labels for labels, _ in rows]
    if not collected:
        return 0, ()
    labels = ShardLabels.from_rows(collected)
    files = []
    # The stack renames the blocks at its end: all are whole by then, and an error before leaves no file.
    with contextlib.ExitStack() as stack:
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], labels.num_crops], strict=True)):
            name = parquet.file_name(index, first_block + number)
            aside = stack.enter_context(write_atomically(folder / name))
            parquet.write(aside, labels.crop_range(start, stop))
            files.append(_entry(aside, name, first_block + number))
        # Before the first rename: whoever is told knows which digests to expect, if a kill comes between two renames.
        announce(tuple(files))
    return len(labels), tuple(files)


def _write_tar(folder: Path, index: int, rows: Iterable[Row], announce: Announce) -> tuple[int, tuple[BlockEntry, ...]]:
    name = webdataset.file_name(index)
    count = 0
    with write_atomically(folder / name) as aside:
        with webdataset.Writer(aside) as writer:
            for labels, image in rows:
                writer.add(labels, image)
                count += 1
        files = (_entry(aside, name, 0),)
        announce(files)
    # Rows are counted by writing them, so the empty tar is there. A shard without rows has no files (docs/format.md).
    if count == 0:
        (folder / name).unlink()
        return 0, ()
    return count, files


def _entry(path: Path, name: str, block: int) -> BlockEntry:
    """Return the entry of a file that will be called `name`."""
    return BlockEntry(path=name, block=block, bytes=path.stat().st_size, sha256=sha256_file(path))
