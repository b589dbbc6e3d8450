"""Rot: one flipped bit in a file of a label set never reaches a batch, a row that is read, or a set that is written."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from label_sets import files_below
from servers import serve

import ferkd_data as fd
from ferkd_data.errors import FerkdError, RemoteError, ShardError, UsageError
from ferkd_data.label_set.files import ShardCache

FLIPS = 60
LAYOUTS = ("parquet", "webdataset")


@pytest.fixture(params=LAYOUTS)
def whole(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("label_set" if request.param == "parquet" else "tar_label_set")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def shard_files(folder: Path) -> list[Path]:
    return sorted(path for name in ("labels", "shards") for path in (folder / name).glob("*"))


def load(folder: Path, images: Path | None, cache: Path, **settings) -> None:
    """Every crop block comes up: three epochs of four crops each."""
    labels = fd.open_labels(folder, cache_dir=cache)
    loader = fd.CropLoader(labels, images=images, batch_size=4, crops_per_image=4, size=8, cache_dir=cache, **settings)
    for epoch in range(3):
        loader.set_epoch(epoch)
        list(loader)


def uses(folder: Path, out: Path, photos: Path, tiny_teachers: str):
    """Ways to read the labels of `folder`, and to write them on."""
    is_tar = (folder / "shards").exists()
    images = None if is_tar else photos
    teachers = [tiny_teachers, "python:ferkd_tiny_teachers:second"]
    yield "iterate", lambda: list(fd.open_labels(folder))
    yield "load", lambda: load(folder, images, out / "cache")
    yield "load in shards", lambda: load(folder, images, out / "cache-2", order="shards")
    yield "convert to parquet", lambda: fd.convert(folder, out / "parquet", layout="parquet", crops_per_block=5)
    yield "convert to tars", lambda: fd.convert(folder, out / "tars", layout="webdataset", images=images)
    yield "export", lambda: fd.export_fkd(folder, out / "fkd")
    yield "merge", lambda: fd.merge([folder, folder], out / "merged")
    yield "pull", lambda: fd.pull(str(folder), out / "pulled")
    card = fd.CardFields(name="x", license="mit", image_license="mit")
    yield "publish", lambda: fd.publish(folder, str(out / "public"), card=card)
    yield "extend", lambda: fd.build(photos, folder, extend=True, teachers=teachers, device="cpu")


@pytest.mark.parametrize("number", range(FLIPS))
def test_no_flip_is_read_in_silence(whole, photos, tmp_path, number):
    """Every row of every block is read, after a flip at a random place."""
    draw = random.Random(f"{whole.name} {number}")
    copy = shutil.copytree(whole, tmp_path / "copy")
    path = draw.choice(shard_files(copy))
    flip(path, draw.randrange(8 * path.stat().st_size))
    with pytest.raises(ShardError, match="SHA-256 differs"):
        list(fd.open_labels(copy))
    assert not fd.verify(copy).ok
    if number % 6 == 0:
        with pytest.raises(ShardError, match="SHA-256 differs"):
            load(copy, None if path.suffix == ".tar" else photos, tmp_path / "cache")


def plausible_flip(folder: Path) -> None:
    """Change labels without any other sign: a probability's last bit in a tar; in Parquet, a bit that still reads."""
    draw = random.Random(7)
    path = shard_files(folder)[-1]
    data, like = path.read_bytes(), list(fd.open_labels(folder, verify_labels="never"))
    for _ in range(2000):
        path.write_bytes(data)
        flip(path, draw.randrange(8 * len(data)))
        try:
            rows = list(fd.open_labels(folder, verify_labels="never"))
        except FerkdError:
            continue
        if any((a.class_prob != b.class_prob).any() for a, b in zip(rows, like, strict=True)):
            return
    raise AssertionError("no flip changed a probability and went unnoticed")


