"""The images of a loader, and what keys they have.

Images come from a source, joined with the labels by the hash of their key (`label_set.joined_images`), or from the
label set itself where its layout is `webdataset` (`OwnImages`).
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ferkd_data.errors import ImageError, UsageError
from ferkd_data.images import ImageSource, open_source
from ferkd_data.label_set import LabelSet
from ferkd_data.label_set.joined_images import Missing, join_images, tabulate
from ferkd_data.loader.order import NeededShards
from ferkd_data.loader.streaming import HeldFiles
from ferkd_data.scratch import Scratch, owner_is_gone
from ferkd_data.storage import OpenFile

TEXT_NAME = "keys.txt"
BOUNDS_NAME = "bounds.npy"
MAX_OPEN = 256
"""Tars that a process keeps open where any may be needed next, if it may open four times as many files."""


class Images(Protocol):
    """The images of a label set. Can be pickled."""

    def prefetch(self, needed: NeededShards | None) -> None:
        """Announce the shards of the windows to come, so that they can be fetched together."""

    def read(self, row: int, record: np.void) -> bytes:
        """Read the encoded bytes of a labelled image, given its row and record. Raises ImageError."""


def open_images(
    labels: LabelSet, images: str | Path | ImageSource | None, *, missing: Missing, streamed: bool
) -> tuple[LabelSet, Images]:
    """Join labels with their images: from a source, by key, or from a label set of layout `webdataset` itself.

    The labels come back without those of missing images where these are dropped. Where labels of another host are
    `streamed` and no image is dropped, keys are not known beforehand: a missing image is found when its turn comes.

    Raises UsageError when there are no images, LabelSetError as `join_images` does.
    """
    if images is None:
        if labels.manifest.layout != "webdataset":
            raise UsageError(f"{labels.location}: a label set of layout parquet holds no images; give images=…")
        return labels, OwnImages(labels)
    source = open_source(images) if isinstance(images, (str, Path)) else images
    # To read all keys would fetch one block of every shard before the first batch.
    if streamed and missing != "drop" and not labels.is_local:
        return labels, tabulate(source, None)[0]
    return join_images(labels, source, missing=missing)


class OwnImages:
    """The images inside a label set of layout `webdataset`, read where their records say. Can be pickled."""

    def __init__(self, labels: LabelSet) -> None:
        self.labels = labels
        # Two pools of open tars: those of a streamed order's stage, and, where any row may come, the last few used.
        self._held = HeldFiles(self._open)
        self._at_random = HeldFiles(self._open, max_open())
        self._staged = False

    def prefetch(self, needed: NeededShards | None) -> None:
        """Fetch the tars of this stage, in the background, and let go of all others."""
        self._staged = needed is not None
        if needed is not None:
            self._held.prefetch(needed.now, needed.coming)

    def read(self, row: int, record: np.void) -> bytes:
        """Read the encoded bytes. Raises ImageError where the tar ends within the image; ShardError, RemoteError."""
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
    """Return how many tars this process may keep open: a quarter of its files, the rest being the training's."""
    return max(8, min(MAX_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


class KeyTable:
    """Keys of a label set. Can be pickled as long as the original exists, which removes `folder` with itself."""

    def __init__(self, labels: LabelSet) -> None:
        """Raises ShardError as `LabelSet.keys` does."""
        self._scratch = Scratch("keys")
        self.folder = self._scratch.path
        lengths = [np.zeros(1, np.int64)]
        with (self.folder / TEXT_NAME).open("wb") as text:
            for entry in labels.filled_shards():
                keys = [key.encode() for key in labels.keys_of(entry.index)]
                # Without separators: a key is found by where it begins and ends, 8 bytes for each.
                text.write(b"".join(keys))
                lengths.append(np.fromiter(map(len, keys), np.int64, len(keys)))
        np.save(self.folder / BOUNDS_NAME, np.cumsum(np.concatenate(lengths)))
        self._open()

    def take(self, rows: Tensor) -> tuple[str, ...]:
        """Return the keys of these rows, int64 (B,)."""
        at = rows.cpu().numpy()
        bounds = zip(self._bounds[at].tolist(), self._bounds[at + 1].tolist(), strict=True)
        return tuple(self._text[start:stop].tobytes().decode() for start, stop in bounds)

    def _open(self) -> None:
        self._bounds: npt.NDArray[np.int64] = np.load(self.folder / BOUNDS_NAME, mmap_mode="r", allow_pickle=False)
        self._text: npt.NDArray[np.uint8] = np.memmap(self.folder / TEXT_NAME, np.uint8, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __deepcopy__(self, memo: Any) -> KeyTable:
        # As for an `ImageTable`.
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        try:
            self._open()
        except FileNotFoundError as error:
            raise owner_is_gone(self.folder) from error
