"""A process that may open no more files: what is blamed then, and what is not."""

from __future__ import annotations

import errno
import os
import resource
import tarfile
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ferkd_data as fd
from ferkd_data.errors import TooManyOpenFilesError
from ferkd_data.images import open_source
from ferkd_data.loader.label_cache import LabelCache
from ferkd_data.locks import locked_for_cache
from ferkd_data.storage import refuse_too_many_files


class NoRoom:
    """Takes all files that this process may open, and lets them go at the end."""

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, self.before[1]))
        self.held = []
        with suppress(OSError):
            while True:
                self.held.append(os.open(os.devnull, os.O_RDONLY))

    def __exit__(self, *details):
        for descriptor in self.held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, self.before)


TOO_MANY = r"as many files open as it may \(256\); raise the limit .* `ulimit -n 65536`"


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "label set"])
def test_no_file_is_blamed_where_a_process_may_open_no_more(kind, photos, tar_label_set, label_set, tmp_path):
    """A build would reject every image that it reads then, and a training skip them."""
    first = next(photos.rglob("*.jpg"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(first, "a.jpg")
    image = pa.array([{"bytes": first.read_bytes(), "path": "a.jpg"}])
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    if kind == "label set":
        labels = fd.open_labels(label_set)
        with NoRoom(), pytest.raises(TooManyOpenFilesError, match=TOO_MANY):
            next(labels.shards())
        return
    source = open_source(photos if kind == "folder" else tmp_path / f"a.{kind}")
    ref = next(source.list_images())
    with NoRoom(), pytest.raises(TooManyOpenFilesError, match=TOO_MANY):
        list(source.read([ref]))
    with NoRoom(), pytest.raises(TooManyOpenFilesError, match=TOO_MANY):
        source.read_one(ref)
    assert len(source.read_one(ref)) == len(next(iter(source.read([ref])))) > 100


def test_a_loader_that_skips_unusable_images_skips_none_for_it(label_set, photos, tmp_path):
    labels = fd.open_labels(label_set)
    loader = fd.CropLoader(
        labels, images=photos, batch_size=4, crops_per_image=2, size=16, on_error="skip", cache_dir=tmp_path
    )
    batches = iter(loader)
    next(batches)
    with NoRoom(), pytest.raises(TooManyOpenFilesError, match=TOO_MANY):
        next(batches)
    assert loader.skipped == 0


def test_nor_where_the_machine_may_open_no_more(tmp_path):
    with pytest.raises(TooManyOpenFilesError, match=r"this machine has as many files open as it may \(fs\.file-max\)"):
        refuse_too_many_files(tmp_path, OSError(errno.ENFILE, "x"))
    refuse_too_many_files(tmp_path, OSError(errno.EIO, "x"))
    refuse_too_many_files(tmp_path, RuntimeError("x"))


def test_a_cache_is_not_blamed_either(tmp_path):
    with NoRoom(), pytest.raises(TooManyOpenFilesError, match=TOO_MANY), locked_for_cache(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("device", [None, "cpu"])
def test_memory_that_workers_and_training_share_is_a_file_too(label_set, photos, tmp_path, device):
    """What a worker sends arrives without its file then, and nothing says so."""
    loader = fd.CropLoader(
        fd.open_labels(label_set),
        images=photos,
        batch_size=4,
        crops_per_image=2,
        size=16,
        num_workers=1,
        decode_device=device,
        cache_dir=tmp_path,
    )
    loader._open_workers().wait()
    loader._maker.prepare_blocks(0)
    with NoRoom(), pytest.raises(TooManyOpenFilesError, match=TOO_MANY):
        list(loader)


def test_blocks_that_cannot_be_removed_for_it_stay(label_set, tmp_path):
    labels = fd.open_labels(label_set)
    LabelCache(labels, tmp_path).prepare({0})
    # One that has the block not open: closing it would make room.
    with NoRoom():
        LabelCache(labels, tmp_path).drop_except(set())
    assert [path.name for path in tmp_path.rglob("block-*.npy")] == ["block-000.npy"]
