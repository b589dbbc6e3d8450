"""Loaders that go from shard to shard: the same batches, only what is needed, a cache that stays within its bound."""

from __future__ import annotations

import gc
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from label_sets import SMALL
from servers import serve

import ferkd_data as fd
from ferkd_data.errors import LoaderError, RemoteError, StorageFullError
from ferkd_data.loader.images_and_keys import max_open
from ferkd_data.loader.label_cache import LabelCache
from ferkd_data.loader.order import epoch_order
from ferkd_data.loader.streaming import HeldFiles, StreamedLabels
from ferkd_data.remote import Retries
from ferkd_data.storage import explain_full_disk

QUICK = Retries(attempts=2, first_wait=0.001, timeout=5)
SETTINGS = {"batch_size": 8, "crops_per_image": 2, "size": 32, "calibration": "fkd", "shards_together": 2}
NUM_SHARDS = 10


@pytest.fixture(scope="session")
def many_shards(tmp_path_factory, photos, tiny_teachers):
    """Label sets of 20 images in 10 shards, by layout."""
    folder = tmp_path_factory.mktemp("many")
    for layout in ("parquet", "webdataset"):
        settings = SMALL | {"images_per_shard": 2, "layout": layout}
        fd.build(photos, folder / layout, teachers=[tiny_teachers], **settings)
    return folder


@pytest.fixture
def images_of(photos):
    return {"parquet": photos, "webdataset": None}


def contents(batches):
    return [(images.numpy().copy(), targets.dense().numpy()) for images, targets in batches]


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x, y) and np.array_equal(t, u) for (x, t), (y, u) in zip(a, b, strict=True)
    )


@contextmanager
def everything_at_hand(monkeypatch):
    """The loader as it is for a global shuffle: whole blocks, unpacked before the first batch."""
    with monkeypatch.context() as patch:
        patch.setattr("ferkd_data.loader.opening.StreamedLabels", LabelCache)
        yield


def used(folder):
    return {path: path.stat().st_size for path in folder.glob("shards/??/*")}


def test_a_cache_on_a_full_disk(many_shards, tmp_path, monkeypatch):
    @contextmanager
    def on_a_full_disk(path, *, sync, advice):
        with explain_full_disk(path, advice):
            yield Path("/dev/full")

    monkeypatch.setattr("ferkd_data.loader.streaming.write_atomically", on_a_full_disk)
    with pytest.raises(StorageFullError, match="no space left"):
        StreamedLabels(fd.open_labels(many_shards / "parquet"), tmp_path).take(0, np.arange(3))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("order", ["shards", "sequential"])
@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_batches_are_those_of_a_set_that_is_all_there(
    many_shards, images_of, tmp_path, monkeypatch, layout, order, num_workers
):
    settings = SETTINGS | {"order": order, "images": images_of[layout], "drop_last": False}
    with everything_at_hand(monkeypatch):
        local = fd.CropLoader(fd.open_labels(many_shards / layout), cache_dir=tmp_path / "a", **settings)
        expected = [contents(local), contents(local)]
    with serve(many_shards / layout) as server:
        labels = fd.open_labels(server.url, cache_dir=tmp_path / "b")
        remote = fd.CropLoader(labels, cache_dir=tmp_path / "b", num_workers=num_workers, **settings)
        assert all(same(contents(remote), epoch) for epoch in expected)
        names = [name for _, name, _ in server.requests]
        assert len(names) == len(set(names)), "each file came once"


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_the_first_batch_waits_for_one_group_of_shards(many_shards, images_of, tmp_path, layout):
    """The server keeps back what is neither of the first group nor of the one that is fetched ahead."""
    order = epoch_order("shards", [2] * NUM_SHARDS, seed=0, epoch=0, shards_together=2)
    stage = order.needed_shards(np.arange(4))
    free = threading.Event()
    early = {f"{shard:05d}" for shard in (*stage.now, *stage.coming)}
    with serve(many_shards / layout) as server:
        server.before_body = lambda name: (
            name.startswith(("labels", "shards")) and (any(shard in name for shard in early) or free.wait(300))
        )
        labels = fd.open_labels(server.url, cache_dir=tmp_path)
        settings = SETTINGS | {"images": images_of[layout], "order": "shards"}
        batches = iter(fd.CropLoader(labels, cache_dir=tmp_path, **settings))
        next(batches)
        assert {name[7:12] for name in server.sent if name.startswith(("labels/", "shards/"))} <= early
        free.set()
        assert len(list(batches)) == 4


