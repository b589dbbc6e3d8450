"""Crop kinds: specs, drawing, builds, extensions, and label sets of one kind."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from label_sets import edit_manifest, same_files, same_labels, same_rows
from servers import serve

import ferkd_data as fd
from ferkd_data.builder import BuildSettings, build_part, finish
from ferkd_data.crop_kinds import (
    block_of_kinds,
    draw_crops_of_kinds,
    fits_blocks,
    kind_of_crop,
    kind_starts,
    make_crop_kinds,
)
from ferkd_data.errors import (
    LabelSetError,
    ManifestError,
    SettingsMismatchError,
    UsageError,
)
from ferkd_data.format import manifest_file as manifests
from ferkd_data.labels.buckets import confidence_counts
from ferkd_data.labels.rows import ShardLabels

SECOND = "python:ferkd_tiny_teachers:second"
GLOBAL, LOCAL = "global:scale=0.25..1,size=48,n=4", "local:scale=0.05..0.25,size=24,hflip=0,n=6"
KINDS = [GLOBAL, LOCAL]
FEW = {"top_k": 4, "images_per_shard": 8, "device": "cpu", "crops_per_block": 4}
LAYOUTS = ("parquet", "webdataset")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def teachers(tiny_teachers):
    return [tiny_teachers, SECOND]


@pytest.fixture(scope="module", params=LAYOUTS)
def out(request, tmp_path_factory, photos, teachers):
    """20 images, 4 global crops (one block of 4) and 6 local ones (blocks of 4 and 2). Do not write here."""
    folder = tmp_path_factory.mktemp("kinds") / request.param
    fd.build(photos, folder, teachers=teachers, crop_kinds=KINDS, layout=request.param, **FEW)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, photos, teachers):
    folder = tmp_path_factory.mktemp("kinds") / "labels"
    fd.build(photos, folder, teachers=teachers, crop_kinds=KINDS, **FEW)
    return folder


distributions = st.builds(
    fd.CropDistribution,
    scale=st.tuples(*[st.floats(0.01, 1)] * 2).map(sorted).map(tuple),
    ratio=st.tuples(*[st.floats(0.1, 9)] * 2).map(sorted).map(tuple),
    hflip=st.floats(0, 1),
)
some_kinds = st.lists(
    st.builds(
        fd.CropKind,
        name=st.from_regex("[A-Za-z][A-Za-z0-9_-]{0,8}", fullmatch=True),
        crops=st.integers(1, 30),
        size=st.integers(1, 8192),
        distribution=distributions,
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda kind: kind.name,
)


@given(some_kinds)
def test_what_is_written_is_parsed_again(kinds):
    assert list(make_crop_kinds(map(str, kinds))) == kinds
    assert list(make_crop_kinds([" ".join(map(str, kinds))])) == kinds


def test_what_is_not_given_is_the_build_s():
    settings = BuildSettings(
        crop_kinds=["a:n=3", "b:n=4,scale=0.5,size=96"],
        distribution=fd.CropDistribution(scale=(0.2, 0.9), ratio=(1, 1), hflip=0.25),
    )
    a, b = settings.kinds
    assert a == fd.CropKind(name="a", crops=3, size=224, distribution=settings.distribution)
    assert b.distribution == fd.CropDistribution(scale=(0.5, 0.5), ratio=(1, 1), hflip=0.25) and b.size == 96
    assert settings.crops == 7


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("local", "say how many crops"),
        ("local:scale=0.05..0.25", "say how many crops"),
        ("local:n=0", "n must be a whole number in 1"),
        ("local:n=1.5", "n must be a whole number"),
        ("local:n=2,size=0", "size must be"),
        ("local:n=2,size=big", "size must be a whole number"),
        ("local:n=2,scale=0..1", "scale must be 0 < LO"),
        ("local:n=2,scale=0.5..0.1", "scale must be 0 < LO"),
        ("local:n=2,scale=a..b", "scale must be LO..HI"),
        ("local:n=2,hflip=2", "hflip must be a probability"),
        ("local:n=2,crops=3", "is not one of its options"),
        ("local:n=2,n=3", "is given twice"),
        ("local:20", "is not one of its options"),
        (":n=2", "the name of a crop kind"),
        ("2x:n=2", "the name of a crop kind"),
        ("../up:n=2", "the name of a crop kind"),
    ],
)
def test_a_spec_that_cannot_be_right_is_refused(spec, words):
    with pytest.raises(UsageError, match=words):
        make_crop_kinds([spec])


def test_lists_of_kinds_that_cannot_be_right_are_refused():
    with pytest.raises(UsageError, match="crop kind 'a' is given twice"):
        make_crop_kinds(["a:n=1", "b:n=1", "a:n=2"])
    with pytest.raises(UsageError, match="a list of crop kinds"):
        make_crop_kinds("a:n=1")
    with pytest.raises(UsageError, match="got 7"):
        make_crop_kinds([7])
    with pytest.raises(UsageError, match="17 crop kinds"):
        make_crop_kinds([f"a{n}:n=1" for n in range(17)])


def test_crops_and_kinds_exclude_each_other(photos, teachers, tmp_path):
    with pytest.raises(UsageError, match="each kind says its own number"):
        BuildSettings(crops=200, crop_kinds=KINDS)
    with pytest.raises(UsageError, match="exclude each other"):
        fd.build(photos, tmp_path / "out", teachers=teachers, crops=10, crop_kinds=KINDS, **FEW)
    assert not (tmp_path / "out").exists()


@given(some_kinds, st.integers(1, 60))
def test_no_block_holds_two_kinds(kinds, at_most):
    try:
        block = block_of_kinds(kinds, at_most)
    except UsageError as error:
        asked = int(str(error).rpartition("--crops-per-block ")[2])
        assert block_of_kinds(kinds, asked) == asked and fits_blocks(kinds, asked)  # the way out that is named
        return
    assert 1 <= block <= at_most and fits_blocks(kinds, block)
    blocks = [{kind_of_crop(kinds, n).name for n in range(start, min(start + block, sum(k.crops for k in kinds)))}
              for start in range(0, sum(kind.crops for kind in kinds), block)]  # fmt: skip
    assert all(len(names) == 1 for names in blocks)


def test_kinds_that_would_make_tiny_files_are_refused():
    with pytest.raises(
        UsageError, match=r"begin within crop blocks of 50 .*b at crop 19, local at crop 39.*a:n=20, b:n=20"
    ):
        BuildSettings(crop_kinds=["a:n=19", "b:n=20", "local:n=200"])
    assert BuildSettings(crop_kinds=["a:n=19", "local:n=200"], crops_per_block=19).crops_per_block == 19
    assert BuildSettings(crop_kinds=["a:n=20", "local:n=80"]).crops_per_block == 20


@given(some_kinds, st.integers(0, 2**40), st.integers(0, 40), st.integers(1, 40))
def test_a_crop_depends_on_its_number_and_kind_alone(kinds, seed, first, count):
    """The crops of a kind are those that its distribution draws for these numbers, whatever kinds stand beside it."""
    total = sum(kind.crops for kind in kinds)
    first = min(first, total - 1)
    count = min(count, total - first)
    whole = draw_crops_of_kinds("a/b", 60, 80, seed=seed, first=0, count=total, kinds=kinds)
    part = draw_crops_of_kinds("a/b", 60, 80, seed=seed, first=first, count=count, kinds=kinds)
    assert np.array_equal(part.boxes, whole.boxes[first : first + count])
    assert np.array_equal(part.flip, whole.flip[first : first + count])
    for kind, start in zip(kinds, kind_starts(kinds), strict=True):
        alone = fd.draw_crops("a/b", 60, 80, seed=seed, first=start, count=kind.crops, distribution=kind.distribution)
        assert np.array_equal(alone.boxes, whole.boxes[start : start + kind.crops])
        assert np.array_equal(alone.flip, whole.flip[start : start + kind.crops])


def test_a_set_with_kinds_is_the_sets_of_its_kinds_side_by_side(out, photos, teachers, tmp_path):
    labels = fd.open_labels(out)
    layout = labels.manifest.layout
    for kind, start in zip(labels.crop_kinds, kind_starts(labels.crop_kinds), strict=True):
        crops = start + kind.crops
        same = {**FEW, "layout": layout, "distribution": kind.distribution, "crops": crops}
        fd.build(photos, tmp_path / kind.name, teachers=teachers, **same)
        plain = fd.open_labels(tmp_path / kind.name)
        for mine, theirs in zip(labels.crop_kind(kind.name), plain, strict=True):
            theirs = ShardLabels.from_rows([theirs]).crop_range(start, crops)
            assert same_labels(ShardLabels.from_rows([mine]), theirs)


def test_what_the_manifest_says(out):
    manifest = fd.open_labels(out).manifest
    assert (manifest.num_crops, manifest.requires) == (10, ("crop-kinds-1",))
    assert [(kind.name, kind.crops, kind.size) for kind in manifest.kinds] == [("global", 4, 48), ("local", 6, 24)]
    assert manifest.kinds[1].distribution.hflip == 0
    if manifest.layout == "parquet":
        assert [len(shard.files) for shard in manifest.shards] == [3, 3, 3]  # 4 | 4 2
    report = fd.verify(out)
    assert report.ok


def test_an_older_reader_refuses_it_by_name(out, monkeypatch):
    monkeypatch.setattr(manifests, "KNOWN_REQUIREMENTS", ("recorded-operations-1",))
    with pytest.raises(ManifestError, match="requires 'crop-kinds-1', which this ferkd-data does not know"):
        fd.open_labels(out)


def test_a_reader_that_never_saw_our_code_finds_the_same(out, tmp_path):
    reader = runpy.run_path(str(Path(__file__).parents[2] / "examples/standalone_reader.py"))["read_rows"]
    rows, images = list(reader(out)), list(fd.open_labels(out))
    assert [row["key"] for row in rows] == [image.key for image in images]
    for row, image in zip(rows, images, strict=True):
        assert row["kind"] == ["global"] * 4 + ["local"] * 6
        for name in ("boxes", "class_index", "class_prob", "flip", "bucket"):
            assert np.array_equal(row[name], getattr(image, name)), name
    copy = shutil.copytree(out, tmp_path / "copy")
    edit_manifest(copy, lambda content: content["requires"].append("else-1"))
    with pytest.raises(SystemExit, match="else-1"):
        list(reader(copy))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["crop_kinds"][0].update(crops=5), "the crop kinds have 11 crops, num_crops says 10"),
        (lambda m: m["crop_kinds"][1].update(name="global"), "'global' is given twice"),
        (lambda m: m["crop_kinds"][1].update(name="../x"), "name"),
        (lambda m: m["crop_kinds"][1].update(scale=[0, 1]), "scale must be"),
        (lambda m: m["crop_kinds"][1].update(size=10**6), "size"),
        (lambda m: m.pop("crop_kinds"), "crop_kinds and requires contradict"),
        (lambda m: m.pop("requires"), "crop_kinds and requires contradict"),
        (lambda m: m.update(crop_kinds=[]), "crop_kinds"),
        (lambda m: [m["crop_kinds"][0].update(crops=3), m["crop_kinds"][1].update(crops=7)], "hold crops of two kinds"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(parquet, tmp_path, change, words):
    copy = shutil.copytree(parquet, tmp_path / "copy")
    edit_manifest(copy, change)
    with pytest.raises(ManifestError, match=words):
        fd.open_labels(copy)


def test_parts_make_the_same_bytes(parquet, photos, teachers, tmp_path):
    """`finish` knows the kinds from the saved settings alone."""
    for part in ("1/2", "2/2"):
        build_part(photos, tmp_path / "out", part=part, teachers=teachers, crop_kinds=KINDS, **FEW)
    finish(tmp_path / "out")
    assert same_files(parquet, tmp_path / "out")


def test_quantile_thresholds_are_those_of_all_kinds(photos, teachers, tmp_path):
    quantile = fd.QuantileThresholds(low=0.2, mid=0.5, top=0.8)
    fd.build(photos, tmp_path / "out", teachers=teachers, crop_kinds=KINDS, thresholds=quantile, **FEW)
    labels = fd.open_labels(tmp_path / "out")
    counts = sum(confidence_counts(image.class_prob[:, 0]) for image in labels)
    assert labels.manifest.thresholds.absolute() == quantile.resolve(counts)
    assert fd.verify(tmp_path / "out").ok


def test_the_same_command_again_does_nothing_and_other_kinds_are_named(parquet, photos, teachers):
    assert fd.build(photos, parquet, teachers=teachers, crop_kinds=KINDS, **FEW).already_finished
    with pytest.raises(SettingsMismatchError, match="crop_kinds"):
        fd.build(photos, parquet, teachers=teachers, crop_kinds=[GLOBAL, LOCAL.replace("24", "32")], **FEW)
    with pytest.raises(SettingsMismatchError, match="crop_kinds"):
        fd.build(photos, parquet, teachers=teachers, crops=10, **FEW)


@pytest.mark.parametrize(
    "kinds",
    [
        ["global:n=4", "local:n=11"],  # what is not given is the label set's
        [GLOBAL, LOCAL.replace("n=6", "n=8"), "tiny:n=3,size=16,scale=0.01..0.05"],
    ],
)
def test_an_extension_equals_a_fresh_build(photos, teachers, tmp_path, kinds):
    first = [GLOBAL, LOCAL.replace("n=6", "n=8")]  # its blocks of 4 are whole
    fd.build(photos, tmp_path / "out", teachers=teachers, crop_kinds=first, **FEW)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/labels").glob("*")}
    fd.build(photos, tmp_path / "out", extend=True, crop_kinds=kinds, device="cpu")
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    whole = [GLOBAL, LOCAL.replace("n=6", "n=11")] if len(kinds) == 2 else kinds
    fd.build(photos, tmp_path / "fresh", teachers=teachers, crop_kinds=whole, **FEW)
    assert same_files(tmp_path / "out", tmp_path / "fresh")


def test_new_images_get_all_kinds(make_photos, teachers, tmp_path):
    photos = make_photos(tmp_path / "photos", 10)
    fd.build(photos, tmp_path / "out", teachers=teachers, crop_kinds=KINDS, **FEW)
    make_photos(photos, 15)
    fd.build(photos, tmp_path / "out", extend=True, device="cpu")
    fd.build(photos, tmp_path / "fresh", teachers=teachers, crop_kinds=KINDS, **FEW)
    assert same_rows(tmp_path / "out", tmp_path / "fresh") and fd.verify(tmp_path / "out", images=photos).ok


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crops": 20}, "cannot say which kind gets more"),
        ({"crop_kinds": ["global:n=8", "local:n=6"]}, "'global': saved"),
        ({"crop_kinds": ["local:n=8", "global:n=4"]}, "gives them all in this order"),
        ({"crop_kinds": ["local:n=8"]}, "gives them all in this order"),
        ({"crop_kinds": ["global:n=4", "local:n=5"]}, "'local': saved"),
        ({"crop_kinds": ["global:n=4", "local:n=8,size=96"]}, "'local': saved"),
        ({"crop_kinds": ["global:n=4", "local:n=8"]}, "end within a crop block"),
        ({"crop_kinds": ["global:n=4", "local:n=6", "tiny:n=4"]}, "end within a crop block"),
    ],
)
def test_an_extension_that_would_change_what_is_there_is_refused(parquet, photos, changes, words):
    with pytest.raises((SettingsMismatchError, UsageError), match=words):
        fd.build(photos, parquet, extend=True, device="cpu", **changes)


def test_an_extension_keeps_small_blocks_that_were_asked_for(photos, teachers, tmp_path):
    few = {**FEW, "crops_per_block": 1}
    kinds = ["a:n=3", "b:n=2", "c:n=30"]
    fd.build(photos, tmp_path / "out", teachers=teachers, crop_kinds=kinds, **few)
    fd.build(photos, tmp_path / "out", extend=True, crop_kinds=["a:n=3", "b:n=2", "c:n=31"], device="cpu")
    assert fd.open_labels(tmp_path / "out").num_blocks == 36


def test_a_further_kind_that_begins_within_a_block_is_refused(photos, teachers, tmp_path):
    fd.build(photos, tmp_path / "out", teachers=teachers, crop_kinds=[GLOBAL, "local:n=8"], **FEW)
    with pytest.raises(UsageError, match="give the kind 'local' a number of crops"):
        fd.build(
            photos, tmp_path / "out", extend=True, crop_kinds=["global:n=4", "local:n=9", "tiny:n=4"], device="cpu"
        )


def test_a_set_without_kinds_gets_none(label_set, photos):
    with pytest.raises(SettingsMismatchError, match="was built without crop kinds"):
        fd.build(photos, label_set, extend=True, crop_kinds=KINDS, device="cpu")


def test_views_of_a_kind(out):
    labels = fd.open_labels(out)
    local = labels.crop_kind("local")
    assert (local.num_crops, len(local), [kind.name for kind in local.crop_kinds]) == (6, 20, ["local"])
    assert local.statistics.crops == 120 and sum(local.statistics.bucket_counts) == 120
    parts = [labels.crop_kind(kind.name).statistics.bucket_counts for kind in labels.crop_kinds]
    assert np.array_equal(np.sum(parts, axis=0), labels.statistics.bucket_counts)
    few = labels.crop_kind("local", crops=2)
    assert few.num_crops == 2 and np.array_equal(few[3].boxes, labels[3].boxes[4:6])
    assert few.crop_kind("local").num_crops == 2
    assert len({labels.identity, local.identity, few.identity, labels.crop_kind("global").identity}) == 4
    assert local.identity == fd.open_labels(out).crop_kind("local").identity
    assert "local" in repr(local) and "crop kind local" in labels._repr_html_()
    with pytest.raises(UsageError, match="has no crop kind 'x'; it has global, local"):
        labels.crop_kind("x")
    with pytest.raises(UsageError, match=r"crops must be 1\.\.6 for the crop kind 'local', got 7"):
        labels.crop_kind("local", crops=7)
    with pytest.raises(UsageError, match=r"choose: open_labels\(\.\.\.\)\.crop_kind"):
        fd.open_labels(out, crops=3)


def test_views_of_views(out):
    labels = fd.open_labels(out)
    some = labels.select(rows=[1, 5, 17])
    for view in (some.crop_kind("local"), labels.crop_kind("local").select(rows=[1, 5, 17])):
        assert [image.key for image in view] == [image.key for image in some]
        assert np.array_equal(view[1].boxes, labels[5].boxes[4:])
    mapped = labels.map_classes({0: "a", 1: "b"}, keep_images=True)
    a, b = mapped.crop_kind("local"), labels.crop_kind("local").map_classes({0: "a", 1: "b"}, keep_images=True)
    assert a.class_map is not None and np.array_equal(a[2].class_prob, b[2].class_prob)
    assert np.array_equal(a.unmapped[2].boxes, labels[2].boxes[4:])
    both = fd.open_labels([out, out], weights=[2, 1])
    assert np.array_equal(both.crop_kind("local")[2].boxes, labels[2].boxes[4:])


def test_no_kind_of_a_set_without_kinds(label_set):
    labels = fd.open_labels(label_set)
    assert labels.crop_kinds == ()
    with pytest.raises(UsageError, match="it was built without crop kinds"):
        labels.crop_kind("local")


def test_sets_of_other_kinds_are_no_ensemble(parquet, photos, teachers, tmp_path):
    fd.build(photos, tmp_path / "out", teachers=teachers, crop_kinds=[GLOBAL, "local:n=6"], **FEW)
    with pytest.raises(LabelSetError, match="crop_kinds differs"):
        fd.open_labels([parquet, tmp_path / "out"])


def test_a_server_is_asked_for_the_files_of_one_kind(parquet, photos):
    with serve(parquet) as server:
        labels = fd.open_labels(server.url).crop_kind("local")
        assert np.array_equal(labels["class3/photo0003"].boxes, fd.open_labels(parquet)["class3/photo0003"].boxes[4:])
        assert labels.targets_of(0).tolist() == fd.open_labels(parquet).targets_of(0).tolist()
        next(iter(fd.CropLoader(labels, images=photos, batch_size=4)))
        asked = [name for name in server.sent if name.startswith("labels/")]
    assert len(asked) > 3 and not [name for name in asked if name.endswith("-000.parquet")]


@pytest.mark.parametrize("order", ["global", "shards"])
def test_a_loader_of_one_kind_cuts_at_its_size(out, photos, order):
    local = fd.open_labels(out).crop_kind("local")
    loader = fd.CropLoader(local, images=photos, batch_size=4, crops_per_image=2, order=order)
    images, targets = next(iter(loader))
    assert images.shape == (4, 3, 24, 24) and len(targets) == 4
    assert next(iter(fd.CropLoader(local, images=photos, batch_size=4, size=32)))[0].shape == (4, 3, 32, 32)
    crops, _ = fd.CropDataset(local, images=photos, crops_per_image=2)[0]
    assert crops.shape == (2, 3, 24, 24)


def test_a_loader_does_not_mix_kinds(out, photos):
    for make in (lambda: fd.CropLoader(fd.open_labels(out), images=photos, batch_size=4),
                 lambda: fd.CropDataset(fd.open_labels(out), images=photos)):  # fmt: skip
        with pytest.raises(UsageError, match=r"kinds global, local, which do not go .*crop_kind\('global'\)"):
            make()


def test_the_teachers_say_the_same_again(out, photos, teachers):
    report = fd.relabel(out, images=photos, teachers=teachers, sample=5)
    assert (report.images, report.crops, report.other_crops) == (5, 50, ())
    assert report.same_top1 == 1 and report.largest_difference <= 2**-10


def test_there_and_back(parquet, photos, tmp_path):
    fd.convert(parquet, tmp_path / "tars", layout="webdataset", images=photos)
    fd.convert(tmp_path / "tars", tmp_path / "back", layout="parquet")
    assert same_files(parquet, tmp_path / "back")
    assert fd.convert(parquet, tmp_path / "two", layout="parquet", crops_per_block=2).num_blocks == 5
    with pytest.raises(UsageError, match=r"crop blocks of 3 would hold crops of two kinds .*blocks of 2 do not"):
        fd.convert(parquet, tmp_path / "three", layout="parquet", crops_per_block=3)


def test_merging(parquet, photos, teachers, tmp_path):
    for name in teachers:
        fd.build(photos, tmp_path / name[-5:], teachers=[name], crop_kinds=KINDS, **FEW)
    result = fd.merge([tmp_path / name[-5:] for name in teachers], tmp_path / "both")
    assert result.kind == "teachers" and result.manifest.kinds == fd.open_labels(parquet).crop_kinds
    assert fd.verify(tmp_path / "both").ok
    fd.build(photos, tmp_path / "more", teachers=teachers, crop_kinds=KINDS, seed=1, **FEW)
    with pytest.raises(LabelSetError, match="has crop kinds, so crops of another label set cannot be added"):
        fd.merge([parquet, tmp_path / "more"], tmp_path / "crops")


def test_pulling_one_kind(parquet, photos, teachers, tmp_path):
    with serve(parquet) as server:
        pulled = fd.pull(server.url, tmp_path / "local", crop_kind="local")
        assert not [name for name in server.sent if name.endswith("-000.parquet")]
        with pytest.raises(UsageError, match="has no crop kind 'x'; its crop kinds are global, local"):
            fd.pull(server.url, tmp_path / "x", crop_kind="x")
        with pytest.raises(UsageError, match="choose one of them with crop_kind"):
            fd.pull(server.url, tmp_path / "x", crops=4)
        with pytest.raises(UsageError, match="exclude each other"):
            fd.pull(server.url, tmp_path / "x", crops=4, crop_kind="local")
        fd.pull(server.url, tmp_path / "global", crop_kind="global", shards=[0, 2])
    assert [kind.name for kind in pulled.manifest.kinds] == ["local"] and fd.verify(tmp_path / "local").ok
    assert fd.verify(tmp_path / "global").ok
    whole, local = fd.open_labels(parquet).crop_kind("local"), fd.open_labels(tmp_path / "local")
    assert all(map(same_labels, whole.shards(), local.shards()))
    # A training gets the same crops, whether it has the whole or one kind of it.
    (a, _), (b, _) = (next(iter(fd.CropLoader(one, images=photos, batch_size=4))) for one in (whole, local))
    assert np.array_equal(a, b)
    for refuse in (
        lambda: fd.relabel(tmp_path / "local", images=photos, teachers=teachers),
        lambda: fd.build(photos, tmp_path / "local", extend=True, device="cpu"),
    ):
        with pytest.raises(UsageError, match="holds one kind of crops that was pulled alone"):
            refuse()
    report = fd.relabel(tmp_path / "global", images=photos, teachers=teachers, sample=3)
    assert report.images == 3 and report.other_crops == ()


def test_tars_are_not_pulled_by_kind(tmp_path, photos, teachers):
    fd.build(photos, tmp_path / "tars", teachers=teachers, crop_kinds=KINDS, layout="webdataset", **FEW)
    with pytest.raises(UsageError, match="keeps all crops of an image in one file"):
        fd.pull(str(tmp_path / "tars"), tmp_path / "x", crop_kind="local")


def test_fkd_s_files_hold_one_kind(parquet, tmp_path):
    with pytest.raises(UsageError, match="script would mix them at one size"):
        fd.export_fkd(parquet, tmp_path / "fkd")


def test_the_card_names_the_kinds(parquet, tmp_path):
    shutil.copytree(parquet, tmp_path / "set")
    fields = fd.CardFields(name="kinds", license="cc-by-4.0", published="2026-11-27")
    fd.publish(tmp_path / "set", str(tmp_path / "public"), card=fields)
    card = (tmp_path / "public/README.md").read_text()
    assert "| `local` | 4 to 9 | 24 px | scale 0.05 to 0.25" in card
    assert "with a distribution for each crop kind" in card
    front = yaml.safe_load(card.split("---")[1])
    assert [config["config_name"] for config in front["configs"]] == ["global-000", "local-000", "local-001"]


def test_pictures_and_reports(out, photos, tmp_path):
    text = repr(fd.show(fd.open_labels(out), images=photos, crops=2))
    assert "global (48 px), least confident" in text and "local (24 px), most confident" in text
    fd.write_report(out, tmp_path / "report.html", images=photos)
    page = (tmp_path / "report.html").read_text()
    assert "Crop kind local" in page and "for 24 px" in page
    counts = fd.open_labels(out).crop_kind("local").statistics
    row = page[page.index("local (24 px)") :][:600]
    assert "120" in row and f"{100 * counts.bucket_counts[1] / 120:.1f}" in row


class TestCommands:
    @pytest.fixture
    def command(self, photos, teachers, tmp_path):
        options = ["--teacher", teachers[0], "--teacher", teachers[1], "--top-k", "4", "--images-per-shard", "8"]
        return ["build", photos, tmp_path / "out", *options, "--crops-per-block", "4", "--device", "cpu"]

    def test_build(self, call, command, parquet, tmp_path):
        status, _, err = call(*command, "--crop-kinds", GLOBAL, "--crop-kinds", LOCAL)
        assert status == 0 and same_files(parquet, tmp_path / "out")
        assert "crop kind     local: 6 crops for students of 24 px, scale 0.05..0.25" in err
        assert call(*command, "--crop-kinds", f"{GLOBAL} {LOCAL}")[0] == 0  # the same, and so finished

    def test_a_config_file(self, call, command, parquet, tmp_path):
        (tmp_path / "build.toml").write_text(f'crop-kinds = ["{GLOBAL}", "{LOCAL}"]\n')
        assert call(*command, "--config", tmp_path / "build.toml")[0] == 0
        assert same_files(parquet, tmp_path / "out")

    def test_crops_beside_kinds(self, call, command):
        status, _, err = call(*command, "--crop-kinds", GLOBAL, "--crops", "10")
        assert status == 2 and "exclude each other: each kind says its own number" in err

    def test_kinds_behind_one_option(self, call, command):
        status, _, err = call(*command, "--crop-kinds", GLOBAL, LOCAL)
        assert status == 2 and "Give --crop-kinds once for each kind." in err

    def test_a_dry_run(self, call, command):
        status, out, _ = call(*command, "--crop-kinds", GLOBAL, "--crop-kinds", LOCAL, "--dry-run", "--json")
        assert status == 0 and json.loads(out)["crops"] == 200 and json.loads(out)["files"] == 11

    def test_info(self, call, out):
        assert "kind local    6 crops for students of 24 px, scale 0.05..0.25" in call("info", out)[1]
        kinds = json.loads(call("info", out, "--json")[1])["crop_kinds"]
        assert [kind["name"] for kind in kinds] == ["global", "local"]

    def test_stats(self, call, out):
        status, text, _ = call("stats", out)
        assert status == 0 and "by crop kind" in text
        row = next(line.split() for line in text.splitlines() if line.strip().startswith("local"))
        assert row[1] == "120"
        assert json.loads(call("stats", out, "--json")[1])["crop_kinds"]["global"]["crops"] == 80

    def test_show(self, call, out):
        status, text, _ = call("show", out, "--crops", "2")
        crops = [line.split()[:2] for line in text.splitlines()[2:]]
        assert status == 0 and crops == [["0", "global"], ["1", "global"], ["4", "local"], ["5", "local"]]
        assert [crop["kind"] for crop in json.loads(call("show", out, "--json")[1])["crops"]].count("local") == 6

    def test_pull(self, call, parquet, tmp_path):
        status, text, _ = call("pull", parquet, tmp_path / "local", "--crop-kind", "local")
        assert status == 0 and "20 images with 6 crops" in text