def test_nothing_is_written_on_or_trained_on(whole, photos, tiny_teachers, tmp_path):
    rotten = shutil.copytree(whole, tmp_path / "rotten")
    plausible_flip(rotten)
    before = files_below(rotten)
    for name, use in uses(rotten, tmp_path / "out", photos, tiny_teachers):
        with pytest.raises(FerkdError, match="SHA-256 differs"):
            use()
            pytest.fail(f"{name}: in silence")
        after = files_below(rotten)
        # An extension that was refused leaves its lock file.
        assert {name: data for name, data in after.items() if not name.startswith(".build/")} == before, name
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_a_file_is_hashed_once_and_again_after_it_changed(whole, tmp_path, monkeypatch):
    copy = shutil.copytree(whole, tmp_path / "copy")
    hashed = []
    sha256 = fd.label_set.files.sha256_once.__globals__["HashedFile"].sha256
    monkeypatch.setattr("ferkd_data.storage.HashedFile.sha256", lambda self: hashed.append(self) or sha256(self))
    labels = fd.open_labels(copy)
    list(labels)
    count = len(hashed)
    assert count == len(shard_files(copy))
    list(labels)
    list(fd.open_labels(copy))
    assert len(hashed) == count
    flip(shard_files(copy)[0], 8000)
    with pytest.raises(ShardError, match="SHA-256 differs"):
        list(labels)


def test_never_trusts_the_disk(whole, photos, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    plausible_flip(copy)
    labels = fd.open_labels(copy, verify_labels="never")
    list(labels)
    list(fd.open_labels([copy], verify_labels="never"))
    with pytest.raises(ShardError):
        list(fd.open_labels([copy, whole], weights=[1, 1]))
    list(fd.open_labels([copy, whole], weights=[1, 1], verify_labels="never"))
    images = None if (copy / "shards").exists() else photos
    with pytest.raises(ShardError, match="SHA-256 differs"):
        load(copy, images, tmp_path / "a")
    load(copy, images, tmp_path / "a", verify_labels="never", verify_images="never")
    with pytest.raises(UsageError, match="verify_labels must be one of first_read, never"):
        fd.open_labels(copy, verify_labels="always")
    with pytest.raises(UsageError, match="verify_labels must be one of first_read, never"):
        load(copy, images, tmp_path / "a", verify_labels="always")


@pytest.fixture(scope="module")
def rotten(label_set, tmp_path_factory) -> Path:
    copy = shutil.copytree(label_set, tmp_path_factory.mktemp("rotten") / "copy")
    plausible_flip(copy)
    return copy


@pytest.mark.parametrize("order", ["global", "shards"])
@pytest.mark.parametrize("view", ["plain", "mapped", "ensemble"])
def test_what_was_unpacked_unchecked_serves_nobody_who_checks(rotten, label_set, photos, tmp_path, order, view):
    """Of one cache: a training that trusts the disk, then one that does not and goes on where the first one ended."""

    def train(**settings):
        labels = fd.open_labels([rotten, label_set] if view == "ensemble" else rotten)
        labels = labels.map_classes([0, 0, *range(1, 9)]) if view == "mapped" else labels
        settings |= {"images": photos, "cache_dir": tmp_path / "cache", "order": order}
        loader = fd.CropLoader(labels, batch_size=4, crops_per_image=4, size=8, **settings)
        # The damaged file is of the last crop block.
        loader.set_epoch(2)
        list(loader)

    train(verify_labels="never")
    with pytest.raises(ShardError, match="SHA-256 differs"):
        train()


def test_a_file_that_rots_in_the_cache_is_fetched_again(whole, tmp_path):
    with serve(whole) as server:
        list(fd.open_labels(server.url, cache_dir=tmp_path))
        cached = [path for path in (tmp_path / "shards").glob("??/*") if path.suffix in (".parquet", ".tar")]
        assert cached
        for path in cached:
            flip(path, 8 * (path.stat().st_size // 2))
        asked = len(server.requests)
        rows = list(fd.open_labels(server.url, cache_dir=tmp_path))
        assert len(server.requests) == asked + 1 + len(cached)
    for row, expected in zip(rows, fd.open_labels(whole), strict=True):
        assert (row.class_prob == expected.class_prob).all()


def test_a_cache_that_keeps_nothing_right(whole, tmp_path, monkeypatch):
    fetch = ShardCache.fetch

    def rotten(self, remote, entry):
        file = fetch(self, remote, entry)
        flip(file.path, 0)
        return file

    monkeypatch.setattr(ShardCache, "fetch", rotten)
    with serve(whole) as server, pytest.raises(RemoteError, match="the cache does not keep what is written to it"):
        list(fd.open_labels(server.url, cache_dir=tmp_path))
