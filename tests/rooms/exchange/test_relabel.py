"""`verify --deep`: the same teachers say the same again, others do not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from label_sets import relist
from PIL import Image

import ferkd_data as fd
from ferkd_data.errors import UsageError
from ferkd_data.format import parquet
from ferkd_data.relabelling import LIMITS
from ferkd_data_cli.main import run

FIRST = "python:ferkd_tiny_teachers:first"
SECOND = "python:ferkd_tiny_teachers:second"


def test_the_same_teachers_say_the_same(label_set, photos, tiny_teachers):
    report = fd.relabel(label_set, images=photos, teachers=[tiny_teachers, SECOND], sample=7)
    assert (report.images, report.crops, report.other_crops, report.other_weights) == (7, 70, (), ())
    assert report.largest_difference <= 2**-10
    assert report.same_top1 == 1
    assert report.ok and report.limit == LIMITS["fp32"]
    # In another order they are the same ensemble.
    assert fd.relabel(label_set, images=photos, teachers=[SECOND, tiny_teachers], sample=3).ok


OTHERS = {
    "another normalisation": (
        [FIRST, SECOND + "?mean=0.9"],
        "mean is 0.9,0.9,0.9, the label set was made with 0.5",
    ),
    "another standard deviation": ([FIRST + "?std=0.3", SECOND], "std is 0.3,0.3,0.3"),
    "another filter": ([FIRST + "?interpolation=bicubic", SECOND], "interpolation is bicubic"),
    "another size": ([FIRST, SECOND + "?size=40"], "size is 40, the label set was made with 32"),
    "another temperature": ([FIRST + "?temperature=1.5", SECOND], "temperature is 1.5, the label set was made with 1"),
    "other weights in the ensemble": ([FIRST + "?weight=3", SECOND], "share of the ensemble is 0.75"),
    "a teacher too few": ([FIRST], "1 teacher is given, 2 made the label set"),
    "a teacher too many": ([FIRST, SECOND, SECOND], "3 teachers are given"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_as_the_manifest_says_fails(label_set, photos, tiny_teachers, case, call):
    """The command printed the differences and ended with status 0, however large they were."""
    teachers, said = OTHERS[case]
    specs = (word for spec in teachers for word in ("--teacher", spec))
    status, out, _ = call("verify", label_set, "--images", photos, "--deep", *specs)
    assert status == 1 and said in out


def test_other_weights_fail_by_what_they_say(label_set, photos, tiny_teachers, call):
    command = ("verify", label_set, "--images", photos, "--deep", "--teacher", FIRST)
    status, out, err = call(*command, "--teacher", "python:ferkd_tiny_teachers:third")
    assert status == 1 and "no machine makes such differences" in out
    assert "its weights are not those of the manifest's teachers" in err
    # Their settings are those of the manifest.
    assert "the label set was made with" not in out


def test_nearly_the_same_normalisation_is_told_from_the_same(photos, tmp_path, tiny_teachers):
    """127/255 is 0.498. A real teacher's probabilities are too close to tell it from 0.5, but the manifest knows."""
    fd.build(photos, tmp_path / "out", teachers=[f"{FIRST}?mean=127/255"], crops=4, top_k=3, device="cpu")
    assert fd.relabel(tmp_path / "out", images=photos, teachers=[f"{FIRST}?mean=0.498"]).ok
    report = fd.relabel(tmp_path / "out", images=photos, teachers=[FIRST])
    assert not report.ok
    assert report.other_settings == (f"{FIRST}: mean is 0.5,0.5,0.5, the label set was made with 0.498,0.498,0.498",)


def test_the_precision_of_the_build_sets_the_limit(photos, tmp_path, tiny_teachers):
    out = tmp_path / "out"
    fd.build(photos, out, teachers=[tiny_teachers], crops=8, top_k=3, device="cpu", precision="bf16")
    report = fd.relabel(out, images=photos, teachers=[tiny_teachers])
    assert report.ok and report.limit == LIMITS["bf16"]
    assert report.mean_difference > 1e-4
    assert fd.relabel(out, images=photos, teachers=[tiny_teachers], precision="bf16").largest_difference <= 2**-10


@pytest.mark.parametrize("column", ["class_prob", "target_prob"])
def test_one_altered_crop_is_found_and_named(copy, photos, tiny_teachers, column):
    """As long as its image is in the sample."""
    path = copy / "labels/00001-001.parquet"
    labels = fd.open_labels(copy)
    block = labels.raw_block(1, 1)
    altered = getattr(block, column).copy()
    altered[2, 3] = np.array([1, 0, 0, 0]) if column == "class_prob" else 1 - altered[2, 3].round()
    parquet.write(path, replace(block, **{column: altered}))
    relist(copy)
    report = fd.relabel(copy, images=photos, teachers=[tiny_teachers, SECOND])
    assert not report.ok and report.largest_difference > 0.1
    # Crop 3 of block 1, where a block has 4.
    assert report.furthest == f"image {block.keys[2]!r} crop 7"


def test_another_numbering_of_the_classes_is_named(photos, tmp_path, tiny_teachers, call):
    backwards = tmp_path / "classes.txt"
    backwards.write_text("".join(f"class{number}\n" for number in range(9, -1, -1)))
    settings = {"crops": 4, "top_k": 3, "device": "cpu"}
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], classes=backwards, **settings)
    # The label set knows its classes.
    assert fd.relabel(tmp_path / "out", images=photos, teachers=[tiny_teachers], sample=3).ok
    fd.build(photos, tmp_path / "sorted", teachers=[tiny_teachers], **settings)
    command = ("verify", tmp_path / "sorted", "--images", photos, "--deep", "--teacher", tiny_teachers)
    status, out, _ = call(*command, "--classes", backwards)
    assert status == 1 and "its ground truth is another class here; is --classes that of the build?" in out


def test_nothing_is_labelled_again_where_files_have_faults(copy, photos, tiny_teachers, call):
    (copy / "labels/00001-001.parquet").write_bytes(b"x")
    status, _, err = call("verify", copy, "--images", photos, "--deep", "--teacher", tiny_teachers)
    assert status == 1 and "not labelled again: the label set has faults already" in err


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
