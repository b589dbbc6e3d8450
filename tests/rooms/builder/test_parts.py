"""Parts of a build, as a batch system runs them: apart, at once, and killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_sets import SMALL, same_files, wait_until

import ferkd_data as fd
from ferkd_data.builder import build_part, finish
from ferkd_data.builder.plan import Part
from ferkd_data.errors import BuildError, BuildLockedError, SettingsMismatchError, SourceError, UsageError
from ferkd_data_cli.main import run

OPTIONS = ("--crops", "10", "--crops-per-block", "4", "--top-k", "4", "--images-per-shard", "2", "--device", "cpu")
SETTINGS = {**SMALL, "images_per_shard": 2}
"""20 images in 10 shards."""


def part_of_build(photos, out, teacher, part):
    return ["build", str(photos), str(out), "--teacher", teacher, *OPTIONS, "--part", part]


def start_part(photos, out, teacher, part, *more, sleep=0.0):
    command = [sys.executable, "-m", "ferkd_data_cli.main", *part_of_build(photos, out, teacher, part), *more]
    environment = {**os.environ, "TINY_SLEEP": str(sleep)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("more", [(), ("--layout", "webdataset", "--thresholds", "quantile:0.1,0.25,0.8")])
def test_parts_at_the_same_time_make_the_build_of_one(photos, tiny_teachers, tmp_path, more):
    """Three real processes on one folder, one of them killed and run again."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    layout = {"layout": "webdataset", "thresholds": fd.QuantileThresholds(low=0.1, mid=0.25, top=0.8)} if more else {}
    fd.build(photos, undisturbed, teachers=[tiny_teachers], **SETTINGS, **layout)
    # The second sleeps long enough to be at work still when it is killed.
    sleeps = ((1, 0.2), (2, 1), (3, 0.2))
    parts = [start_part(photos, out, tiny_teachers, f"{i}/3", *more, sleep=sleep) for i, sleep in sleeps]
    wait_until(lambda: (out / ".build/shards/00001.json").exists())
    parts[1].kill()
    outputs = [part.communicate(timeout=120) for part in parts]
    assert [part.returncode for part in parts] == [0, -9, 0], outputs
    with pytest.raises(BuildError, match=r"of 10 shards are missing: .*; run part 2/3 again"):
        finish(out)
    assert run([*part_of_build(photos, out, tiny_teachers, "2/3"), *more]) == 0
    assert run(["finish", str(out)]) == 0
    assert same_files(undisturbed, out)


def test_a_part_that_was_never_begun_is_named(photos, tiny_teachers, tmp_path):
    build_part(photos, tmp_path / "out", part="1/2", teachers=[tiny_teachers], **SETTINGS)
    with pytest.raises(BuildError, match=r"5 of 10 shards are missing: 1, 3, 5, 7, 9; run part 2/2 again"):
        finish(tmp_path / "out")


def test_rejects_of_all_parts_are_kept(make_photos, tiny_teachers, tmp_path, capsys):
    photos = make_photos(tmp_path / "photos")
    for name in ("class0/photo0000.jpg", "class5/photo0015.jpg"):
        (photos / name).write_bytes(b"no picture")
    fd.build(photos, tmp_path / "undisturbed", teachers=[tiny_teachers], **SETTINGS)
    rejects = []
    for part in ("1/2", "2/2"):
        rejects.append(build_part(photos, tmp_path / "out", part=part, teachers=[tiny_teachers], **SETTINGS).rejects)
    assert rejects == [1, 1]
    assert run(["finish", str(tmp_path / "out"), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["rejects"] == 2
    assert same_files(tmp_path / "undisturbed", tmp_path / "out")


def test_who_may_work_beside_whom(photos, tiny_teachers, tmp_path):
    """A part beside another part; not beside itself, the whole build, or `finish`."""
    out = tmp_path / "out"
    seen = []

    def look_around(progress):
        if seen:
            return
        seen.append(progress)
        build_part(photos, out, part="2/2", teachers=[tiny_teachers], **SETTINGS)
        for intruder in (
            lambda: build_part(photos, out, part="1/2", teachers=[tiny_teachers], **SETTINGS),
            lambda: fd.build(photos, out, teachers=[tiny_teachers], **SETTINGS),
            lambda: finish(out),
        ):
            with pytest.raises(BuildLockedError):
                intruder()
        with pytest.raises(SettingsMismatchError, match="seed"):
            build_part(photos, out, part="2/2", teachers=[tiny_teachers], **SETTINGS, seed=7)

    build_part(photos, out, part="1/2", teachers=[tiny_teachers], on_progress=look_around, **SETTINGS)
    assert (seen[0].images_total, seen[0].shards_total) == (10, 5)
    finish(out)
    assert finish(out).already_finished
    again = build_part(photos, out, part="1/2", teachers=[tiny_teachers], **SETTINGS)
    assert again.already_finished and (again.shards, again.images) == (5, 10)


def test_a_whole_build_takes_over_what_parts_have_done(photos, tiny_teachers, tmp_path):
    build_part(photos, tmp_path / "out", part="2/3", teachers=[tiny_teachers], **SETTINGS)
    seen = []
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], on_progress=seen.append, **SETTINGS)
    assert {1, 4, 7}.isdisjoint({progress.shard for progress in seen})
    fd.build(photos, tmp_path / "undisturbed", teachers=[tiny_teachers], **SETTINGS)
    assert same_files(tmp_path / "undisturbed", tmp_path / "out")


def write_tar(path, photos):
    with tarfile.open(path, "w") as tar:
        for photo in photos:
            tar.add(photo, photo.name)


def write_parquet(path, photos):
    rows = [{"bytes": photo.read_bytes(), "path": photo.name} for photo in photos]
    pq.write_table(pa.table({"image": rows}), path)


@pytest.mark.parametrize(("name", "write"), [("some.tar", write_tar), ("some.parquet", write_parquet)])
def test_a_source_that_changes_before_the_next_part_is_noticed(photos, tiny_teachers, tmp_path, name, write):
    """Images are read at the places that were listed at first; other images would get their keys."""
    source, out = tmp_path / name, tmp_path / "out"
    found = sorted(photos.rglob("*.jpg"))
    write(source, found)
    before = source.read_bytes()
    build_part(source, out, part="1/2", teachers=[tiny_teachers], **SETTINGS)
    write(source, found[::-1])
    with pytest.raises(SourceError, match=rf"{name}: was written anew since this build began, .*again with --over"):
        build_part(source, out, part="2/2", teachers=[tiny_teachers], **SETTINGS)
    source.write_bytes(before)
    build_part(source, out, part="2/2", teachers=[tiny_teachers], **SETTINGS)
    finish(out)
    assert fd.verify(out, images=source).ok


def test_every_shard_is_in_one_part():
    for of in (1, 2, 3, 7, 50):
        parts = [Part(number=number, of=of) for number in range(1, of + 1)]
        assert sorted(shard for part in parts for shard in part.shards(range(20))) == list(range(20))
        assert all(part.has(shard) for part in parts for shard in part.shards(range(20)))


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", ""])
def test_parts_that_make_no_sense(text):
    with pytest.raises(UsageError, match="a part is"):
        Part.parse(text)


def test_wrong_use(photos, tmp_path, tiny_teachers, capsys):
    assert run(["finish", str(tmp_path / "nothing")]) == 1
    assert "holds no unfinished build" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
    arguments = ["build", str(photos), str(tmp_path / "out"), "--teacher", tiny_teachers, *OPTIONS]
    assert run([*arguments, "--part", "1/2", "--overwrite"]) == 2
    assert "--overwrite with --part" in capsys.readouterr().err
