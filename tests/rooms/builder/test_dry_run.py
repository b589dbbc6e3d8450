"""What a build will take: with how many workers, and where that was measured. (On a Ray cluster: test_ray.py.)"""

from __future__ import annotations

import os
import shutil
import sys
from types import SimpleNamespace

import pytest
from label_sets import SMALL, TEACHER_MODULES

import ferkd_data as fd
from ferkd_data.builder import dry_run
from ferkd_data.builder.labelling import measuring as module
from ferkd_data.builder.labelling.measuring import Sample
from ferkd_data.errors import BuildError, TeacherError, UsageError
from ferkd_data_cli.main import run


@pytest.fixture
def teachers(tiny_teachers, tmp_path, monkeypatch):
    """The spec's beginning; `python:marking_teachers:` and a factory."""
    (tmp_path / "modules").mkdir()
    shutil.copy(TEACHER_MODULES / "marking_teachers.py", tmp_path / "modules")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield "python:marking_teachers:"
    sys.modules.pop("marking_teachers", None)


def test_one_worker_measures_and_leaves_nothing(photos, tiny_teachers, tmp_path):
    before = sorted(tmp_path.iterdir())
    estimate = dry_run(photos, teachers=[tiny_teachers, "python:ferkd_tiny_teachers:second"], **SMALL)
    assert (estimate.images, estimate.crops, estimate.forwards) == (20, 200, 400)
    assert estimate.hours == pytest.approx(200 / estimate.crops_per_second / 3600)
    assert estimate.files == 3 * 3 + 2
    assert estimate.label_bytes > 200 * 10 and estimate.image_bytes == 0
    assert [teacher.forwards for teacher in estimate.teachers] == [200, 200]
    assert (estimate.workers, estimate.measured_on, estimate.measured_crops) == (1, ("cpu",), 80)
    assert estimate.worker_crops_per_second == estimate.crops_per_second and estimate.part is None
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("quick_workers")
def test_two_workers_are_measured_together_with_half_of_the_cores_each(photos, teachers, tmp_path, monkeypatch):
    monkeypatch.setattr("ferkd_data.builder.settings.cores", lambda: 6)
    estimate = dry_run(photos, teachers=[teachers + "marking"], workers=2, **SMALL)
    marks = sorted(path.name.partition("-") for path in (tmp_path / "modules").glob("*-threads"))
    assert len(marks) == 2 and all(rest == "with-3-threads" for _, _, rest in marks)
    assert str(os.getpid()) not in {process for process, _, _ in marks}
    assert (estimate.workers, estimate.measured_on, estimate.measured_crops) == (2, ("cpu", "cpu"), 160)
    assert estimate.crops_per_second == 2 * estimate.worker_crops_per_second
    assert estimate.hours == pytest.approx(200 / estimate.crops_per_second / 3600)
    (teacher,) = estimate.teachers
    assert teacher.hours == pytest.approx(200 * teacher.milliseconds_per_crop / 2 / 3.6e6)


@pytest.mark.usefixtures("quick_workers")
def test_a_worker_that_fails_or_dies(photos, teachers, tmp_path):
    with pytest.raises(TeacherError, match="ferkd_tiny_teachers:nan gave NaN"):
        dry_run(photos, teachers=["python:ferkd_tiny_teachers:nan"], workers=2, **SMALL)
    with pytest.raises(
        BuildError, match=r"^worker [01] \(cpu, process \d+\) ended with status 9 while it was measured"
    ):
        dry_run(photos, teachers=[teachers + "dying"], workers=2, **SMALL)


@pytest.mark.parametrize("settings", [{"crops": 10, "crops_per_block": 5}, {"crops": 12, "crops_per_block": 50}])
def test_the_size_is_that_of_whole_shards_though_few_images_are_measured(
    photos, tiny_teachers, tmp_path, monkeypatch, settings
):
    """The footers of small files were scaled up with the rows, to ten times the size that the build then had."""
    monkeypatch.setattr(module, "MEASURE_SECONDS", 0.0)
    settings = {"teachers": [tiny_teachers], "top_k": 4, "device": "cpu", "images_per_shard": 20, **settings}
    estimate = dry_run(photos, **settings)
    assert estimate.measured_crops < 4 * settings["crops"]
    manifest = fd.build(photos, tmp_path / "out", **settings).manifest
    built = sum(file.bytes for shard in manifest.shards for file in shard.files)
    assert 0.7 * built < estimate.label_bytes < 1.4 * built


