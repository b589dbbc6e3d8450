"""Where each labelled image's bytes lie: labels joined with an image source by key, in flat memory.

The references and the places of all rows are files of a temporary folder, memory-mapped by every worker: a worker's own
memory does not grow with the data set. While the table is made, 24 bytes for each image are held, and given back.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ferkd_data import rng
from ferkd_data.errors import LabelSetError, UsageError
from ferkd_data.images import ImageRef, ImageSource, TarSource, open_source
from ferkd_data.label_set import LabelSet
from ferkd_data.shards import webdataset

SCHEMA = pa.schema([("file", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
FILE_NAME = "images.arrow"
POSITION_NAME = "position.npy"
SPOOL_ROWS = 8192
MISSING = -1


class ImageTable:
    """`table.read(row)` gives an image's encoded bytes. Can be pickled, as long as `folder` exists."""

    def __init__(self, source: ImageSource, folder: Path) -> None:
        self.source = source
        self.folder = folder
        self._position: npt.NDArray[np.int64] | None = None
        self._batches: list[tuple[npt.NDArray[Any], ...]] = []
        self._starts = np.zeros(1, np.int64)

    @property
    def position(self) -> npt.NDArray[np.int64]:
        """(images,): a row's place in the file, -1 where the source lacks the image."""
        if self._position is None:
            self._position = np.load(self.folder / POSITION_NAME, mmap_mode="r", allow_pickle=False)
        return self._position

    def ref(self, row: int) -> ImageRef:
        """Where the image lies; without its key, which the labels have."""
        at = int(self.position[row])
        if not self._batches:
            self._open()
        batch = int(np.searchsorted(self._starts, at, side="right")) - 1
        bounds, names, offsets, lengths = self._batches[batch]
        at -= int(self._starts[batch])
        file = names[bounds[at] : bounds[at + 1]].tobytes().decode()
        return ImageRef(key="", target=None, file=file, offset=int(offsets[at]), length=int(lengths[at]))

    def read(self, row: int) -> bytes:
        """The encoded bytes. Raises ImageError when the image cannot be read."""
        return self.source.read_one(self.ref(row))

    def _open(self) -> None:
        """Map the file, and look at its columns as NumPy: Arrow's scalars would cost more than reading the image."""
        reader = pa.ipc.open_file(pa.memory_map(str(self.folder / FILE_NAME)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        for batch in batches:
            _, bounds, names = batch.column("file").buffers()
            offset, length = (batch.column(name).to_numpy() for name in ("offset", "length"))
            text = np.frombuffer(names or b"", np.uint8)
            self._batches.append((np.frombuffer(bounds, np.int32), text, offset, length))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_position": None, "_batches": []}


def open_images(labels: LabelSet, images: str | Path | ImageSource | None, *, allow_missing: bool) -> ImageTable:
    """The labels' images: from a source, by key, or from a label set of layout `webdataset` itself.

    The table's temporary folder is the caller's to remove. Raises UsageError when there are no images, LabelSetError as
    `join_images` does.
    """
    if images is None:
        if labels.manifest.layout != "webdataset":
            raise UsageError(f"{labels.location}: a label set of layout parquet holds no images; give images=…")
        return own_images(labels)
    source = open_source(images) if isinstance(images, (str, Path)) else images
    return join_images(labels, source, allow_missing=allow_missing)


def join_images(labels: LabelSet, source: ImageSource, *, allow_missing: bool) -> ImageTable:
    """The table; its temporary folder is the caller's to remove.

    Raises LabelSetError when labelled images are missing from the source (unless `allow_missing`) or none matches.
    """
    if not len(labels):
        raise LabelSetError(f"{labels.location}: it has labels of no image")
    hashes = labels.key_hashes()
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    position = np.full(len(labels), MISSING, np.int64)
    folder = Path(tempfile.mkdtemp(prefix="ferkd-data-images-"))
    seen, theirs = 0, ""
    with pa.OSFile(str(folder / FILE_NAME), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        listed = (item for item in source.list_images() if isinstance(item, ImageRef))
        while refs := list(itertools.islice(listed, SPOOL_ROWS)):
            theirs = theirs or refs[0].key
            wanted = _hashes((ref.key for ref in refs), len(refs))
            at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
            ours = np.flatnonzero(hashes[at] == wanted)
            position[order[at[ours]]] = seen + np.arange(len(ours))
            seen += len(ours)
            writer.write_batch(_batch([refs[i] for i in ours.tolist()]))
    try:
        _check_missing(labels, source, position, theirs, allow_missing)
    except LabelSetError:
        shutil.rmtree(folder)
        raise
    np.save(folder / POSITION_NAME, position)
    del hashes, order, position
    give_memory_back()
    return ImageTable(source, folder)


def _hashes(keys: Iterable[str], num: int) -> npt.NDArray[np.uint64]:
    return np.fromiter((rng.hash64(key) for key in keys), np.uint64, count=num)


def give_memory_back() -> None:
    """What a join or the unpacking of labels held goes to the system; Arrow and the C library would keep it."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def own_images(labels: LabelSet) -> ImageTable:
    """The images inside a label set of layout `webdataset`; the temporary folder is the caller's to remove."""
    folder = Path(tempfile.mkdtemp(prefix="ferkd-data-images-"))
    tars = [str(labels.file(entry.files[0])) for entry in labels.manifest.shards if entry.rows]
    with pa.OSFile(str(folder / FILE_NAME), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for tar in tars:
            refs = [
                ImageRef(key=s.key, target=None, file=tar, offset=s.image_offset, length=s.image_bytes)
                for s in webdataset.scan(Path(tar))
            ]
            writer.write_batch(_batch(refs))
    np.save(folder / POSITION_NAME, np.arange(len(labels)))
    return ImageTable(TarSource(tars, None), folder)


def _batch(refs: list[ImageRef]) -> pa.RecordBatch:
    return pa.record_batch([[getattr(ref, name) for ref in refs] for name in SCHEMA.names], schema=SCHEMA)


def _check_missing(
    labels: LabelSet, source: ImageSource, position: npt.NDArray[np.int64], theirs: str, allow_missing: bool
) -> None:
    missing = np.flatnonzero(position == MISSING)
    if len(missing) == len(labels):
        ours = next(labels.keys(), "")
        raise LabelSetError(
            f"{labels.location}: no image of {source.description} has a key of this label set (such as {ours!r}); "
            + (f"its own are such as {theirs!r}: " if theirs else "")
            + "is it the same data set, with the same folder as its root?"
        )
    if len(missing) and not allow_missing:
        shard, row = labels.position(int(missing[0]))
        key = labels.shard(shard).keys[row]
        raise LabelSetError(
            f"{labels.location}: {len(missing)} of {len(labels)} labelled images are missing from "
            f"{source.description}, the first is {key!r}; add them, or train without them with on_error='skip'"
        )
