"""More crops, more images, or both, for a label set that was finished before."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_sets import SMALL, SMALL_TARS, files_below, same_files, same_label_sets, same_rows
from PIL import Image

import ferkd_data as fd
from ferkd_data.builder import build_part, finish
from ferkd_data.builder import extension as seal_extension
from ferkd_data.builder.state import BuildFolder
from ferkd_data.errors import BuildError, ManifestError, SettingsMismatchError, SourceError, UsageError
from ferkd_data_cli.main import run

SECOND = "python:ferkd_tiny_teachers:second"
FIRST_CROPS = {**SMALL, "crops": 8}
"""Two whole blocks of 4."""


@pytest.fixture
def teachers(tiny_teachers):
    return [tiny_teachers, SECOND]


@pytest.fixture
def growing(make_photos, tmp_path):
    """A folder of its own, to add images to."""
    return make_photos(tmp_path / "photos", 20)


def is_whole(folder: Path, images: Path) -> bool:
    return fd.verify(folder, images=images).faults == ()


def test_more_crops_equal_a_fresh_build_byte_by_byte(photos, teachers, tmp_path):
    """Of 10 crops in the end, the last block is short; the manifest is the same as well."""
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    fd.build(photos, out, teachers=teachers, **FIRST_CROPS)
    before = {path: path.stat().st_mtime_ns for path in out.glob("labels/*")}
    seen = []
    fd.build(photos, out, extend=True, crops=10, device="cpu", on_progress=seen.append)
    fd.build(photos, fresh, teachers=teachers, **SMALL)
    assert len(before) == 6 and all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert seen[-1].crops_done == 20 * 2 and seen[-1].images_done == seen[-1].images_total == 20
    assert same_files(out, fresh)


def test_new_images_go_into_shards_after_the_others(growing, make_photos, teachers, tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    old = fd.build(growing, out, teachers=teachers, **SMALL).manifest
    before = files_below(out / "labels")
    make_photos(growing, 31)
    new = fd.build(growing, out, extend=True, device="cpu").manifest
    fd.build(growing, fresh, teachers=teachers, **SMALL)
    assert new.shards[:3] == old.shards and [shard.rows for shard in new.shards[3:]] == [8, 3]
    assert before.items() <= files_below(out / "labels").items()
    assert same_rows(out, fresh) and is_whole(out, growing)
    assert new.statistics.bucket_counts == fd.open_labels(fresh).statistics.bucket_counts
    assert new.statistics.teacher_agreement == fd.open_labels(fresh).statistics.teacher_agreement
    assert new.source.images_seen == 31 and new.source.plan_sha256 != old.source.plan_sha256


@pytest.mark.usefixtures("quick_workers")
def test_two_processes_add_both_at_once_and_then_nothing(growing, make_photos, teachers, tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    fd.build(growing, out, teachers=teachers, **FIRST_CROPS)
    make_photos(growing, 31)
    seen = []
    arguments = {"extend": True, "crops": 12, "device": "cpu", "workers": 2}
    fd.build(growing, out, on_progress=seen.append, **arguments)
    fd.build(growing, fresh, teachers=teachers, **{**SMALL, "crops": 12})
    assert seen[-1].crops_done == 20 * 4 + 11 * 12
    assert same_rows(out, fresh) and is_whole(out, growing)
    before, written = files_below(out), (out / "manifest.json").stat().st_mtime_ns
    fd.build(growing, out, on_progress=lambda progress: pytest.fail("there is nothing to label"), **arguments)
    assert files_below(out) == before and (out / "manifest.json").stat().st_mtime_ns == written


def test_a_source_of_new_images_alone(growing, make_photos, teachers, tmp_path):
    out, more, fresh = tmp_path / "out", tmp_path / "more", tmp_path / "fresh"
    fd.build(growing, out, teachers=teachers, **FIRST_CROPS)
    shutil.copytree(
        make_photos(tmp_path / "all", 31),
        more,
        ignore=lambda folder, names: [name for name in names if name.endswith(".jpg") and int(name[5:9]) < 20],
    )
    (tmp_path / "classes.txt").write_text("".join(f"class{i}\n" for i in range(10)))
    (growing / "class0/old.txt").write_text("")
    (more / "class0/new.txt").write_text("")
    fd.build(growing, out, teachers=teachers, overwrite=True, **FIRST_CROPS)
    for _ in range(2):  # the second time, there is nothing to add
        manifest = fd.build(more, out, extend=True, classes=tmp_path / "classes.txt", device="cpu").manifest
        assert manifest.source.left_out == {".txt": 2}
    fd.build(tmp_path / "all", fresh, teachers=teachers, **FIRST_CROPS)
    assert same_rows(out, fresh)
    assert manifest.source.description == "folder photos; folder more"
    with pytest.raises(SourceError, match=r"'class0/photo0000' has labels .* not in folder more: .*leave out --crops"):
        fd.build(more, out, extend=True, crops=12, classes=tmp_path / "classes.txt", device="cpu")


def test_a_file_that_was_moved_is_said_to_be_labelled_once_more(growing, teachers, tmp_path, capsys):
    """It has another key and another class; the old row stays as it is."""
    out = tmp_path / "out"
    fd.build(growing, out, teachers=teachers, **FIRST_CROPS)
    (growing / "class0" / "photo0000.jpg").rename(growing / "class1" / "moved.jpg")
    extend = ["build", str(growing), str(out), "--extend", "--device", "cpu"]
    assert run(extend) == 0
    said = capsys.readouterr().err
    assert "1 labelled image is not in folder photos (such as 'class0/photo0000'), and keeps its labels" in said
    labels = fd.open_labels(out)
    assert [labels[key].target for key in ("class0/photo0000", "class1/moved")] == [0, 1]
    make_again = growing / "class0" / "photo0000.jpg"
    shutil.copy(growing / "class1" / "moved.jpg", make_again)
    assert run(extend) == 0 and "labelled image" not in capsys.readouterr().err


def as_folder(photos, to):
    return shutil.copytree(photos, to)


def as_tar(photos, to):
    """Number the samples as img2dataset does: every run begins at 000000000."""
    to.mkdir()
    with tarfile.open(to / "00000.tar", "w") as out:
        for number, path in enumerate(sorted(photos.rglob("*.jpg"))):
            out.add(path, f"{number:09d}.jpg")
            label = tarfile.TarInfo(f"{number:09d}.cls")
            label.size = 1
            out.addfile(label, io.BytesIO(path.parent.name[5:].encode()))
    return to


def as_parquet(photos, to):
    """Without paths, keys are made of the file's name and the row."""
    to.mkdir()
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted(photos.rglob("*.jpg"))]
    pq.write_table(pa.table({"image": images}), to / "train-00000-of-00001.parquet")
    return to


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
@pytest.mark.parametrize("pack", [as_folder, as_tar, as_parquet])
def test_a_second_batch_whose_keys_repeat_is_refused(make_photos, tiny_teachers, tmp_path, pack, layout):
    """The first 10 images of Tuesday would have got Monday's labels, without a word."""
    make_photos(tmp_path / "first", 10)
    make_photos(tmp_path / "second", 12)
    for number, path in enumerate(sorted((tmp_path / "second").rglob("*.jpg"))):
        Image.new("RGB", (40, 40), (number * 20, 99, 0)).save(path)
    monday, tuesday = pack(tmp_path / "first", tmp_path / "monday"), pack(tmp_path / "second", tmp_path / "tuesday")
    out = tmp_path / "out"
    fd.build(monday, out, teachers=[tiny_teachers], layout=layout, **{**SMALL_TARS, "crops": 4})
    before = files_below(out)
    with pytest.raises(SourceError, match=r"image .* is another image than the one labelled .* 10 of the 10 .*rename"):
        fd.build(tuesday, out, extend=True, device="cpu")
    assert {name: data for name, data in files_below(out).items() if ".build" not in name} == before
    copied = shutil.copytree(monday, tmp_path / "monday again")
    assert fd.build(copied, out, extend=True, device="cpu").already_finished