@pytest.fixture
def together(monkeypatch):
    """Workers that label at 40 crops/s where they are two, and at 20 where they are more; nothing is measured."""
    asked = []

    def measure(workers, shards):
        asked.append((list(workers.devices), [len(refs) for refs in shards]))
        rate = 40 if len(shards) == 2 else 20
        sample = Sample(
            location="cpu",
            images=2,
            crops=20,
            crops_per_second=rate,
            label_bytes=500,
            image_bytes=0,
            teacher_milliseconds=(9.0,),
        )
        return [sample for _ in shards]

    # The room's attribute of this name is the function.
    monkeypatch.setattr(sys.modules["ferkd_data.builder.dry_run"], "measure_with", measure)
    return asked


def test_no_more_workers_than_shards(photos, tiny_teachers, together):
    estimate = dry_run(photos, teachers=[tiny_teachers], workers=16, **SMALL)
    assert together == [(["cpu"] * 3, [8, 8, 4])]
    assert (estimate.workers, estimate.crops_per_second) == (3, 60)
    assert estimate.label_bytes == 500 * 10
    dry_run(photos, teachers=[tiny_teachers], workers=2, **{**SMALL, "images_per_shard": 20})
    assert together[1] == (["cpu"], [20])


@pytest.mark.parametrize("name", ["two.dots.jpg", "no_picture.jpg"])
def test_images_that_cannot_be_used(tiny_teachers, tmp_path, name):
    """Rejected by the listing, and when they are read."""
    (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(BuildError, match="none of the first images can be used"):
        dry_run(tmp_path, teachers=[tiny_teachers], **SMALL)


def test_a_part_is_estimated_alone(photos, tiny_teachers, together):
    """Shards 0 and 2 of three: 12 of the 20 images; it writes no manifest."""
    estimate = dry_run(photos, teachers=[tiny_teachers], workers=16, part="1/2", **SMALL)
    assert together == [(["cpu"] * 2, [8, 4])]
    assert (estimate.images, estimate.crops, estimate.files, estimate.part) == (12, 120, 2 * 3, "1/2")
    assert estimate.hours == pytest.approx(120 / 80 / 3600) and estimate.label_bytes == 500 * 6
    with pytest.raises(BuildError, match=r"makes 3 shards, and part 5/8 has none"):
        dry_run(photos, teachers=[tiny_teachers], part="5/8", **SMALL)
    with pytest.raises(UsageError, match="a part is I/N"):
        dry_run(photos, teachers=[tiny_teachers], part="5", **SMALL)


OPTIONS = ["--crops", "10", "--crops-per-block", "4", "--top-k", "4", "--images-per-shard", "8", "--device", "cpu"]


def test_what_is_printed(photos, tiny_teachers, tmp_path, together, capsys):
    dry = ["build", str(photos), str(tmp_path / "out"), "--teacher", tiny_teachers, "--dry-run", *OPTIONS]
    assert run([*dry, "--workers", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "rate          60.0 crops/s: 3 workers at 20.0"
    assert lines[4] == "measured      60 crops, on 3 x cpu, all at once"
    assert run([*dry, "--workers", "3", "--part", "1/2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["part          1/2", "images        12"]


def test_where_fewer_were_measured_than_will_work(capsys):
    from ferkd_data_cli.build import _measured_on

    told = SimpleNamespace(workers=64, measured_on=("cuda of node a",) * 2)
    assert _measured_on(told).startswith("2 x cuda of node a: 2 of 64 workers; those of one node share")


def test_too_little_time_for_two_batches(photos, tiny_teachers, monkeypatch):
    monkeypatch.setattr(module, "MEASURE_SECONDS", 0)
    estimate = dry_run(photos, teachers=[tiny_teachers], **{**SMALL, "batch_size": 256})
    assert estimate.crops_per_second > 0


def test_an_extension_is_not_measured(photos):
    with pytest.raises(UsageError, match="from the start"):
        dry_run(photos, teachers=[], extend=True, crops=20)
