"""The progress of a transfer or a conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from ferkd_data.format.manifest import FileEntry


@dataclass(frozen=True, kw_only=True)
class TransferProgress:
    """The work that a transfer or conversion has done so far.

    The first one comes before the first byte, as soon as the totals are known.

    >>> updates = []
    >>> _ = fd.pull(LABELS, "copy", on_progress=updates.append)
    >>> updates[0].files, updates[-1].files == updates[-1].files_total
    (0, True)
    """

    files: int = 0
    """Files that are done: fetched, sent or checked; for `convert`, `merge` and imports, files that are written."""
    files_total: int | None = None
    """None where it is unknown beforehand."""
    bytes: int = 0
    """Bytes of these files; for `pull` also the bytes that have arrived of unfinished files."""
    bytes_total: int | None = None
    images: int | None = None
    """Images whose labels are written; None for commands that do not count them."""
    images_total: int | None = None


OnProgress: TypeAlias = Callable[[TransferProgress], object]
"""Called in the thread that called the function; what it raises ends the transfer."""


def with_files(progress: TransferProgress, files: Iterable[FileEntry], images: int) -> TransferProgress:
    """Return the progress after these files were written too, with the labels of `images` images in all."""
    # `files` may be an iterator, and is gone through twice.
    written = tuple(files)
    return replace(
        progress,
        files=progress.files + len(written),
        bytes=progress.bytes + sum(file.bytes for file in written),
        images=images,
    )
