"""Invariant 3: a build killed at any moment resumes, and the result is that of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest
from label_sets import SMALL, files_below, same_label_sets, same_rows

import ferkd_data as fd
from ferkd_data.builder.locks import open_build_folder
from ferkd_data.errors import BuildError, BuildLockedError, FerkdError, ManifestError, SettingsMismatchError

KILLS_PER_LAYOUT = 10
KILLS_OF_EXTENSIONS = 6


def build_slowly(photos, out, teacher, layout, sleep):
    os.environ["TINY_SLEEP"] = str(sleep)
    fd.build(photos, out, teachers=[teacher], layout=layout, batch_size=16, **SMALL)


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_kill_and_resume(photos, tiny_teachers, tmp_path, quick_process, layout):
    """10 kills at random moments for each layout; whenever a build gets through, it is compared and begun afresh."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    fd.build(photos, undisturbed, teachers=[tiny_teachers], layout=layout, batch_size=16, **SMALL)
    moments = random.Random(layout)
    killed = with_shards = 0
    while killed < KILLS_PER_LAYOUT:
        process = quick_process.Process(target=build_slowly, args=(photos, out, tiny_teachers, layout, 0.05))
        process.start()
        if moments.random() < 0.8:
            wait_for(out / ".build/plan.json", process)
        if killed % 2:
            wait_for_a_shard(out, process)
        process.join(moments.uniform(0.0, 1.0))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        with_shards += any(out.glob(".build/shards/*.json"))
        if (out / "manifest.json").exists():
            assert same_label_sets(undisturbed, out)
            shutil.rmtree(out)
        elif (out / ".build").exists():
            with pytest.raises(ManifestError, match="resume it"):
                fd.open_labels(out)
    assert with_shards > 0, "no kill came after a finished shard; the moments are wrong"
    if not (out / "manifest.json").exists():
        fd.build(photos, out, teachers=[tiny_teachers], layout=layout, batch_size=16, **SMALL)
    assert same_label_sets(undisturbed, out)
    assert not list(out.rglob("*.tmp"))
    assert not (out / ".build").exists()


def extend_slowly(photos, out, sleep):
    os.environ["TINY_SLEEP"] = str(sleep)
    fd.build(photos, out, extend=True, crops=12, batch_size=16, device="cpu")


def test_kill_and_resume_an_extension(photos, make_photos, tiny_teachers, tmp_path, quick_process):
    """Until it is whole, OUT is the old label set, byte by byte; then it is what a fresh build would have written."""
    first, more, fresh, out = (tmp_path / name for name in ("first", "more", "fresh", "out"))
    make_photos(more, 31)
    settings = {**SMALL, "crops": 8, "batch_size": 16}
    fd.build(photos, first, teachers=[tiny_teachers], **settings)
    fd.build(more, fresh, teachers=[tiny_teachers], **{**settings, "crops": 12})
    old = files_below(first)
    shutil.copytree(first, out)
    moments = random.Random(5)
    killed = with_shards = 0
    while killed < KILLS_OF_EXTENSIONS:
        process = quick_process.Process(target=extend_slowly, args=(more, out, 0.05))
        process.start()
        wait_for(out / ".build/plan.json", process)
        if killed % 2:
            wait_for_a_shard(out, process)
        process.join(moments.uniform(0.0, 0.5))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        with_shards += any(out.glob(".build/shards/*.json"))
        if fd.open_labels(out).num_crops == 12:
            assert same_rows(fresh, out)
            shutil.rmtree(out)
            shutil.copytree(first, out)
        else:
            assert old.items() <= files_below(out).items() and fd.verify(out).ok
    assert with_shards > 0, "no kill came after a finished shard; the moments are wrong"
    fd.build(more, out, extend=True, crops=12, batch_size=16, device="cpu")
    assert same_rows(fresh, out) and fd.verify(out, images=more).faults == fd.verify(out).warnings == ()
    assert not (out / ".build").exists()


def wait_for_a_shard(out, process):
    """However slow the machine is."""
    while process.is_alive() and not any(out.glob(".build/shards/*.json")):
        time.sleep(0.02)


def wait_for(path, process):
    while process.is_alive() and not path.exists():
        time.sleep(0.02)


