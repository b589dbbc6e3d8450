"""The images of a source that are labelled: where each one's bytes are, and that it is the one that was labelled.

A table of a whole data set is a file of a temporary folder that every process maps: a worker's own memory does not grow
with the data set. While it is made, 24 bytes for each image are held, and given back.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ferkd_data import rng
from ferkd_data.errors import ImageError, LabelSetError
from ferkd_data.images import ImageRef, ImageSource, decode_rgb, image_size, in_groups
from ferkd_data.label_set import LabelSet
from ferkd_data.scratch import Scratch, owner_is_gone

SCHEMA = pa.schema([("file", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
FILE_NAME = "images.arrow"
INDEX_NAME = "index.npy"
INDEX_DTYPE = np.dtype([("key_hash", "<u8"), ("number", "<i8")])
SPOOL_ROWS = 8192
Size = tuple[int, int]
"""(height, width) in pixels."""
Missing = Literal["raise", "drop", "later"]
"""What to do with a labelled image that the source lacks; see `join_images`."""


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
    table, theirs = tabulate(source, np.sort(hashes))
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


def tabulate(source: ImageSource, wanted: npt.NDArray[np.uint64] | None) -> tuple[ImageTable, str]:
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
                ours = np.flatnonzero(rng.find_hashes(wanted, hashes)[1])
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
            + (f"keys there look like {theirs!r}: " if theirs else "")
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

    def prefetch(self, needed: object) -> None:
        """Do nothing: images of a source are read where they lie."""

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


def decode_checked(data: bytes, labelled: Size, pixel_limit: int) -> npt.NDArray[np.uint8]:
    """Decode an image that was labelled at this (height, width): (H, W, 3) uint8.

    Never decodes more pixels than were labelled, or than `pixel_limit`. Raises ImageError where the image has another
    size than was labelled, more pixels than `pixel_limit`, or cannot be decoded.
    """
    try:
        pixels = decode_rgb(data, max_pixels=labelled_pixels(labelled, pixel_limit))
    except ImageError as error:
        # More pixels than were labelled: another image, and no bomb.
        if error.reason == "pixel_bomb":
            check_labelled_size(image_size(data), labelled)
        raise
    check_labelled_size((pixels.shape[0], pixels.shape[1]), labelled)
    return pixels


def labelled_size(record: np.void) -> Size:
    """Return the (height, width) that a record's image had when it was labelled."""
    return int(record["height"]), int(record["width"])


def labelled_pixels(labelled: Size, pixel_limit: int) -> int:
    """Return the pixels of the image that was labelled. Raises ImageError for more than `pixel_limit`."""
    height, width = labelled
    if height * width > pixel_limit:
        raise ImageError(
            "pixel_bomb",
            f"it was labelled with {width}x{height} pixels; the limit (max_pixels in the manifest, or its "
            f"default) is {pixel_limit}",
        )
    return height * width


def check_labelled_size(size: Size, labelled: Size) -> None:
    """Raise ImageError where an image of this (height, width) is not the one that was labelled."""
    if size != labelled:
        found, expected = (f"{width}x{height}" for height, width in (size, labelled))
        raise ImageError("other_image", f"it is {found} pixels, {expected} were labelled")
