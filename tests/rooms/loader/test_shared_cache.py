"""The cache of unpacked labels under many processes, kills, bit rot, and file systems without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import ferkd_data as fd
from ferkd_data.errors import LoaderError, StorageFullError
from ferkd_data.loader.label_cache import STALE_SECONDS, LabelCache
from ferkd_data.loader.streaming import StreamedLabels

TRAINING = """
import hashlib, itertools, sys
import ferkd_data as fd
labels, photos, cache, first, epochs, workers, order = sys.argv[1:]
loader = fd.CropLoader(
    fd.open_labels(labels), images=photos, batch_size=20, crops_per_image=4, size=16, cache_dir=cache,
    num_workers=int(workers), order=order,
)
for epoch in range(int(epochs)):
    # Neighbouring epochs are of different crop blocks.
    loader.set_epoch((int(first) + epoch) % 5)
    if int(workers):
        iter(loader)
        loader._open_workers().wait()
    digest = hashlib.sha256()
    for images, targets in loader:
        digest.update(images.numpy().tobytes())
        digest.update(targets.dense().numpy().tobytes())
    print((int(first) + epoch) % 5, digest.hexdigest(), flush=True)
"""


@pytest.fixture
def train(label_set, photos, tmp_path):
    def start(first=0, epochs=5, *, cache=tmp_path / "cache", workers=0, order="global", **environment):
        command = [sys.executable, "-c", TRAINING, label_set, photos, cache, first, epochs, workers, order]
        return subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    return start


def epochs_of(training):
    out, errors = training.communicate(timeout=600)
    assert training.returncode == 0, errors
    return dict(line.split() for line in out.splitlines())


def test_trainings_at_different_blocks_share_a_cache(train, tmp_path):
    alone = epochs_of(train(cache=tmp_path / "alone"))
    together = [train(first, 40) for first in range(3)]
    for training in together:
        assert epochs_of(training) == alone


def test_trainings_that_are_killed_leave_nothing_that_others_read(train, tmp_path):
    alone, generator = epochs_of(train(cache=tmp_path / "alone")), random.Random(0)
    steady = train(0, 40)
    for number in range(4):
        victim = train(number, 1000)
        line = victim.stdout.readline()
        assert line.split()[1] == alone[line.split()[0]]
        time.sleep(generator.random() / 5)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    assert epochs_of(steady) == alone
    assert not list((tmp_path / "cache").rglob(".*.tmp")) or epochs_of(train(0, 5)) == alone


def test_a_block_in_use_stays_and_one_that_nobody_uses_goes(label_set, tmp_path):
    mine, other = (LabelCache(fd.open_labels(label_set), tmp_path) for _ in range(2))
    first = mine.block(0)
    other.prepare({1})
    names = sorted(path.name for path in tmp_path.rglob("block-*.npy"))
    assert names == ["block-000.npy", "block-001.npy"]
    del first
    mine.forget_except({2})
    other.prepare({1})
    assert sorted(path.name for path in tmp_path.rglob("block-*.npy")) == ["block-001.npy"]


@pytest.mark.parametrize("order", ["global", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_without_locks(train, tmp_path, order, workers):
    """Python's flock is replaced in all processes: a file system without locks cannot be had here.

    The temporary folder is their own: processes that have locks would take folders without one for left behind.
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import fcntl\ndef flock(*_): raise OSError(38, 'Function not implemented')\nfcntl.flock = flock\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    alone = epochs_of(train(cache=tmp_path / "alone"))
    own = {"PYTHONPATH": path, "TMPDIR": str(tmp_path / "scratch")}
    together = [train(first, 10, workers=workers, order=order, **own) for first in range(2)]
    found = [epochs_of(training) for training in together]
    if order == "global":
        assert found == [alone, alone]
    assert found[0] == found[1]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_only_what_is_old_is_removed(label_set, tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    cache = LabelCache(fd.open_labels(label_set), tmp_path)
    cache.prepare({0})
    block = next(tmp_path.rglob("block-000.npy"))
    aside = block.with_name(".block-001.npy.1-0123abcd.tmp")
    aside.write_bytes(b"somebody writes here")
    cache.prepare({1})
    assert block.exists() and aside.exists()
    for path in (block, aside):
        os.utime(path, (0, time.time() - STALE_SECONDS - 10))
    cache.prepare({2})
    assert not block.exists() and not aside.exists()


def test_other_errors_of_locks_are_not_hidden(label_set, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        LabelCache(fd.open_labels(label_set), tmp_path).block(0)


@pytest.fixture
def read_only(small_disk):
    """Remounts a file system of 4 MiB, so that even root cannot write to it."""

    def remount():
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        return small_disk

    yield remount
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


@pytest.mark.parametrize("order", ["global", "shards"])
def test_a_cache_on_a_read_only_disk(label_set, photos, read_only, order):
    loader = fd.CropLoader(
        fd.open_labels(label_set), images=photos, batch_size=8, size=16, cache_dir=read_only() / "cache", order=order
    )
    with pytest.raises(LoaderError, match=r"disk/cache.*: labels cannot be kept there .*FERKD_DATA_CACHE"):
        list(loader)


def test_a_filled_cache_on_a_read_only_disk_serves(label_set, photos, small_disk, read_only):
    def loader():
        labels = fd.open_labels(label_set)
        return fd.CropLoader(labels, images=photos, batch_size=8, size=16, cache_dir=small_disk / "cache")

    first = loader()
    for epoch in range(3):
        expected = LabelCache(first.labels, small_disk / "cache").block(epoch)
        assert len(expected) == 20
    read_only()
    second = loader()
    for _ in range(2):
        assert len(list(second)) == 10


def test_a_full_disk_says_what_a_trainer_can_do(label_set, photos, small_disk):
    (small_disk / "c").mkdir()
    with pytest.raises(OSError, match="No space left"), (small_disk / "fill").open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    loader = fd.CropLoader(fd.open_labels(label_set), images=photos, batch_size=8, size=16, cache_dir=small_disk / "c")
    with pytest.raises(StorageFullError, match=r"no space left .*cache_dir or FERKD_DATA_CACHE") as caught:
        list(loader)
    assert "shards are kept" not in str(caught.value)


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
@pytest.mark.parametrize("kind", [LabelCache, StreamedLabels])
def test_a_flipped_bit_in_the_cache_reaches_no_batch(label_set, tar_label_set, tmp_path, caplog, kind, layout):
    labels = fd.open_labels(label_set if layout == "parquet" else tar_label_set)
    rows, generator = np.arange(20), random.Random(0)
    expected = kind(labels, tmp_path).take(0, rows)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".npy", ".records") and path.stat().st_size]
    noticed = 0
    for _ in range(60):
        path = generator.choice(files)
        content = bytearray(path.read_bytes())
        place = generator.randrange(len(content))
        content[place] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        caplog.clear()
        found = kind(labels, tmp_path).take(0, rows)
        assert found.tobytes() == expected.tobytes(), (path, place)
        noticed += "damaged on its disk; made again" in caplog.text or path.read_bytes() != bytes(content)
        assert kind(labels, tmp_path).take(0, rows).tobytes() == expected.tobytes()
    # NumPy's header ends with spaces that say nothing.
    assert noticed >= 55


