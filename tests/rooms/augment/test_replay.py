"""Crops with recorded operations: teachers and students get the same pixels, and every reader the same operations."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from label_sets import SMALL, rows_by_key, same_labels

import ferkd_data as fd
from ferkd_data.errors import LabelSetError, ManifestError, SettingsMismatchError, ShardError, UsageError
from ferkd_data.exchange.card import render_card
from ferkd_data.images import decode_rgb
from ferkd_data.replay import replay
from ferkd_data.teachers import TeacherSpec, load_teacher
from ferkd_data_cli.main import run

AUGMENT = ("randaugment:n=2,m=15", "colorjitter:0.4,0.4,0.4,0.1,p=0.5", "erase:p=0.5")
LAYOUTS = ("parquet", "webdataset")


@pytest.fixture(scope="module", params=LAYOUTS)
def augmented(request, tmp_path_factory, photos, tiny_teachers):
    """Build 20 images with 10 crops each, in the layout."""
    out = tmp_path_factory.mktemp("augmented") / request.param
    fd.build(photos, out, teachers=[tiny_teachers], augment=AUGMENT, layout=request.param, **SMALL)
    return out


def loaded(augmented, photos, tmp_path, **changes):
    labels = fd.open_labels(augmented)
    images = None if labels.manifest.layout == "webdataset" else photos
    settings = {"batch_size": 10, "crops_per_image": 10, "size": 32, "order": "sequential", "calibration": "fkd"}
    return fd.CropLoader(labels, images=images, cache_dir=tmp_path / "cache", **{**settings, **changes})


def test_the_student_gets_what_the_teacher_saw(augmented, photos, tmp_path, tiny_teachers):
    """The teacher gives the stored labels again for the loader's pixels."""
    teacher = load_teacher(TeacherSpec.parse(tiny_teachers), device="cpu", precision="fp32")
    labels = fd.open_labels(augmented)
    seen = 0
    for row, (images, _) in zip(labels, loaded(augmented, photos, tmp_path), strict=True):
        assert row.operations.any()
        with torch.inference_mode():
            prob = teacher.logits(images).softmax(dim=1)
        # An epoch draws each of the 10 crops once; they are told apart by their labels.
        top = np.sort(prob.topk(labels.top_k).values.numpy().astype(np.float16), axis=0)
        assert np.allclose(top, np.sort(row.class_prob, axis=0), atol=2e-3)
        seen += len(images)
    assert seen == 200


def test_crops_with_and_without_operations_differ(augmented, photos):
    labels = fd.open_labels(augmented)
    row = labels[next(labels.keys())]
    pixels = decode_rgb(next(photos.rglob(f"{row.key.rpartition('/')[2]}.jpg")).read_bytes(), max_pixels=10**6)
    plain = replay(pixels, type(row.crops)(boxes=row.boxes, flip=row.flip), size=48)
    whole = replay(pixels, row.crops, size=48)
    assert (plain != whole).flatten(1).any(dim=1).sum() >= 8
    assert torch.equal(whole[3:5], replay(pixels, row.crops[3:5], size=48))


def test_boxes_are_those_of_a_build_without(augmented, photos, tmp_path, tiny_teachers):
    fd.build(photos, tmp_path / "plain", teachers=[tiny_teachers], **SMALL)
    for plain, view in zip(fd.open_labels(tmp_path / "plain"), fd.open_labels(augmented), strict=True):
        assert plain.key == view.key
        assert np.array_equal(plain.boxes, view.boxes) and np.array_equal(plain.flip, view.flip)


def test_more_crops_keep_the_first(augmented, photos, tmp_path, tiny_teachers):
    settings = {**SMALL, "crops": 14}
    fd.build(photos, tmp_path / "more", teachers=[tiny_teachers], augment=AUGMENT, **settings)
    for few, more in zip(fd.open_labels(augmented), fd.open_labels(tmp_path / "more"), strict=True):
        assert np.array_equal(more.operations[:10], few.operations)


