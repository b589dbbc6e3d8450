"""The images inside a label set of layout `webdataset`, read where their records say."""

from __future__ import annotations

import resource
from typing import Any

import numpy as np

from ferkd_data.errors import ImageError
from ferkd_data.label_set import LabelSet
from ferkd_data.loader.held_files import HeldFiles
from ferkd_data.loader.order import Stage
from ferkd_data.storage import OpenFile

MAX_OPEN = 256
"""Tars that a process keeps open where any may be needed next, if it may open four times as many files."""


class OwnImages:
    """Can be pickled."""

    def __init__(self, labels: LabelSet) -> None:
        self.labels = labels
        self._held = HeldFiles(self._open)
        self._at_random = HeldFiles(self._open, max_open())
        self._staged = False

    def stage(self, stage: Stage | None) -> None:
        """Fetch the tars of this stage, in the background, and let go of all others."""
        self._staged = stage is not None
        if stage is not None:
            self._held.stage(stage.now, stage.coming)

    def read(self, row: int, record: np.void) -> bytes:
        """The encoded bytes. Raises ImageError where the tar ends within the image; ShardError, RemoteError."""
        tar = (self._held if self._staged else self._at_random).get(self.labels.position(row)[0])
        length = int(record["image_bytes"])
        data = tar.read(int(record["image_offset"]), length)
        if len(data) != length:
            raise ImageError("unreadable", f"{tar.path}: ends within the image; did the tar change?")
        return data

    def _open(self, shard: int) -> OpenFile:
        # The digest of each image is compared where it is read (verify_images); hashing whole tars would add nothing.
        return self.labels.open(self.labels.manifest.shards[shard].files[0], check=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def max_open() -> int:
    """Tars that this process may keep open: a quarter of its files, the rest of which is the training's."""
    return max(8, min(MAX_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