def test_finished_shards_are_not_labelled_again(photos, tiny_teachers, tmp_path):
    class Stop(Exception):
        pass

    def stop_in_the_second_shard(progress):
        if progress.shard == 1:
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        fd.build(photos, out, teachers=[tiny_teachers], on_progress=stop_in_the_second_shard, **SMALL)
    first = (out / "labels/00000-000.parquet").stat()
    seen = []
    fd.build(photos, out, teachers=[tiny_teachers], on_progress=lambda p: seen.append(p.shard), **SMALL)
    assert set(seen) == {1, 2}
    assert (out / "labels/00000-000.parquet").stat().st_mtime_ns == first.st_mtime_ns


def test_a_shard_whose_file_is_damaged_is_labelled_again(photos, tiny_teachers, tmp_path, label_set):
    out = tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.shard == 2:
            raise Stop

    with pytest.raises(Stop):
        fd.build(photos, out, teachers=TEACHERS(tiny_teachers), on_progress=stop, **SMALL)
    (out / "labels/00001-001.parquet").write_bytes(b"short")
    fd.build(photos, out, teachers=TEACHERS(tiny_teachers), **SMALL)
    assert same_label_sets(out, label_set)


def TEACHERS(first):
    return [first, "python:ferkd_tiny_teachers:second"]


def test_other_settings_are_refused_and_named(photos, tiny_teachers, tmp_path):
    out = tmp_path / "out"

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fd.build(photos, out, teachers=[tiny_teachers], on_progress=stop, **SMALL)
    with pytest.raises(SettingsMismatchError, match=r"top_k: saved 4, now 3.*seed: saved 0, now 5"):
        fd.build(photos, out, teachers=[tiny_teachers], **{**SMALL, "top_k": 3, "seed": 5})
    with pytest.raises(SettingsMismatchError, match=r"teachers\[0\].digest"):
        fd.build(photos, out, teachers=["python:ferkd_tiny_teachers:second"], **SMALL)
    fd.build(photos, out, teachers=[tiny_teachers], overwrite=True, **{**SMALL, "seed": 5})
    assert fd.open_labels(out).manifest.seed == 5


def test_a_live_build_locks_its_folder(photos, tiny_teachers, tmp_path, quick_process):
    out = tmp_path / "out"
    process = quick_process.Process(target=build_slowly, args=(photos, out, tiny_teachers, "parquet", 3))
    process.start()
    wait_for(out / ".build/plan.json", process)
    with pytest.raises(BuildLockedError, match=str(process.pid)):
        fd.build(photos, out, teachers=[tiny_teachers], **SMALL)
    process.kill()
    process.join()
    with open_build_folder(out, overwrite=False):
        pass


def drive(photos, out, teacher, extend, queue, told):
    """The one that works waits, in its first shard, until the other is told."""
    settings = {"extend": True, "crops": 20, "device": "cpu"} if extend else {"teachers": [teacher], **SMALL}
    try:
        fd.build(photos, out, on_progress=lambda progress: told.wait(60), **settings)
        queue.put("done")
    except BuildLockedError:
        told.set()
        queue.put("locked")
    except FerkdError as error:
        queue.put(str(error))


@pytest.mark.parametrize("extend", [False, True])
def test_of_two_drivers_one_works_and_one_is_told(photos, tiny_teachers, tmp_path, quick_process, extend):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    blocks = {**SMALL, "crops_per_block": 5}
    if extend:
        fd.build(photos, out, teachers=[tiny_teachers], **blocks)
    queue = quick_process.SimpleQueue()
    arguments = (photos, out, tiny_teachers, extend, queue, quick_process.Event())
    drivers = [quick_process.Process(target=drive, args=arguments) for _ in range(2)]
    for driver in drivers:
        driver.start()
    assert sorted(queue.get() for _ in drivers) == ["done", "locked"]
    for driver in drivers:
        driver.join()
    settings = {**blocks, "crops": 20} if extend else SMALL
    fd.build(photos, undisturbed, teachers=[tiny_teachers], **settings)
    assert same_label_sets(undisturbed, out) and fd.verify(out).ok


def test_a_finished_set_and_a_foreign_folder_are_not_touched(photos, tiny_teachers, tmp_path, label_set):
    with pytest.raises(BuildError, match="finished label set"):
        fd.build(photos, label_set, teachers=[tiny_teachers], **SMALL)
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(BuildError, match="holds no label set"):
            fd.build(photos, tmp_path, teachers=[tiny_teachers], overwrite=overwrite, **SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert not (label_set / ".build").exists()
