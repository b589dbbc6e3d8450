"""Builds whose OUT is an S3 store: a real server (moto), real kills, hosts that share nothing but the store."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import ClassVar

import pytest
from label_sets import SMALL, files_below, same_files
from servers import s3_store

import ferkd_data as fd
from ferkd_data.builder import build_part, finish
from ferkd_data.builder import run as run_module
from ferkd_data.builder.prepare import Prepared
from ferkd_data.builder.store_files import StoreFiles
from ferkd_data.builder.watch.events import ShardDone
from ferkd_data.errors import BuildError, BuildLockedError, UsageError
from ferkd_data.remote import Remote, open_remote
from ferkd_data.storage import sha256_file

OUT = "s3://bucket/sets/new"


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache-of-this-host"))
    with s3_store(monkeypatch, "bucket"):
        yield open_remote(OUT)


@pytest.fixture
def teachers(tiny_teachers):
    return [tiny_teachers, "python:ferkd_tiny_teachers:second"]


def fetched(folder: Path) -> Path:
    """The whole of what the store holds, as a folder."""
    remote = open_remote(OUT)
    for name, size in remote.sizes().items():
        remote.fetch(name, folder / name, size=size)
    return folder


def build_slowly(photos: Path, teachers: list[str], environment: dict[str, str]) -> None:
    """The server that starts the process may be there since before the environment was as it is."""
    os.environ |= environment | {"TINY_SLEEP": "0.3"}
    fd.build(photos, OUT, teachers=teachers, **SMALL)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_store_gets_what_a_folder_would(store, photos, teachers, label_set, tmp_path, workers):
    result = fd.build(photos, OUT, teachers=teachers, workers=workers, **SMALL)
    assert result.out == OUT
    assert same_files(fetched(tmp_path / "copy"), label_set)
    assert not files_below(tmp_path / "cache-of-this-host")
    assert fd.open_labels(OUT).identity == fd.open_labels(label_set).identity
    assert fd.build(photos, OUT, teachers=teachers, **SMALL).already_finished
    with pytest.raises(BuildError, match="holds a finished label set with other settings: crops: saved 10, now 2"):
        fd.build(photos, OUT, teachers=teachers, **{**SMALL, "crops": 2})
    fd.build(photos, OUT, teachers=teachers, overwrite=True, **{**SMALL, "crops": 2})
    assert fd.open_labels(OUT).num_crops == 2
    assert not [name for name in store.sizes() if name.endswith("-001.parquet")]


def test_images_go_along_and_buckets_are_assigned_at_the_end(store, photos, teachers, tmp_path):
    settings = {**SMALL, "layout": "webdataset", "thresholds": fd.QuantileThresholds(low=0.1, mid=0.4, top=0.9)}
    fd.build(photos, tmp_path / "local", teachers=teachers, **settings)
    fd.build(photos, OUT, teachers=teachers, **settings)
    assert same_files(fetched(tmp_path / "copy"), tmp_path / "local")


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_another_host_goes_on_after_a_kill_at_any_request_of_the_end(store, photos, teachers, tmp_path, layout):
    """Buckets are assigned anew in the store: whatever was sent last, the rest follows from it."""
    settings = {**SMALL, "layout": layout, "crops": 4, "crops_per_block": 2}
    settings["thresholds"] = fd.QuantileThresholds(low=0.1, mid=0.4, top=0.9)
    fd.build(photos, tmp_path / "whole", teachers=teachers, **settings)
    step = ended = 0
    while not ended:
        step += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FERKD_DATA_CACHE", str(tmp_path / f"host-{step}"))
            die_before_request(patch, step)
            try:
                fd.build(photos, OUT, teachers=teachers, **settings)
                ended = step
            except KeyboardInterrupt:
                pass
        assert not ended or same_files(fetched(tmp_path / "copy"), tmp_path / "whole")
        fd.build(photos, OUT, teachers=teachers, **settings)
        assert same_files(fetched(tmp_path / f"copy-{step}"), tmp_path / "whole"), step
        store.remove("")
        for name in list(store.sizes()):
            store.remove(name)
    assert ended > 8


def die_before_request(patch, step):
    """Raise at the `step`-th file that the end of a build sends."""
    count = 0
    seal, upload = run_module._seal, Remote.upload

    def counted(*arguments, **options):
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        return upload(*arguments, **options)

    def watched(*arguments):
        patch.setattr(Remote, "upload", counted)
        return seal(*arguments)

    patch.setattr(run_module, "_seal", watched)


def test_a_kill_while_the_old_label_set_is_removed(store, photos, teachers, label_set, tmp_path):
    """The same command goes on, also beside a README.md that somebody sent, and nothing of the old label set stays."""
    settings = {**SMALL, "crops": 2, "crops_per_block": 2}
    fd.build(photos, tmp_path / "whole", teachers=teachers, **settings)
    (tmp_path / "README.md").write_text("ours")
    shutil.copy(tmp_path / "README.md", tmp_path / "whole")
    step, ended = -1, False
    while not ended:
        step += 1
        for name in store.sizes():
            store.remove(name)
        send(store, label_set)
        send(store, tmp_path / "README.md")
        with pytest.MonkeyPatch.context() as patch:
            die_before_removal(patch, step)
            try:
                fd.build(photos, OUT, teachers=teachers, overwrite=True, **settings)
                ended = True
            except KeyboardInterrupt:
                pass
        # Where the manifest is gone, --overwrite need not be said again.
        fd.build(photos, OUT, teachers=teachers, overwrite="manifest.json" in store.sizes(), **settings)
        assert same_files(fetched(tmp_path / f"copy-{step}"), tmp_path / "whole"), step
    assert step > 8


def send(store, path):
    """Send a file, or a folder, to the store as it is."""
    files = {path.name: path} if path.is_file() else {name: path / name for name in files_below(path)}
    for name, file in files.items():
        store.upload(file, name, size=file.stat().st_size, sha256=sha256_file(file))


def die_before_removal(patch, step):
    """Raise before the `step`-th removal; with step 0, when the new build would be planned."""
    count = 0
    remove = Remote.remove

    def counted(remote, name):
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        remove(remote, name)

    def planned(*arguments, **options):
        raise KeyboardInterrupt

    patch.setattr(Remote, "remove", counted)
    if step == 0:
        patch.setattr(Prepared, "begin", planned)


def test_another_host_goes_on_after_a_kill(store, photos, teachers, label_set, tmp_path, monkeypatch, quick_process):
    process = quick_process.Process(target=build_slowly, args=(photos, teachers, dict(os.environ)))
    process.start()
    while process.is_alive() and not any(name.startswith(".build/shards/") for name in store.sizes()):
        time.sleep(0.05)
    process.kill()
    process.join()
    finished = {name for name in store.sizes() if name.startswith(".build/shards/")}
    assert 0 < len(finished) < 3
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache-of-another-host"))
    done = []
    fd.build(photos, OUT, teachers=teachers, watchers=[Noting(done)], **SMALL)
    assert len(done) == 3 - len(finished)
    assert same_files(fetched(tmp_path / "copy"), label_set)


class Noting:
    def __init__(self, done):
        self.done = done

    def see(self, event):
        if isinstance(event, ShardDone):
            self.done.append(event.shard)


def test_a_host_keeps_no_shard_that_was_sent(store, photos, teachers, tmp_path):
    class Watcher:
        kept: ClassVar[list[Path]] = []

        def see(self, event):
            if isinstance(event, ShardDone):
                self.kept += (tmp_path / "cache-of-this-host").rglob("labels/*")

    fd.build(photos, OUT, teachers=teachers, watchers=[Watcher()], **SMALL)
    assert not Watcher.kept


def test_a_shard_whose_file_is_gone_or_short_is_labelled_again(store, photos, teachers, label_set, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.shard == 2:
            raise Stop

    with pytest.raises(Stop):
        fd.build(photos, OUT, teachers=teachers, on_progress=stop, **SMALL)
    store.remove("labels/00000-001.parquet")
    (tmp_path / "short").write_bytes(b"short")
    store.transport.write("labels/00001-000.parquet", tmp_path / "short")
    done = []
    fd.build(photos, OUT, teachers=teachers, watchers=[Noting(done)], **SMALL)
    assert done == [0, 1, 2]
    assert same_files(fetched(tmp_path / "copy"), label_set)


def test_other_settings_other_files_and_other_drivers_are_refused(store, photos, teachers, tmp_path):
    class Stop(Exception):
        pass

    def try_beside(progress):
        with pytest.raises(BuildLockedError, match=f"{OUT}: another build works here"):
            fd.build(photos, OUT, teachers=teachers, **SMALL)
        raise Stop

    with pytest.raises(Stop):
        fd.build(photos, OUT, teachers=teachers, on_progress=try_beside, **SMALL)
    with pytest.raises(BuildError, match=f"{OUT} holds an unfinished build with other settings: .*top_k.*4.*3"):
        fd.build(photos, OUT, teachers=teachers, **{**SMALL, "top_k": 3})
    (tmp_path / "theirs").write_text("notes")
    open_remote("s3://bucket/theirs").upload(
        tmp_path / "theirs", "notes.txt", size=5, sha256=fd.storage.sha256_file(tmp_path / "theirs")
    )
    with pytest.raises(BuildError, match="is not empty and holds no label set"):
        fd.build(photos, "s3://bucket/theirs", teachers=teachers, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": "https://example.org/x"}, "writes to a folder, s3:// or gs://"),
        ({"out": OUT, "extend": True}, "pull the label set, extend it"),
    ],
)
def test_what_stores_do_not_do(photos, teachers, arguments, message):
    with pytest.raises(UsageError, match=message):
        fd.build(photos, teachers=teachers, **SMALL, **arguments)
    with pytest.raises(UsageError, match="parts share a folder"):
        build_part(photos, OUT, part="1/2", teachers=teachers, **SMALL)
    with pytest.raises(UsageError, match="run its build command again"):
        finish(OUT)


def test_a_worker_that_comes_when_all_is_done_says_so(store):
    with pytest.raises(BuildError, match="holds no unfinished build"):
        StoreFiles(OUT).join()