def test_a_bit_that_flips_while_a_worker_has_the_block_open(label_set, photos, tmp_path, caplog):
    settings = {"images": photos, "batch_size": 8, "crops_per_image": 2, "size": 16, "cache_dir": tmp_path}
    loader = fd.CropLoader(fd.open_labels(label_set), **settings)
    expected = [targets.dense() for _, targets in loader]
    block = next(tmp_path.rglob("block-000.npy"))
    with block.open("r+b") as stream:
        stream.seek(-100, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-100, os.SEEK_END)
        stream.write(bytes([byte ^ 4]))
    loader.set_epoch(0)
    found = [targets.dense() for _, targets in loader]
    assert all((a == b).all() for a, b in zip(expected, found, strict=True))
    assert "block-000.npy: damaged on its disk; made again" in caplog.text


def test_a_disk_that_damages_whatever_is_written(label_set, tmp_path, monkeypatch):
    monkeypatch.setattr("ferkd_data.loader.label_cache.are_intact", lambda records: False)
    for kind in (LabelCache, StreamedLabels):
        with pytest.raises(LoaderError, match="damaged again right after it was written"):
            kind(fd.open_labels(label_set), tmp_path).take(0, np.arange(3))


def test_a_block_of_another_kind_is_made_again(label_set, tmp_path):
    labels = fd.open_labels(label_set)
    expected = LabelCache(labels, tmp_path).take(0, np.arange(20))
    block = next(tmp_path.rglob("block-000.npy"))
    for write in (
        lambda: np.save(block, np.arange(20)),
        lambda: block.unlink(),
        lambda: (block.unlink(), os.mkfifo(block)),
        lambda: (block.unlink(), block.symlink_to("/etc/hostname")),
        lambda: (block.unlink(), shutil.copy("/bin/sh", block)),
    ):
        write()
        assert LabelCache(labels, tmp_path).take(0, np.arange(20)).tobytes() == expected.tobytes()
        assert not block.is_symlink() and block.is_file()


def test_disk_is_reserved_shard_by_shard(label_set, tmp_path, monkeypatch):
    """A manifest's claims take no disk: each shard's rows do, once they were read."""
    reserved = []
    monkeypatch.setattr(os, "posix_fallocate", lambda descriptor, start, size: reserved.append(size))
    labels = fd.open_labels(label_set)
    records = LabelCache(labels, tmp_path / "cache").block(0)
    assert reserved == [shard.rows * records.dtype.itemsize for shard in labels.manifest.shards]
