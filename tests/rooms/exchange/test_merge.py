"""Label sets merged on disk and at load time, against one build with everything."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from label_sets import SMALL, edit_manifest, same_labels

import ferkd_data as fd
from ferkd_data.errors import LabelSetError, UsageError
from ferkd_data.exchange.card import render_card
from ferkd_data.exchange.origins import _draws, draws_of, origin_of, seeds_in_words
from ferkd_data.format.manifest_file import parse_manifest
from ferkd_data_cli.main import run

WHOLE = {**SMALL, "top_k": 10}


@pytest.fixture(scope="module")
def sets(tmp_path_factory, photos, tiny_teachers):
    """The same crops by two teachers alone (a, b) and together (joint); with top-10 of 10 classes, and with top-4."""
    folder = tmp_path_factory.mktemp("sets")
    second = "python:ferkd_tiny_teachers:second?weight=2"
    made = {}
    for name, teachers in {"a": [tiny_teachers], "b": [second], "joint": [tiny_teachers, second]}.items():
        for suffix, settings in {"": WHOLE, "4": SMALL}.items():
            made[name + suffix] = folder / (name + suffix)
            fd.build(photos, made[name + suffix], teachers=teachers, **settings)
    made["other crops"] = folder / "seed1"
    fd.build(photos, made["other crops"], teachers=[tiny_teachers], **{**SMALL, "seed": 1})
    return made


def close(a, b, tolerance):
    first, second = fd.open_labels(a), fd.open_labels(b)
    for x, y in zip(first.shards(), second.shards(), strict=True):
        assert list(x.keys) == list(y.keys)
        assert np.array_equal(x.boxes, y.boxes)
        assert np.abs(x.class_prob.astype(float) - y.class_prob).max() <= tolerance
        assert np.nanmax(np.abs(x.target_prob.astype(float) - y.target_prob)) <= 2**-10


def test_whole_distributions_merge_to_the_joint_build(sets, tmp_path):
    result = fd.merge([sets["a"], sets["b"]], tmp_path / "out")
    assert result.kind == "teachers"
    assert result.max_uncertain < 0.01
    close(tmp_path / "out", sets["joint"], 2**-10)
    assert fd.verify(tmp_path / "out").ok
    names = [(teacher.name, teacher.weight) for teacher in result.manifest.teachers]
    assert names == [(t.name, t.weight) for t in fd.open_labels(sets["joint"]).manifest.teachers]


def test_truncated_sets_stay_within_the_bound(sets, tmp_path):
    result = fd.merge([sets["a4"], sets["b4"]], tmp_path / "out")
    assert 0 < result.mean_uncertain <= result.max_uncertain < 1
    close(tmp_path / "out", sets["joint4"], result.max_uncertain + 2**-10)
    assert fd.verify(tmp_path / "out").ok


def test_at_load_time_it_is_the_same(sets, tmp_path, photos):
    fd.merge([sets["a4"], sets["b4"]], tmp_path / "out", weights=[3, 1])
    merged = fd.open_labels(tmp_path / "out")
    loaded = fd.open_labels([sets["a4"], sets["b4"]], weights=[3, 1])
    assert all(same_labels(x, y) for x, y in zip(merged.shards(), loaded.shards(), strict=True))
    assert loaded.identity != fd.open_labels([sets["a4"], sets["b4"]], weights=[1, 3]).identity
    loaders = [
        fd.CropLoader(labels, images=photos, batch_size=4, crops_per_image=2, size=32, cache_dir=tmp_path / "cache")
        for labels in (merged, loaded)
    ]
    for (images, targets), (expected, expected_targets) in zip(*loaders, strict=True):
        assert images.equal(expected)
        assert targets.dense().equal(expected_targets.dense())


def test_images_in_another_order_and_other_shards(sets, tmp_path, photos, tiny_teachers):
    other = tmp_path / "other"
    settings = {**WHOLE, "images_per_shard": 5}
    fd.build(photos, other, teachers=["python:ferkd_tiny_teachers:second?weight=2"], **settings)
    fd.merge([sets["a"], other], tmp_path / "out")
    close(tmp_path / "out", sets["joint"], 2**-10)
    with pytest.raises(LabelSetError, match="not in the same shards; write them as one with: ferkd-data merge"):
        fd.open_labels([sets["a"], other])


def test_other_crops_of_the_same_images(sets, tmp_path):
    result = fd.merge([sets["a4"], sets["other crops"]], tmp_path / "out")
    assert (result.kind, result.manifest.num_crops) == ("crops", 20)
    assert fd.verify(tmp_path / "out").ok
    merged, a, b = (fd.open_labels(p) for p in (tmp_path / "out", sets["a4"], sets["other crops"]))
    assert np.array_equal(merged.shard(1).boxes[:, :10], a.shard(1).boxes)
    assert np.array_equal(merged.shard(1).class_prob[:, 10:], b.shard(1).class_prob)


def test_crops_that_would_come_twice_are_refused(sets, tmp_path, photos, tiny_teachers):
    """Label sets of one seed begin with the same crops, whatever their number, also inside a merged one."""
    fd.build(photos, tmp_path / "fewer", teachers=[tiny_teachers], **{**SMALL, "crops": 4})
    with pytest.raises(LabelSetError, match=r"hold the same crops \(seed 0, .*\), 10 and 4 of each image; .*--extend"):
        fd.merge([sets["a4"], tmp_path / "fewer"], tmp_path / "out")
    fd.merge([sets["other crops"], sets["a4"]], tmp_path / "merged")
    with pytest.raises(LabelSetError, match=r"merged and .*fewer: hold the same crops \(seed 0, .*20 and 4"):
        fd.merge([tmp_path / "merged", tmp_path / "fewer"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_images(sets, tmp_path, photos, make_photos, tiny_teachers):
    new = shutil.copytree(photos, tmp_path / "new")
    for path in new.rglob("*.jpg"):
        path.rename(path.with_name(f"new-{path.name}"))
    fd.build(new, tmp_path / "b", teachers=[tiny_teachers], **SMALL)
    result = fd.merge([sets["a4"], tmp_path / "b"], tmp_path / "out")
    assert (result.kind, result.manifest.num_images) == ("images", 40)
    assert fd.verify(tmp_path / "out").ok
    assert list(fd.open_labels(tmp_path / "out").keys()) == [
        *fd.open_labels(sets["a4"]).keys(),
        *fd.open_labels(tmp_path / "b").keys(),
    ]
    for several, error in (
        ([sets["a4"], tmp_path / "b", sets["b4"]], "some of the label sets hold the same images and some do not"),
        ([tmp_path / "b", sets["a4"], sets["b4"]], r"b: shares no image .* these share some with each other"),
    ):
        with pytest.raises(LabelSetError, match=error):
            fd.merge(several, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_the_sources_of_merged_images_are_all_named(make_photos, tiny_teachers, tmp_path):
    made = []
    for number, name in enumerate(("monday", "tuesday", "monday")):
        photos = make_photos(tmp_path / str(number) / name, 10)
        for path in photos.rglob("*.jpg"):
            path.rename(path.with_name(f"{number}-{path.name}"))
        (photos / "class1/notes.txt").write_text("")
        if number:
            (photos / "class1/Thumbs.db").write_bytes(b"")
        made.append(tmp_path / f"labels{number}")
        fd.build(photos, made[-1], teachers=[tiny_teachers], **SMALL)
    source = fd.merge(made, tmp_path / "out").manifest.source
    assert source.description == "folder monday; folder tuesday"
    assert source.left_out == {".txt": 3, "system": 2} and source.place_sha256 is None
    assert fd.merge(made, tmp_path / "out").manifest.source == source  # finished already


def test_every_draw_of_merged_crops_is_told(sets, tmp_path, photos, tiny_teachers, capsys):
    """The card said `scale 0.08 to 1` of all crops, though half of them were drawn with another scale."""
    close_up = fd.CropDistribution(scale=(0.02, 0.1), hflip=0.0)
    fd.build(photos, tmp_path / "close", teachers=[tiny_teachers], distribution=close_up, **{**SMALL, "crops": 4})
    out = tmp_path / "out"
    fd.merge([sets["a4"], tmp_path / "close", sets["other crops"]], out)
    assert run(["info", str(out)]) == 0
    said = capsys.readouterr().out
    assert "crops 0 to 9   scale 0.08..1, ratio 0.75..1.33, hflip 0.5, seed 0\n" in said
    assert "crops 10 to 13 scale 0.02..0.1, ratio 0.75..1.33, hflip 0, seed 0\n" in said
    assert "crops 14 to 23 scale 0.08..1, ratio 0.75..1.33, hflip 0.5, seed 1\n" in said
    card = render_card(fd.open_labels(out), fd.CardFields(name="x", license="cc0-1.0"), "here")
    assert "RandomResizedCrop, with the distributions below, seeds 0, 1; in blocks" in card
    assert "| 10 to 13 | scale 0.02 to 0.1, ratio 0.75 to 1.333, horizontal flip 0, seed 0 |" in card
    fd.write_report(out, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Crops 10 to 13" in page and "area 0.02 to 0.1 of the image" in page


def test_conflicts_are_named(sets, tmp_path, photos):
    with pytest.raises(LabelSetError, match="teachers differs"):
        fd.merge([sets["b4"], sets["other crops"]], tmp_path / "out")
    part = shutil.copytree(photos, tmp_path / "part")
    gone = sorted(part.rglob("*.jpg"))[7]
    gone.unlink()
    fd.build(part, tmp_path / "fewer", teachers=["python:ferkd_tiny_teachers:second"], **SMALL)
    with pytest.raises(LabelSetError, match=f"only some images are in both, '.*{gone.stem}' is not"):
        fd.merge([sets["a4"], tmp_path / "fewer"], tmp_path / "out")
    with pytest.raises(UsageError, match=r"2 weights for|weights are for"):
        fd.merge([sets["a4"], sets["other crops"]], tmp_path / "out", weights=[1, 2])
    for weights in ([1, -2], [1, "2"], [1, float("nan")]):
        with pytest.raises(UsageError, match="weights must be 2 positive numbers"):
            fd.open_labels([sets["a4"], sets["b4"]], weights=weights)
    with pytest.raises(UsageError, match="holds another label set; give a new folder"):
        fd.merge([sets["a4"], sets["b4"]], sets["a4"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["size=48", "mean=0.1", "std=0.5", "interpolation=bicubic"])
def test_teachers_that_see_their_input_differently_are_no_same_teachers(sets, tmp_path, photos, tiny_teachers, option):
    fd.build(photos, tmp_path / "b", teachers=[f"{tiny_teachers}?{option}"], seed=5, **SMALL)
    with pytest.raises(LabelSetError, match=rf"teachers differs: .*'{option.partition('=')[0]}': "):
        fd.merge([sets["a4"], tmp_path / "b"], tmp_path / "out")


def test_names_of_classes_that_only_one_set_has_are_kept(sets, tmp_path):
    bare = shutil.copytree(sets["b4"], tmp_path / "bare")
    edit_manifest(bare, lambda content: content.update(class_names=None))
    names = fd.open_labels(sets["a4"]).manifest.class_names
    for number, order in enumerate([(bare, sets["a4"]), (sets["a4"], bare)]):
        assert names and fd.merge(order, tmp_path / str(number)).manifest.class_names == names


def test_the_command(sets, tmp_path, capsys):
    assert run(["merge", str(sets["a4"]), str(sets["b4"]), str(tmp_path / "out"), "--weights", "2,1"]) == 0
    printed = capsys.readouterr().out
    assert "the same crops by all teachers: 20 images with 10 crops, top-4 of 2 teachers" in printed
    assert "a build with all teachers at once by at most" in printed
    assert run(["merge", str(sets["a4"]), str(sets["other crops"]), str(tmp_path / "more")]) == 0
    assert capsys.readouterr().out.endswith(", top-4 of 1 teacher\n")
    assert run(["merge", str(sets["a4"]), str(tmp_path / "x")]) == 2


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, photos, tiny_teachers):
    """The crops of three seeds, by the same teacher."""
    folder = tmp_path_factory.mktemp("seeds")
    small = {**SMALL, "crops": 4, "crops_per_block": 2}
    for seed in range(3):
        fd.build(photos, folder / str(seed), teachers=[tiny_teachers], **{**small, "seed": seed})
    return [folder / str(seed) for seed in range(3)]


def test_a_part_of_a_merged_set_holds_the_draws_that_were_pulled(seeds, tmp_path):
    """Its manifest lists all sets that the whole was made of, so it was refused beside one whose crops it lacks."""
    fd.merge(seeds[:2], tmp_path / "whole")
    fd.pull(str(tmp_path / "whole"), tmp_path / "part", crops=4)
    result = fd.merge([tmp_path / "part", seeds[1]], tmp_path / "again")
    assert result.kind == "crops" and fd.verify(tmp_path / "again").ok
    again, whole = fd.open_labels(tmp_path / "again"), fd.open_labels(tmp_path / "whole")
    assert all(same_labels(x, y) for x, y in zip(again.shards(), whole.shards(), strict=True))
    # A part with the first crops of the second set has draws of both.
    fd.pull(str(tmp_path / "whole"), tmp_path / "more", crops=6)
    with pytest.raises(LabelSetError, match=r"hold the same crops \(seed 1"):
        fd.merge([tmp_path / "more", seeds[1]], tmp_path / "out")
    assert fd.merge([tmp_path / "more", seeds[2]], tmp_path / "other").manifest.num_crops == 10


def test_a_set_that_was_merged_twice_still_knows_its_draws(seeds, tmp_path):
    """Only the first draw of a merged set was noted, so another of its sets could be added a second time in silence."""
    fd.merge(seeds[:2], tmp_path / "two")
    fd.merge([tmp_path / "two", seeds[2]], tmp_path / "three")
    for seed in range(3):
        with pytest.raises(LabelSetError, match=rf"hold the same crops \(seed {seed}"):
            fd.merge([tmp_path / "three", seeds[seed]], tmp_path / "out")
    # The draws of the first set, which it holds beside others, come before those of the second.
    fd.pull(str(tmp_path / "three"), tmp_path / "part", crops=6)
    with pytest.raises(LabelSetError, match=r"hold the same crops \(seed 1"):
        fd.merge([tmp_path / "part", seeds[1]], tmp_path / "out")
    assert fd.merge([tmp_path / "part", seeds[2]], tmp_path / "out").manifest.num_crops == 10


def test_merged_sets_that_share_their_first_draw_are_told_apart(seeds, tmp_path):
    fd.merge(seeds[:2], tmp_path / "a")
    fd.merge([seeds[0], seeds[2]], tmp_path / "b")
    with pytest.raises(LabelSetError, match=r"hold the same crops \(seed 0"):
        fd.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


ODD = [7, "x", [None, 3], [{"crops": "many", "draws": {}}], [{"crops": -1}, {}], [{"draws": [1, {"crops": 2}]}]]


@pytest.mark.parametrize("listed", ODD)
def test_a_stranger_s_list_of_origins_is_no_hindrance(seeds, tmp_path, listed):
    copy = shutil.copytree(seeds[0], tmp_path / "copy")
    edit_manifest(copy, lambda content: content.update(merged_from=listed))
    assert fd.merge([copy, seeds[1]], tmp_path / "out").manifest.num_crops == 8


def test_the_seeds_of_a_merged_set_are_told(seeds, tmp_path, capsys):
    fd.merge(seeds[1:], tmp_path / "merged")
    assert run(["info", str(tmp_path / "merged")]) == 0
    assert "hflip 0.5, seeds 1, 2\n" in capsys.readouterr().out
    assert run(["info", str(seeds[0])]) == 0
    assert "hflip 0.5, seed 0\n" in capsys.readouterr().out


def test_a_manifest_stays_readable_after_many_merges(seeds):
    """JSON parsers refuse deep nesting, so draws are one list, however often a set is merged."""
    labels = fd.open_labels(seeds[0])
    entry = origin_of(labels)
    for number in range(300):
        other = {**origin_of(labels), "seed": number + 5}
        merged = labels.manifest.model_copy(update={"num_crops": 4 * (number + 2), "merged_from": [entry, other]})
        entry = {**origin_of(labels), "draws": list(_draws(merged))}
    assert len(draws_of(merged)) == 301 and seeds_in_words(merged) == "301 seeds, the first is 0"
    assert parse_manifest(labels.manifest.model_copy(update={"merged_from": [entry]}).to_json(), "here")
