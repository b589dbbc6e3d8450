"""The images of a label set: where each one's bytes are, what its key is, and that it is the one that was labelled.

Images come from a source, joined with the labels by the hash of their key (`ImageTable`), or from the label set itself
where its layout is `webdataset` (`OwnImages`).

Tables of a whole data set are files of a temporary folder that every worker maps: a worker's own memory does not grow
with the data set. While an `ImageTable` is made, 24 bytes for each image are held, and given back.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from ferkd_data import rng
from ferkd_data.errors import ImageError, LabelSetError, UsageError
from ferkd_data.images import ImageRef, ImageSource, decode_rgb, image_size, in_groups, open_source
from ferkd_data.label_set import LabelSet
from ferkd_data.loader.order import NeededShards
from ferkd_data.loader.streaming import HeldFiles
from ferkd_data.scratch import Scratch, owner_is_gone
from ferkd_data.storage import OpenFile

SCHEMA = pa.schema([("file", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
FILE_NAME = "images.arrow"
INDEX_NAME = "index.npy"
INDEX_DTYPE = np.dtype([("key_hash", "<u8"), ("number", "<i8")])
SPOOL_ROWS = 8192
TEXT_NAME = "keys.txt"
BOUNDS_NAME = "bounds.npy"
MAX_OPEN = 256
"""Tars that a process keeps open where any may be needed next, if it may open four times as many files."""
Missing = Literal["raise", "drop", "later"]
"""What to do with a labelled image that the source lacks; see `join_images`."""


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
        return labels, _tabulate(source, None)[0]
    return join_images(labels, source, missing=missing)


def join_images(labels: LabelSet, source: ImageSource, *, missing: Missing) -> tuple[LabelSet, ImageTable]:
    """Return the labels, and those images of a source that are labelled.

    missing: what labelled images that the source lacks do: "raise", be left out of the labels ("drop"), or stay until
    their turn comes ("later").

    Raises LabelSetError when images are missing and must not, or when the source has none of them.
    """
    if not len(labels):
        raise LabelSetError(f"{labels.location}: it has labels of no image")
    hashes = labels.key_hashes()
    # Only images that are labelled enter the table: a source may have many more.
    table, theirs = _tabulate(source, np.sort(hashes))
    # By hash alone. Of 10**9 keys, two share one of 64 bits with probability 0.03; the image's digest then tells.
    index = np.load(table.folder / INDEX_NAME, mmap_mode="r", allow_pickle=False)
    there = np.isin(hashes, index["key_hash"])
    _check_missing(labels, source, ~there, theirs, missing)
    kept = labels.select(rows=there) if missing == "drop" else labels
    # Before the memory is given back, which these still hold.
    del hashes, index
    give_memory_back()
    return kept, table


def give_memory_back() -> None:
    """Return freed memory to the system; Arrow and the C library would keep what joining or unpacking labels held."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _tabulate(source: ImageSource, wanted: npt.NDArray[np.uint64] | None) -> tuple[ImageTable, str]:
    """Tabulate the images of a source, or those whose keys have one of the sorted hashes `wanted`.

    Returns the table and the first key that the source lists.
    """
    table = ImageTable(source, Scratch("images"))
    found, theirs = [np.empty(0, np.uint64)], ""
    with pa.OSFile(str(table.folder / FILE_NAME), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        listed = (item for item in source.list_images() if isinstance(item, ImageRef))
        # In groups, so that a listing of any length takes the memory of its hashes alone.
        for refs in in_groups(listed, SPOOL_ROWS):
            theirs = theirs or refs[0].key
            hashes = rng.hashes64([ref.key for ref in refs])
            if wanted is not None:
                # searchsorted gives len(wanted) for a hash above all of them; the comparison below then fails as it
                # should.
                at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
                ours = np.flatnonzero(wanted[at] == hashes)
                refs, hashes = [refs[i] for i in ours.tolist()], hashes[ours]
            found.append(hashes)
            writer.write_batch(_batch(refs))
    key_hashes = np.concatenate(found)
    # Stable: where a source lists two images of one key, the first is found.
    order = np.argsort(key_hashes, kind="stable")
    index = np.empty(len(order), INDEX_DTYPE)
    index["key_hash"], index["number"] = key_hashes[order], order
    np.save(table.folder / INDEX_NAME, index)
    return table, theirs


def _batch(refs: list[ImageRef]) -> pa.RecordBatch:
    return pa.record_batch([[getattr(ref, name) for ref in refs] for name in SCHEMA.names], schema=SCHEMA)


def _check_missing(
    labels: LabelSet, source: ImageSource, lacks: npt.NDArray[np.bool_], theirs: str, allowed: Missing
) -> None:
    missing = np.flatnonzero(lacks)
    if len(missing) == len(labels):
        ours = next(labels.keys(), "")
        raise LabelSetError(
            f"{labels.location}: no image of {source.description} has a key of this label set (such as {ours!r}); "
            + (f"its keys look like {theirs!r}: " if theirs else "")
            + "is it the same data set, with the same folder as its root?"
        )
    if len(missing) and allowed == "raise":
        shard, row = labels.position(int(missing[0]))
        key = labels.keys_of(shard)[row]
        raise LabelSetError(
            f"{labels.location}: {len(missing)} of {len(labels)} labelled images are missing from "
            f"{source.description}, the first is {key!r}; add them, or leave their labels out with "
            f"images_missing='drop'"
        )


class ImageTable:
    """The images of a source. Can be pickled, as long as the original, which removes `folder` with itself, exists."""

    def __init__(self, source: ImageSource, scratch: Scratch) -> None:
        self.source = source
        self.folder = scratch.path
        # Owned by the process that made it. Copies in workers have the path alone and remove nothing.
        self._scratch: Scratch | None = scratch
        self._index: npt.NDArray[np.void] | None = None
        self._batches: list[tuple[npt.NDArray[Any], ...]] = []
        self._starts = np.zeros(1, np.int64)

    def prefetch(self, needed: NeededShards | None) -> None:
        """Images of a source are read where they lie."""

    def read(self, row: int, record: np.void) -> bytes:
        return self.read_key(int(record["key_hash"]))

    def read_key(self, key_hash: int) -> bytes:
        """Read the encoded bytes of the image whose key has this hash. Raises ImageError when it cannot be read."""
        return self.source.read_one(self.ref(key_hash))

    def ref(self, key_hash: int) -> ImageRef:
        """Look up an image, without its key, which the labels have. Raises ImageError where there is none."""
        if self._index is None:
            self._open()
            self._index = np.load(self.folder / INDEX_NAME, mmap_mode="r", allow_pickle=False)
        hashes = self._index["key_hash"]
        found = int(np.searchsorted(hashes, np.uint64(key_hash)))
        if found == len(hashes) or int(hashes[found]) != key_hash:
            raise ImageError("missing_image", "the image source has no image of this key")
        at = int(self._index["number"][found])
        batch = int(np.searchsorted(self._starts, at, side="right")) - 1
        bounds, names, offsets, lengths = self._batches[batch]
        at -= int(self._starts[batch])
        file = names[bounds[at] : bounds[at + 1]].tobytes().decode()
        return ImageRef(key="", target=None, file=file, offset=int(offsets[at]), length=int(lengths[at]))

    def _open(self) -> None:
        """Map the file, and look at its columns as NumPy: Arrow's scalars would cost more than reading the image."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.folder / FILE_NAME)))
        except FileNotFoundError as error:
            raise owner_is_gone(self.folder) from error
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        for batch in batches:
            _, bounds, names = batch.column("file").buffers()
            # Arrow's to_numpy would import pandas where that is installed: 40 MB in every worker.
            offset, length = (np.frombuffer(batch.column(name).buffers()[1], np.int64) for name in ("offset", "length"))
            text = np.frombuffer(names or b"", np.uint8)
            self._batches.append((np.frombuffer(bounds, np.int32), text, offset, length))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scratch": None, "_index": None, "_batches": []}

    def __deepcopy__(self, memo: Any) -> ImageTable:
        # Nothing here changes; a copy within the process would lose its files with the original.
        return self


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


class CheckedImages:
    """A bit for each row of a label set: its image was found to be the one that was labelled.

    Only good images have theirs set, so a wrong one is found again in every epoch, by whichever process reads it, and
    after a resume. The bits are shared with processes that are forked; a copy that travels by pickle begins anew. Two
    processes that set bits of one byte at once may lose one, and that image is hashed once more.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._bits: npt.NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, num_rows // 8 + 1), np.uint8)

    def __contains__(self, row: int) -> bool:
        return bool(self._bits[row >> 3] >> (row & 7) & 1)

    def add(self, row: int) -> None:
        self._bits[row >> 3] |= np.uint8(1 << (row & 7))

    def __getstate__(self) -> dict[str, Any]:
        return {"num_rows": self._num_rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def decode_checked(data: bytes, record: np.void, pixel_limit: int) -> npt.NDArray[np.uint8]:
    """Decode the image of a record: (H, W, 3) uint8.

    Never decodes more pixels than were labelled, or than `pixel_limit`. Raises ImageError where the image has another
    size than was labelled, more pixels than `pixel_limit`, or cannot be decoded.
    """
    try:
        pixels = decode_rgb(data, max_pixels=labelled_pixels(record, pixel_limit))
    except ImageError as error:
        # More pixels than were labelled: another image, and no bomb.
        if error.reason == "pixel_bomb":
            check_labelled_size(*image_size(data), record)
        raise
    check_labelled_size(pixels.shape[0], pixels.shape[1], record)
    return pixels


def labelled_pixels(record: np.void, pixel_limit: int) -> int:
    """Return the pixels of the image that was labelled. Raises ImageError for more than `pixel_limit`."""
    height, width = int(record["height"]), int(record["width"])
    if height * width > pixel_limit:
        raise ImageError(
            "pixel_bomb",
            f"it was labelled with {width}x{height} pixels; the limit (max_pixels in the manifest, or its "
            f"default) is {pixel_limit}",
        )
    return height * width


def check_labelled_size(height: int, width: int, record: np.void) -> None:
    """Raise ImageError where an image of this size is not the one that was labelled."""
    if (height, width) != (record["height"], record["width"]):
        labelled = f"{record['width']}x{record['height']}"
        raise ImageError("other_image", f"it is {width}x{height} pixels, {labelled} were labelled")
