"""`verify --deep`: the same teachers say the same again, others do not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image

import ferkd_data as fd
from ferkd_data.errors import UsageError
from ferkd_data_cli.main import run

SECOND = "python:ferkd_tiny_teachers:second"


def test_the_same_teachers_say_the_same(label_set, photos, tiny_teachers):
    report = fd.relabel(label_set, images=photos, teachers=[tiny_teachers, SECOND], sample=7)
    assert (report.images, report.crops, report.other_crops, report.other_weights) == (7, 70, (), ())
    assert report.largest_difference <= 2**-10
    assert report.same_top1 == 1


def test_other_teachers_show(label_set, photos, tiny_teachers):
    report = fd.relabel(label_set, images=photos, teachers=[SECOND + "?mean=0.9,0.9,0.9"])
    assert report.images == 20
    assert report.largest_difference > 0.01
    assert fd.relabel(label_set, images=photos, teachers=["python:ferkd_tiny_teachers:third"]).other_weights


def test_crops_of_another_seed_are_named(label_set, photos, tiny_teachers, tmp_path):
    copy = shutil.copytree(label_set, tmp_path / "copy")
    content = json.loads((copy / "manifest.json").read_text())
    content["seed"] = 1
    (copy / "manifest.json").write_text(json.dumps(content))
    report = fd.relabel(copy, images=photos, teachers=[tiny_teachers, SECOND], sample=3)
    assert len(report.other_crops) == 3


def test_a_merged_set_has_no_single_seed(label_set, photos, tiny_teachers, tmp_path):
    fd.merge([label_set, label_set], tmp_path / "out")
    with pytest.raises(UsageError, match="was merged or imported"):
        fd.relabel(tmp_path / "out", images=photos, teachers=[tiny_teachers])


def test_the_command(label_set, photos, tiny_teachers, capsys):
    command = ["verify", str(label_set), "--deep", "--sample", "5", "--teacher", tiny_teachers, "--teacher", SECOND]
    assert run(command) == 2
    assert "--images" in capsys.readouterr().err
    assert run([*command, "--images", str(photos)]) == 0
    assert "labelled again: 50 crops of 5 images" in capsys.readouterr().out
    assert run([*command, "--images", str(photos), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deep"]["same_top1"] == 1


def test_a_teacher_without_deep_is_refused(label_set, photos, tiny_teachers, capsys):
    """It was ignored, and `no faults` looked like its answer."""
    command = ["verify", str(label_set), "--images", str(photos), "--teacher", tiny_teachers]
    assert run(command) == 2
    assert "--teacher would have no effect without --deep" in capsys.readouterr().err
    assert run([*command, "--sample", "5"]) == 2
    assert "--teacher and --sample" in capsys.readouterr().err


def test_images_that_can_no_longer_be_labelled_are_named(label_set, photos, tiny_teachers, tmp_path, capsys):
    images = shutil.copytree(photos, tmp_path / "photos")
    gone, broken = sorted(images.rglob("*.jpg"))[:2]
    gone.unlink()
    broken.write_bytes(b"broken")
    teachers = [tiny_teachers, SECOND]
    report = fd.relabel(label_set, images=images, teachers=teachers)
    assert report.images == 18 and len(report.not_labelled) == 2
    assert f"{gone.parent.name}/{gone.stem}: is not in the source" in report.not_labelled
    assert report.not_labelled[1].startswith(f"{broken.parent.name}/{broken.stem}: not_an_image (")


def test_the_pixel_limit_is_the_build_s(photos, tiny_teachers, tmp_path):
    images = shutil.copytree(photos, tmp_path / "photos")
    fd.build(images, tmp_path / "out", teachers=[tiny_teachers], crops=2, top_k=2, max_pixels=10**6)
    first = sorted(images.rglob("*.jpg"))[0]
    Image.new("RGB", (1001, 1000)).save(first)
    report = fd.relabel(tmp_path / "out", images=images, teachers=[tiny_teachers])
    assert [text.partition(" (")[0] for text in report.not_labelled] == [
        f"{first.parent.name}/{first.stem}: pixel_bomb"
    ]


def test_the_command_fails_where_images_are_not_labelled_again(label_set, photos, tiny_teachers, capsys, monkeypatch):
    # `verify` refuses images that have changed before it labels any, so this is the rest: the report is made up.
    report = replace(fd.relabel(label_set, images=photos, teachers=[SECOND], sample=1), not_labelled=("a: gone",))
    monkeypatch.setattr(fd, "relabel", lambda *args, **options: report)
    command = ["verify", str(label_set), "--deep", "--teacher", SECOND, "--images", str(photos)]
    assert run(command) == 1
    assert "not labelled again: a: gone" in capsys.readouterr().out
    assert run([*command, "--json"]) == 1