def test_the_next_group_comes_by_itself(many_shards, tmp_path):
    order = epoch_order("shards", [2] * NUM_SHARDS, seed=0, epoch=0, shards_together=2)
    coming = {f"shards/{shard:05d}.tar" for shard in order.needed_shards(np.arange(4)).coming}
    assert len(coming) == 2
    arrived = threading.Event()
    with serve(many_shards / "webdataset") as server:
        server.before_body = lambda _: coming <= {name for _, name, _ in server.requests} and arrived.set()
        labels = fd.open_labels(server.url, cache_dir=tmp_path)
        batches = iter(fd.CropLoader(labels, cache_dir=tmp_path, order="shards", **SETTINGS))
        next(batches)
        assert arrived.wait(300), "nobody asked for it"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_a_cache_smaller_than_the_set(many_shards, images_of, tmp_path, layout, num_workers):
    """Room for two groups: all is delivered, from mapped files that go meanwhile, and the bound holds."""
    settings = SETTINGS | {"images": images_of[layout], "order": "shards", "num_workers": num_workers, "batch_size": 4}
    local = fd.CropLoader(fd.open_labels(many_shards / layout), cache_dir=tmp_path / "a", **settings)
    epochs = [contents(local), contents(local)]
    with serve(many_shards / layout) as server:
        whole = fd.open_labels(server.url, cache_dir=tmp_path / "b")
        shard = whole.manifest.shards[0]
        one = shard.files[0].bytes + sum(used(tmp_path / "a").values()) // NUM_SHARDS
        labels = fd.open_labels(server.url, cache_dir=tmp_path / "b", cache_bytes=4 * one)
        remote = fd.CropLoader(labels, cache_dir=tmp_path / "b", **settings)
        for expected in epochs:
            assert same(contents(remote), expected)
            there = sum(used(tmp_path / "b").values())
            assert 0 < there <= 8 * one < NUM_SHARDS * one
        del remote


def test_files_that_disappear_meanwhile_are_fetched_again(many_shards, tmp_path):
    local = fd.CropLoader(fd.open_labels(many_shards / "webdataset"), cache_dir=tmp_path / "a", **SETTINGS)
    expected = contents(local)
    with serve(many_shards / "webdataset") as server:
        labels = fd.open_labels(server.url, cache_dir=tmp_path / "b")
        for order, wanted in (("global", expected), ("shards", None)):
            loader = fd.CropLoader(labels, cache_dir=tmp_path / "b", order=order, **SETTINGS)
            found = []
            for images, targets in loader:
                found.append((images.numpy().copy(), targets.dense().numpy()))
                for path in used(tmp_path / "b"):
                    if not path.name.startswith("."):
                        path.unlink(missing_ok=True)
            assert len(found) == 5 and (wanted is None or same(found, wanted))


