"""Whatever is wrong with a label set, `verify` names it: file, row, image, crop and field."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from label_sets import edit_manifest

import ferkd_data as fd
from ferkd_data.format import parquet, webdataset
from ferkd_data.format.manifest_file import read_manifest
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.storage import sha256_file
from ferkd_data_cli.main import run

ROW, CROP = 3, 1


def fix_digest(folder, file):
    """So that only the check of the rows can find what was changed."""

    def change(content):
        for shard in content["shards"]:
            for entry in shard["files"]:
                if entry["path"] == file:
                    entry["bytes"] = (folder / file).stat().st_size
                    entry["sha256"] = sha256_file(folder / file)

    edit_manifest(folder, change)


def damage(folder, field, value, *, shard=0, block=0, crop=CROP):
    """Rewrite one value of one block file."""
    labels = fd.open_labels(folder).block(shard, block)
    array = getattr(labels, field)
    if isinstance(array, list):
        array = [*array[:ROW], value, *array[ROW + 1 :]]
    else:
        array = array.copy()
        at = (ROW, crop) if array.ndim > 1 and field != "image_digest" else ROW
        array[at] = value(array[at]) if callable(value) else value
    file = parquet.file_name(shard, block)
    parquet.write(folder / file, replace(labels, **{field: array}))
    fix_digest(folder, file)
    return file


@pytest.mark.parametrize("layout", ["label_set", "tar_label_set"])
def test_an_untouched_set_has_no_faults(layout, photos, request):
    report = fd.verify(request.getfixturevalue(layout), images=photos)
    assert report.ok
    assert report.faults == ()
    assert report.warnings == ()
    assert (report.images, report.crops) == (20, 200)


def descending(*values):
    return np.array(values, np.float16)


FIELDS = {
    "key": ("keys", "a/../b", "climbs out"),
    "height": ("height", 0, "0, must be at least 1"),
    "width": ("width", 1, "boxes: .* is not inside the image"),
    "no width": ("width", 0, "width: 0, must be at least 1"),
    "target_prob without target": ("target", -1, "target_prob: .*, though the ground truth is unknown"),
    "target": ("target", 10, "10, must be a class in 0..9"),
    "negative target": ("target", -7, "-7, must be a class in 0..9"),
    "box is empty": ("boxes", [0, 0, 0, 5], r"boxes: \[0, 0, 0, 5\].* is empty"),
    "box is too low": ("boxes", lambda box: box + np.array([60000, 0, 0, 0], np.uint16), "boxes: .* not inside"),
    "box is too far right": ("boxes", lambda box: box + np.array([0, 60000, 0, 0], np.uint16), "boxes: .* not inside"),
    "unknown class": ("class_index", lambda index: index + np.array([0, 10, 0, 0], np.uint16), "classes are 0..9"),
    "class twice": ("class_index", [1, 1, 2, 3], r"class_index: \[1, 1, 2, 3\] names a class twice"),
    "nan": ("class_prob", descending(0.5, np.nan, 0.1, 0.1), "class_prob: .* is not finite"),
    "infinite": ("class_prob", descending(np.inf, 0.2, 0.1, 0.1), "class_prob: .* is not finite"),
    "negative": ("class_prob", descending(0.5, 0.2, 0.1, -0.1), r"class_prob: .* is not in 0\.\.1"),
    "above 1": ("class_prob", descending(1.5, 0.2, 0.1, 0.1), r"class_prob: .* is not in 0\.\.1"),
    "rising": ("class_prob", descending(0.2, 0.5, 0.1, 0.1), "class_prob: .* is not descending"),
    "too much": ("class_prob", descending(0.5, 0.5, 0.5, 0.1), "class_prob: .* sums to more than 1"),
    "nothing": ("class_prob", descending(0, 0, 0, 0), "no class has a probability"),
    "target_prob": ("target_prob", 0.9, "target_prob: 0.89.* is (not the probability|more than the least)"),
    "target_prob above 1": ("target_prob", 2, r"target_prob: 2.0 is not in 0\.\.1"),
    "bucket": ("bucket", lambda bucket: (bucket + 1) % 4, "bucket: . is not what the manifest's thresholds say"),
    "bucket beyond": ("bucket", 200, "bucket: 200 is not what the manifest's thresholds say"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_checked(copy, name):
    field, value, message = FIELDS[name]
    key = fd.open_labels(copy).shard(0).keys[ROW]
    file = damage(copy, field, value)
    report = fd.verify(copy)
    named = [fault for fault in report.faults if fault.file == file and fault.row == ROW]
    assert any(np.char.find(str(fault), f"row {ROW}, image") >= 0 for fault in named)

    assert any(re.search(message, str(fault)) for fault in named), report.faults
    if field not in ("keys", "height", "width", "target"):
        assert all(fault.crop == CROP and fault.key == key for fault in named)


def test_a_target_outside_the_top_k_is_no_more_probable_than_those_kept(copy):
    labels = fd.open_labels(copy).block(0, 0)
    outside = (labels.class_index != labels.target[:, None, None]).all(axis=2)
    row, crop = np.argwhere(outside)[0].tolist()
    target_prob = labels.target_prob.copy()
    target_prob[row, crop] = np.nextafter(labels.class_prob[row, crop, -1], np.float16(1))
    parquet.write(copy / parquet.file_name(0, 0), replace(labels, target_prob=target_prob))
    fix_digest(copy, parquet.file_name(0, 0))
    fault, *_ = fd.verify(copy).faults
    assert (fault.row, fault.crop, fault.field) == (row, crop, "target_prob")
    assert "more than the least probability that was kept" in str(fault)


def test_a_target_among_the_classes_kept_has_its_probability(copy):
    labels = fd.open_labels(copy).block(0, 0)
    row, crop = np.argwhere((labels.class_index == labels.target[:, None, None]).any(axis=2))[0].tolist()
    target_prob = labels.target_prob.copy()
    target_prob[row, crop] = np.nan
    parquet.write(copy / parquet.file_name(0, 0), replace(labels, target_prob=target_prob))
    fix_digest(copy, parquet.file_name(0, 0))
    fault, *_ = fd.verify(copy).faults
    assert (fault.row, fault.crop, fault.field) == (row, crop, "target_prob")
    assert "is null, though the ground truth is among" in str(fault)


def test_crops_are_numbered_through_the_blocks(copy):
    file = damage(copy, "bucket", 200, shard=1, block=2, crop=1)
    (fault,) = [fault for fault in fd.verify(copy).faults if fault.file == file]
    assert fault.crop == 2 * 4 + 1


def test_equal_probabilities_out_of_order(copy):
    damage(copy, "class_prob", descending(0.25, 0.25, 0.25, 0.25))
    damage(copy, "class_index", [3, 2, 1, 0])
    assert any("not in the order of their classes" in str(fault) for fault in fd.verify(copy).faults)


@pytest.mark.parametrize("field", ["keys", "image_digest", "height", "width", "target"])
def test_blocks_of_a_shard_must_agree(copy, field):
    value = "another" if field == "keys" else (lambda old: old + 1 if field != "target" else (old + 1) % 10)
    file = damage(copy, field, value, block=1)
    assert any(
        fault.file == file and fault.row == ROW and "labels/00000-000" in str(fault) for fault in fd.verify(copy).faults
    )


def test_a_key_twice(copy):
    labels = fd.open_labels(copy)
    first = labels.shard(0).keys[5]
    for block in range(labels.num_blocks):
        damage(copy, "keys", first, shard=1, block=block)
    (fault,) = fd.verify(copy).faults
    assert (fault.file, fault.row, fault.key) == ("labels/00001-000.parquet", ROW, first)
    assert "an earlier row has the same key" in str(fault)


@pytest.mark.parametrize("name", ["crops", "p_max_histogram", "bucket_counts", "top1_matches_target", "kept_prob_sum"])
def test_statistics_must_add_up(copy, name):
    def change(content):
        said = content["statistics"][name]
        content["statistics"][name] = [said[0] + 1, *said[1:]] if isinstance(said, list) else said + 1

    edit_manifest(copy, change)
    (fault,) = fd.verify(copy).faults
    assert (fault.file, fault.field) == ("manifest.json", f"statistics.{name}")


def test_a_flipped_bit_in_a_file_that_still_parses(copy):
    file = copy / parquet.file_name(1, 1)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (fault,) = fd.verify(copy).faults
    assert str(fault) == "labels/00001-001.parquet: the bytes are not those of the manifest (SHA-256 differs)"


def test_rejects_are_checked(copy):
    (copy / "rejects.parquet").write_bytes(b"x" * (copy / "rejects.parquet").stat().st_size)
    (fault,) = fd.verify(copy).faults
    assert fault.file == "rejects.parquet"
    edit_manifest(copy, lambda m: m["rejects"].update(sha256=sha256_file(copy / "rejects.parquet")))
    assert "cannot be read as Parquet" in str(fd.verify(copy).faults[0])


def test_missing_short_and_stray_files(copy):
    (copy / parquet.file_name(0, 0)).unlink()
    short = copy / parquet.file_name(2, 0)
    short.write_bytes(short.read_bytes()[:-7])
    (copy / "labels/00007-000.parquet").write_bytes(b"?")
    report = fd.verify(copy)
    assert str(report.faults[0]).startswith("labels/00000-000.parquet: the shard is missing")
    assert "the manifest says" in str(report.faults[1])
    assert report.warnings == ("labels/00007-000.parquet: is not in the manifest; nobody reads it",)


def test_images_that_are_missing_or_others(label_set, photos, tmp_path):
    images = shutil.copytree(photos, tmp_path / "photos")
    missing, other, *_ = sorted(images.rglob("*.jpg"))
    missing.unlink()
    other.write_bytes(sorted(images.rglob("*.jpg"))[5].read_bytes())
    faults = fd.verify(label_set, images=images).faults
    assert len(faults) == 2
    assert faults[0].field == "image_digest"
    assert faults[0].key in str(other)
    assert "the labelled image is missing" in str(faults[1])
    assert faults[1].key in str(missing)


def test_a_fault_in_a_tar(tar_label_set, tmp_path):
    copy = shutil.copytree(tar_label_set, tmp_path / "tars")
    file = webdataset.file_name(0)
    rows = list(webdataset.read_rows(copy / file))
    with webdataset.Writer(copy / file) as writer:
        for number, (labels, image) in enumerate(rows):
            bad = labels.bucket + (3 if number == ROW else 0)
            writer.add(ImageLabels(**{**labels.__dict__, "bucket": bad.astype(np.uint8)}), image)
    fix_digest(copy, file)
    faults = [fault for fault in fd.verify(copy).faults if fault.file == file]
    assert [(fault.row, fault.field, fault.key) for fault in faults] == [(ROW, "bucket", rows[ROW][0].key)]
    assert "more crops of this image" in str(faults[0])


def test_faults_are_bounded_and_counted(copy):
    labels = fd.open_labels(copy).block(0, 0)
    parquet.write(copy / parquet.file_name(0, 0), replace(labels, bucket=labels.bucket + np.uint8(100)))
    fix_digest(copy, parquet.file_name(0, 0))
    report = fd.verify(copy, max_faults=3)
    assert len(report.faults) == 3
    assert report.faults_found >= 3
    assert not report.ok


def test_faults_that_nobody_wants_listed_are_faults(copy):
    damage(copy, "class_prob", descending(0.5, np.nan, 0.1, 0.1))
    report = fd.verify(copy, max_faults=0)
    assert not report.ok
    assert report.faults == ()


def test_the_command(copy, capsys):
    assert run(["verify", str(copy)]) == 0
    assert "no faults in 11 files" in capsys.readouterr().out
    damage(copy, "bucket", 200)
    assert run(["verify", str(copy), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["faults"][0]["field"] == "bucket"
    assert run(["verify", str(copy)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("labels/00000-000.parquet: row 3, image 'class")
    assert run(["verify", str(Path(copy).parent / "nothing")]) == 1
    assert read_manifest(copy).num_images == 20
