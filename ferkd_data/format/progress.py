"""How far a transfer or a conversion is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from ferkd_data.format.manifest import FileEntry


@dataclass(frozen=True, kw_only=True)
class TransferProgress:
    """What a transfer has done so far. The first one comes before the first byte, as soon as the totals are known.

    fd.pull(url, "labels", on_progress=lambda progress: print(progress.files, "of", progress.files_total))
    """

    files: int = 0
    """Files that are done: fetched, sent or checked; for `convert`, `merge` and imports, files that are written."""
    files_total: int | None = None
    """None where it is not known beforehand."""
    bytes: int = 0
    """Bytes of these files, and for `pull` also what has come of those that are under way."""
    bytes_total: int | None = None
    images: int | None = None
    """Images whose labels are written; None for commands that do not count them."""
    images_total: int | None = None


OnProgress: TypeAlias = Callable[[TransferProgress], object]
"""Called in the thread that called the function; what it raises ends the transfer."""


def with_files(progress: TransferProgress, files: Iterable[FileEntry], images: int) -> TransferProgress:
    """The progress after these files were written too, which hold the labels of `images` images in all."""
    written = tuple(files)
    return replace(
        progress,
        files=progress.files + len(written),
        bytes=progress.bytes + sum(file.bytes for file in written),
        images=images,
    )