def test_resume_reads_only_what_is_left(many_shards, tmp_path):
    settings = SETTINGS | {"order": "shards", "batch_size": 4}
    local = fd.CropLoader(fd.open_labels(many_shards / "webdataset"), cache_dir=tmp_path / "a", **settings)
    whole = contents(local)
    local.set_epoch(0)
    for stop, _ in enumerate(local, 1):
        state = local.state_dict()
        with serve(many_shards / "webdataset") as server:
            cache = tmp_path / f"b{stop}"
            second = fd.CropLoader(fd.open_labels(server.url, cache_dir=cache), cache_dir=cache, **settings)
            second.load_state_dict(state)
            if stop < len(whole):
                assert same(contents(second), whole[stop:])
                left = NUM_SHARDS - 2 * (stop * 2 // 4)
                assert len([name for _, name, _ in server.requests if name.startswith("shards/")]) == left


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_cannot_be_had_is_an_error_that_names_it(many_shards, photos, tmp_path, num_workers):
    with serve(many_shards / "parquet") as server:
        for status, message in ((403, r"00004-000\.parquet: access denied \(403\)"), (503, "also after 2 attempts")):
            server.refuse["labels/00004-000.parquet"] = status
            labels = fd.open_labels(server.url, cache_dir=tmp_path)
            remote = replace(labels.reader.files.remote, retries=QUICK)
            labels = fd.LabelSet(replace(labels.reader, files=replace(labels.reader.files, remote=remote)))
            settings = SETTINGS | {"images": photos, "order": "shards", "num_workers": num_workers}
            loader = fd.CropLoader(labels, cache_dir=tmp_path, on_error="skip", **settings)
            with pytest.raises(RemoteError, match=message) as caught:
                list(loader)
            assert "Traceback" not in str(caught.value)


def test_a_missing_image_of_streamed_labels_is_found_when_its_turn_comes(many_shards, photos, tmp_path):
    images = shutil.copytree(photos, tmp_path / "photos")
    (images / "class3/photo0013.jpg").unlink()
    settings = SETTINGS | {"images": images, "order": "shards"}
    with serve(many_shards / "parquet") as server:
        labels = fd.open_labels(server.url, cache_dir=tmp_path)
        loader = fd.CropLoader(labels, cache_dir=tmp_path, **settings)
        assert [name for _, name, _ in server.requests] == ["manifest.json"]
        with pytest.raises(LoaderError, match=r"'class3/photo0013' \(shard 3 .*no image of this key"):
            list(loader)
        loader = fd.CropLoader(labels, cache_dir=tmp_path, on_error="skip", **settings)
        with pytest.warns(UserWarning, match=r"'class3/photo0013' .*left out"):
            assert [len(batch) for batch, _ in loader] == [8] * 5
        assert loader.skipped == 1


def test_one_record_after_the_other_is_the_whole_block(many_shards, tmp_path):
    for layout in ("parquet", "webdataset"):
        labels = fd.open_labels(many_shards / layout)
        rows = np.random.default_rng(0).permutation(20)
        for block in range(labels.num_blocks):
            expected = LabelCache(labels, tmp_path).take(block, rows)
            assert np.array_equal(StreamedLabels(labels, tmp_path).take(block, rows).view("u1"), expected.view("u1"))


@pytest.mark.parametrize("kind", ["shards", "sequential"])
def test_a_stage_names_the_shards_of_its_rows_and_the_next_ones(kind):
    counts = [3, 0, 5, 1, 4, 2, 2]
    starts = np.cumsum([0, *counts])
    order = epoch_order(kind, counts, seed=3, epoch=1, shards_together=2)
    seen = []
    for position in range(sum(counts)):
        shards = np.searchsorted(starts, order.rows(np.array([position])), side="right") - 1
        stage = order.needed_shards(np.array([position]))
        assert set(shards) <= set(stage.now) and not set(stage.now) & set(stage.coming) and 1 not in stage.now
        if not seen or stage.now != seen[-1].now:
            assert not seen or set(stage.now) <= set(seen[-1].coming)
            seen.append(stage)
    assert seen[-1].coming == []
    assert {shard for stage in seen for shard in stage.now} == {0, 2, 3, 4, 5, 6}
    assert epoch_order("global", counts, seed=0, epoch=0).needed_shards(np.arange(3)) is None


def test_held_files_are_closed_when_their_stage_is_over():
    opened = []

    class File:
        def __init__(self, key):
            opened.append(key)

    held = HeldFiles(File)
    first = held.get(1)
    assert held.get(1) is first
    held.prefetch([1, 2], [3])
    held.prefetch([2], [])
    assert held.get(2) is held.get(2) and held.get(1) is not first
    held.forget(1)
    assert held.get(1) and opened.count(1) == 2


def test_more_tars_than_a_process_may_open(many_shards, tmp_path, monkeypatch):
    """Layout webdataset at ImageNet's size has 1,252 of them, and a window of `spread` asks for nearly all."""
    labels = fd.open_labels(many_shards / "webdataset")
    most, settings = 0, {"batch_size": 8, "crops_per_image": 2, "size": 32, "calibration": "fkd", "spread": True}
    expected = contents(fd.CropLoader(labels, cache_dir=tmp_path, **settings))
    gc.collect()
    monkeypatch.setattr("ferkd_data.loader.images_and_keys.max_open", lambda: 3)
    loader = fd.CropLoader(labels, cache_dir=tmp_path, **settings)
    read = loader._maker.images.read

    def counted(row, record):
        nonlocal most
        data = read(row, record)
        most = max(most, sum(path.resolve().suffix == ".tar" for path in Path("/proc/self/fd").iterdir()))
        return data

    monkeypatch.setattr(loader._maker.images, "read", counted)
    assert same(contents(loader), expected)
    assert most == 3


@pytest.mark.parametrize(("limit", "expected"), [(1024, 256), (256, 64), (16, 8), (10**6, 256)])
def test_a_quarter_of_the_files_is_for_tars(monkeypatch, limit, expected):
    monkeypatch.setattr("ferkd_data.loader.images_and_keys.resource.getrlimit", lambda _: (limit, limit))
    assert max_open() == expected