def test_a_key_that_repeats_alone_is_seen_too(growing, make_photos, tiny_teachers, tmp_path):
    """A camera that starts at IMG_0001 again: one of many new files has the name of an old one."""
    out, new = tmp_path / "out", tmp_path / "new"
    fd.build(growing, out, teachers=[tiny_teachers], **FIRST_CROPS)
    for number in range(10):
        path = new / f"class{number}" / ("photo0000.jpg" if number == 0 else "fresh.jpg")
        path.parent.mkdir(parents=True)
        Image.new("RGB", (40, 40), (number * 20, 99, 0)).save(path)
    with pytest.raises(SourceError, match=r"image 'class0/photo0000' of folder new is another image.*1 of the 1"):
        fd.build(new, out, extend=True, device="cpu")


def test_an_image_that_was_replaced_is_said_to_keep_its_labels(growing, make_photos, teachers, tmp_path, capsys):
    out = tmp_path / "out"
    fd.build(growing, out, teachers=teachers, **FIRST_CROPS)
    make_photos(growing, 25)
    shutil.copy(growing / "class4/photo0004.jpg", growing / "class3/photo0003.jpg")
    assert run(["build", str(growing), str(out), "--extend", "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "have other bytes in folder photos now (such as 'class3/photo0003'): 1 of the 20 compared" in said
    assert "with keys that labelled images have" not in said
    assert len(fd.open_labels(out)) == 25


def test_the_same_keys_at_another_place_are_counted(growing, make_photos, teachers, tmp_path, capsys):
    out = tmp_path / "out"
    fd.build(growing, out, teachers=teachers, **FIRST_CROPS)
    more = make_photos(tmp_path / "more" / "photos", 90)
    extend = ["build", str(more), str(out), "--extend", "--device", "cpu"]
    assert run(extend) == 0
    said = capsys.readouterr().err
    assert "images of folder photos with keys that labelled images have: 20; taken to be the same images (20 c" in said
    assert run(extend) == 0 and "taken to be" not in capsys.readouterr().err
    more = shutil.copytree(more, tmp_path / "again")
    assert run([*extend[:1], str(more), *extend[2:]]) == 0
    assert "labelled images have: 90; taken to be the same images (45 compared)" in capsys.readouterr().err


def test_a_source_whose_name_begins_like_another_ones_is_named_too(growing, make_photos, teachers, tmp_path):
    """`folder photo` is the beginning of `folder photos`."""
    out = tmp_path / "out"
    fd.build(growing, out, teachers=teachers, **FIRST_CROPS)
    new = make_photos(tmp_path / "new", 30)
    for photo in growing.rglob("*.jpg"):
        (new / photo.relative_to(growing)).unlink()
    new = new.rename(tmp_path / "photo")
    assert fd.build(new, out, extend=True, device="cpu").manifest.source.description == "folder photos; folder photo"


def test_tars_get_new_images_and_no_more_crops(growing, make_photos, teachers, tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    fd.build(growing, out, teachers=teachers, layout="webdataset", **SMALL_TARS)
    make_photos(growing, 31)
    fd.build(growing, out, extend=True, device="cpu")
    fd.build(growing, fresh, teachers=teachers, layout="webdataset", **SMALL_TARS)
    assert same_rows(out, fresh) and is_whole(out, growing)
    assert len(list(out.glob("shards/*.tar"))) == 5
    with pytest.raises(UsageError, match=r"layout webdataset .* cannot get more; .*ferkd-data convert .* parquet"):
        fd.build(growing, out, extend=True, crops=20, device="cpu")


def test_quantile_thresholds_stay_those_that_were_found(growing, make_photos, teachers, tmp_path):
    asked = fd.QuantileThresholds(low=0.1, mid=0.25, top=0.8)
    out = tmp_path / "out"
    old = fd.build(growing, out, teachers=teachers, thresholds=asked, **FIRST_CROPS).manifest
    make_photos(growing, 25)
    new = fd.build(growing, out, extend=True, crops=12, thresholds=asked, device="cpu").manifest
    assert new.thresholds == old.thresholds and is_whole(out, growing)
    with pytest.raises(SettingsMismatchError, match=r"thresholds.low: saved 0\.\d+, now 0.2"):
        fd.build(growing, out, extend=True, thresholds=fd.QuantileThresholds(low=0.2, mid=0.25, top=0.8))


def test_rejects_are_tried_again(growing, teachers, tmp_path):
    """Repaired: labelled. Gone: the verdict stays. Still broken: a reject, once."""
    good = (growing / "class1/photo0001.jpg").read_bytes()
    for name in ("repaired", "gone", "broken"):
        (growing / f"class1/{name}.jpg").write_bytes(b"no picture")
    (growing / "class1/photo0001.png").write_bytes(good)
    out = tmp_path / "out"
    assert fd.build(growing, out, teachers=teachers, **FIRST_CROPS).rejects == 4
    (growing / "class1/repaired.jpg").write_bytes(good)
    (growing / "class1/gone.jpg").unlink()
    manifest = fd.build(growing, out, extend=True, device="cpu").manifest
    rejects = pq.read_table(out / manifest.rejects.path).to_pylist()
    assert sorted((row["key"], row["reason"]) for row in rejects) == [
        ("class1/broken", "not_an_image"),
        ("class1/gone", "not_an_image"),
        ("class1/photo0001", "duplicate_key"),
    ]
    assert manifest.num_images == 21 and manifest.source.images_seen == 24
    assert manifest.rejects.path == "rejects-2.parquet" and not (out / "rejects.parquet").exists()
    assert is_whole(out, growing) and not fd.verify(out).warnings


def test_crops_of_a_set_with_rejects_leave_no_empty_shard(growing, teachers, tmp_path):
    (growing / "class1/broken.jpg").write_bytes(b"no picture")
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    fd.build(growing, out, teachers=teachers, **FIRST_CROPS)
    fd.build(growing, out, extend=True, crops=12, device="cpu")
    fd.build(growing, fresh, teachers=teachers, **{**SMALL, "crops": 12})
    assert same_files(out, fresh)


def test_an_image_that_changed_or_broke_cannot_get_more_crops(growing, teachers, tmp_path):
    out = tmp_path / "out"
    fd.build(growing, out, teachers=teachers, **FIRST_CROPS)
    before = files_below(out)
    path = growing / "class3/photo0003.jpg"
    old = path.read_bytes()
    path.write_bytes((growing / "class4/photo0004.jpg").read_bytes())
    with pytest.raises(BuildError, match=r"'class3/photo0003' is not the one .*: its bytes have changed"):
        fd.build(growing, out, extend=True, crops=12, device="cpu")
    path.write_bytes(b"no picture")
    with pytest.raises(BuildError, match=r"'class3/photo0003' has labels .* cannot get more crops \(not_an_image"):
        fd.build(growing, out, extend=True, crops=12, device="cpu")
    assert before.items() <= files_below(out).items() and len(fd.open_labels(out)) == 20
    path.write_bytes(old)
    fd.build(growing, out, extend=True, crops=12, device="cpu")
    assert fd.open_labels(out).manifest.num_crops == 12 and is_whole(out, growing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, r"keeps its settings: seed: saved 0, now 5"),
        ({"top_k": 3, "ensemble": "logits"}, r"top_k: saved 4, now 3; ensemble: saved 'mean', now 'logits'"),
        ({"distribution": fd.CropDistribution(hflip=0.1)}, r"distribution.hflip: saved 0.5, now 0.1"),
        ({"crops": 10, "crops_per_block": 6}, r"crops_per_block: saved 4, now 6"),
        ({"teachers": [SECOND, SECOND]}, r"other teachers .*: teachers\[0\].digest: saved '\w+', now '\w+'"),
        ({"teachers": [SECOND]}, r"other teachers"),
        ({"precision": "bf16"}, r"teachers\[0\].precision: saved 'fp32', now 'bf16'"),
        ({"settings": fd.BuildSettings(crops=10, top_k=4)}, r"crops_per_block: saved 4, now 50"),
    ],
)
def test_what_decides_the_labels_cannot_change(photos, label_set, changes, message):
    with pytest.raises(SettingsMismatchError, match=message):
        fd.build(photos, label_set, extend=True, device="cpu", **changes)
    assert not (label_set / ".build").exists()


def test_crops_that_cannot_be_reached_say_what_to_do(photos, label_set, teachers, tmp_path):
    """The label set has 10 crops in blocks of 4."""
    with pytest.raises(UsageError, match="has 10 crops per image already, asked for 4; give 10 or more"):
        fd.build(photos, label_set, extend=True, crops=4)
    with pytest.raises(UsageError, match=r"10 crops end within a crop block of 4.*parquet --crops-per-block 2"):
        fd.build(photos, label_set, extend=True, crops=12)
    cut, fresh = tmp_path / "cut", tmp_path / "fresh"
    assert run(["convert", str(label_set), str(cut), "--layout", "parquet", "--crops-per-block", "2"]) == 0
    fd.build(photos, cut, extend=True, crops=12, device="cpu")
    fd.build(photos, fresh, teachers=teachers, **{**SMALL, "crops": 12, "crops_per_block": 2})
    assert same_label_sets(cut, fresh) and is_whole(cut, photos)


def test_fewer_crops_than_a_block_become_whole_blocks(photos, teachers, tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    fd.build(photos, out, teachers=teachers, **{**SMALL, "crops": 3})
    assert fd.build(photos, out, extend=True, crops=8, device="cpu").manifest.crops_per_block == 3
    fd.build(photos, fresh, teachers=teachers, **{**SMALL, "crops": 8, "crops_per_block": 3})
    assert same_files(out, fresh)


def test_another_numbering_of_the_classes_is_seen(growing, make_photos, teachers, tmp_path):
    out, classes = tmp_path / "out", tmp_path / "classes.txt"
    fd.build(growing, out, teachers=teachers, **SMALL)
    classes.write_text("".join(f"class{i}\n" for i in reversed(range(10))))
    make_photos(growing, 25)
    with pytest.raises(SettingsMismatchError, match=r"'class0/photo0000' has another target in .*: saved 0, now 9"):
        fd.build(growing, out, extend=True, classes=classes, device="cpu")


def test_what_no_single_build_wrote_is_refused(photos, label_set, tmp_path):
    for mark in ("imported_from", "merged_from"):
        copy = shutil.copytree(label_set, tmp_path / mark)
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").write_text(json.dumps({**manifest, mark: "elsewhere"}))
        with pytest.raises(UsageError, match=f"was {mark.removesuffix('_from')}"):
            fd.build(photos, copy, extend=True, crops=12)
    with pytest.raises(ManifestError, match=r"no manifest\.json"):
        fd.build(photos, tmp_path / "nothing", extend=True, crops=12)


def interrupt(photos, out, **changes):
    def stop(progress):
        if progress.shard >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fd.build(photos, out, extend=True, device="cpu", on_progress=stop, **changes)


def test_an_unfinished_extension_leaves_the_old_set_and_can_be_begun_anew(photos, teachers, tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    fd.build(photos, out, teachers=teachers, **FIRST_CROPS)
    before = files_below(out)
    interrupt(photos, out, crops=16)
    assert (out / ".build").is_dir() and before.items() <= files_below(out).items()
    assert fd.verify(out).ok and fd.open_labels(out).num_crops == 8
    with pytest.raises(SettingsMismatchError, match=r"unfinished extension .*crops: saved 16, now 12.*--extend --ov"):
        fd.build(photos, out, extend=True, crops=12, device="cpu")
    assert fd.build(photos, out, teachers=teachers, **FIRST_CROPS).already_finished
    assert (out / ".build").is_dir()
    fd.build(photos, out, extend=True, overwrite=True, crops=12, device="cpu")
    fd.build(photos, fresh, teachers=teachers, **{**SMALL, "crops": 12})
    assert same_files(out, fresh)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_around_the_commit(growing, teachers, tmp_path, monkeypatch, moment):
    """Before: still the old set. After: the new one, and what the old one left is gone with the next run."""
    (growing / "class1/broken.jpg").write_bytes(b"no picture")
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    fd.build(growing, out, teachers=teachers, **FIRST_CROPS)
    (growing / "class1/broken.jpg").write_bytes((growing / "class1/photo0001.jpg").read_bytes())
    write = seal_extension.write_manifest

    def killed(folder, manifest):
        if moment == "after":
            write(folder, manifest)
        raise KeyboardInterrupt

    monkeypatch.setattr(seal_extension, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        fd.build(growing, out, extend=True, crops=12, device="cpu")
    monkeypatch.undo()
    assert fd.verify(out).ok and len(fd.open_labels(out)) == (20 if moment == "before" else 21)
    fd.build(growing, out, extend=True, crops=12, device="cpu")
    fd.build(growing, fresh, teachers=teachers, **{**SMALL, "crops": 12})
    assert same_rows(out, fresh) and is_whole(out, growing) and fd.verify(out).warnings == ()


def test_what_a_build_left_that_was_killed_after_its_last_step_is_no_extension(photos, teachers, tmp_path, monkeypatch):
    out, fresh = tmp_path / "out", tmp_path / "fresh"

    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BuildFolder, "remove", killed)
        fd.build(photos, out, teachers=teachers, **FIRST_CROPS)
    assert (out / ".build/state.json").exists()
    kept = files_below(out)
    assert not finish(out).already_finished
    assert not (out / ".build").exists() and finish(out).already_finished
    for name, data in kept.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    fd.build(photos, out, extend=True, crops=12, device="cpu")
    fd.build(photos, fresh, teachers=teachers, **{**SMALL, "crops": 12})
    assert same_files(out, fresh)


def test_a_manifest_that_changed_meanwhile_stops_the_extension(photos, teachers, tmp_path):
    out = tmp_path / "out"
    fd.build(photos, out, teachers=teachers, **FIRST_CROPS)
    interrupt(photos, out, crops=16)
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"format"', '"note": "mine", "format"'))
    with pytest.raises(BuildError, match="not the one that an unfinished extension began with"):
        fd.build(photos, out, extend=True, crops=16, device="cpu")
    (out / "manifest.json").write_text(text)
    assert fd.build(photos, out, extend=True, crops=16, device="cpu").manifest.num_crops == 16


def test_parts_extend_too(growing, make_photos, teachers, tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    fd.build(growing, out, teachers=teachers, **FIRST_CROPS)
    make_photos(growing, 31)
    more = {"extend": True, "crops": 12, "device": "cpu"}
    assert build_part(growing, out, part="2/2", **more).shards == 2
    with pytest.raises(BuildError, match="3 of 5 shards are missing: 0, 2, 4"):
        finish(out)
    build_part(growing, out, part="1/2", **more)
    assert len(fd.open_labels(out)) == 20
    finish(out)
    fd.build(growing, fresh, teachers=teachers, **{**SMALL, "crops": 12})
    assert same_rows(out, fresh) and is_whole(out, growing)
    assert finish(out).already_finished


def test_the_command(growing, make_photos, tiny_teachers, tmp_path, capsys):
    out = tmp_path / "out"
    fd.build(growing, out, teachers=[tiny_teachers], **FIRST_CROPS)
    make_photos(growing, 25)
    assert run(["build", str(growing), str(out), "--extend", "--crops", "12", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "25 images x 12 crops" in printed.out
    assert ": 25 images to label in " in printed.err and "ground truth  known for 25, unknown for 0" in printed.err
    assert run(["build", str(growing), str(out), "--extend", "--seed", "0", "--top-k", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert ": no image to label\n" in said and "ground truth" not in said
    assert run(["build", str(growing), str(out), "--extend", "--top-k", "5", "--device", "cpu"]) == 1
    assert "top_k: saved 4, now 5" in capsys.readouterr().err
    assert run(["build", str(growing), str(tmp_path / "new")]) == 2