def test_an_extension_goes_on_drawing(photos, tmp_path, tiny_teachers):
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    fd.build(photos, whole, teachers=[tiny_teachers], augment=AUGMENT, **{**SMALL, "crops": 8})
    fd.build(photos, grown, teachers=[tiny_teachers], augment=AUGMENT, **{**SMALL, "crops": 4})
    fd.build(photos, grown, extend=True, crops=8, device="cpu")
    ours, theirs = rows_by_key(grown), rows_by_key(whole)
    assert ours.keys() == theirs.keys() and all(same_labels(ours[key], theirs[key]) for key in ours)
    with pytest.raises(SettingsMismatchError, match="augment"):
        fd.build(photos, grown, extend=True, crops=12, device="cpu", augment=("rotate:15",))


def test_other_operations_are_other_settings(photos, tmp_path, tiny_teachers):
    class Stopped(Exception):
        pass

    def stop(progress):
        raise Stopped

    with pytest.raises(Stopped):
        fd.build(photos, tmp_path, teachers=[tiny_teachers], augment=AUGMENT, on_progress=stop, **SMALL)
    with pytest.raises(SettingsMismatchError, match="augment"):
        fd.build(photos, tmp_path, teachers=[tiny_teachers], augment=("rotate:15",), **SMALL)


def test_without_operations_no_byte_changes(label_set):
    text = (label_set / "manifest.json").read_text()
    assert "augment" not in text and "requires" not in text


def test_a_reader_that_does_not_know_them_refuses(augmented, tmp_path):
    copy = shutil.copytree(augmented, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["requires"] == ["recorded-operations-1"]
    (copy / "manifest.json").write_text(json.dumps({**manifest, "requires": ["recorded-operations-2"]}))
    with pytest.raises(ManifestError, match=r"requires 'recorded-operations-2'.*upgrade"):
        fd.open_labels(copy)
    (copy / "manifest.json").write_text(json.dumps({**manifest, "augmentations": ["warp:3"]}))
    with pytest.raises(ManifestError, match="warp"):
        fd.open_labels(copy)
    (copy / "manifest.json").write_text(json.dumps({**manifest, "requires": []}))
    with pytest.raises(ManifestError, match="contradict"):
        fd.open_labels(copy)


def test_operations_of_other_slots_than_the_manifest_says(augmented, tmp_path):
    copy = shutil.copytree(augmented, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "augmentations": ["rotate:15"]}))
    with pytest.raises(ShardError):
        fd.open_labels(copy).shard(0)


def test_merging_needs_the_same_operations(augmented, photos, tmp_path, tiny_teachers):
    layout = fd.open_labels(augmented).manifest.layout
    fd.build(photos, tmp_path / "plain", teachers=[tiny_teachers], layout=layout, **{**SMALL, "seed": 1})
    with pytest.raises((LabelSetError, UsageError), match="augmentations"):
        fd.merge([augmented, tmp_path / "plain"], tmp_path / "merged")


def test_fkd_has_no_place_for_them(augmented, tmp_path):
    with pytest.raises(UsageError, match="recorded augmentations"):
        fd.export_fkd(augmented, tmp_path / "fkd")


def test_a_text_in_place_of_a_list_is_an_error():
    with pytest.raises(UsageError, match="a list"):
        fd.BuildSettings(augment="rotate:15")  # type: ignore[arg-type]


def test_verify_finds_nothing_wrong(augmented):
    assert not fd.verify(augmented).faults


def test_people_are_told(augmented, capsys):
    assert run(["info", str(augmented)]) == 0
    assert "augmented by  randaugment:n=2,m=15, colorjitter" in capsys.readouterr().out
    card = render_card(
        fd.open_labels(augmented), fd.CardFields(license="mit", image_license="mit"), "https://example.org/labels"
    )
    assert "recorded operations: `randaugment:n=2,m=15`" in card
