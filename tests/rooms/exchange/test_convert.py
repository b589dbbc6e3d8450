"""There and back between layouts, and between FKD's files and ours."""

from __future__ import annotations

import os
import pickle
import shutil
import tracemalloc
import zipfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from label_sets import SMALL, same_label_sets

import ferkd_data as fd
from ferkd_data.errors import ForeignFileError, LabelSetError, UsageError
from ferkd_data.format.out_folder import WORK
from ferkd_data.images import Reject, open_source
from ferkd_data.importers import fkd
from ferkd_data.importers.fkd import boxes_of
from ferkd_data.importers.foreign_arrays import load_arrays
from ferkd_data_cli.main import run

TEACHER = fd.FkdTeacher(name="someone", size=32)


def test_parquet_to_webdataset_and_back(label_set, tar_label_set, photos, tmp_path):
    there = fd.convert(label_set, tmp_path / "tars", layout="webdataset", images=photos)
    assert same_label_sets(tmp_path / "tars", tar_label_set)
    ours = sorted(path.read_bytes() for path in (tmp_path / "tars").rglob("*.tar"))
    assert ours == sorted(path.read_bytes() for path in tar_label_set.rglob("*.tar"))
    back = fd.convert(tmp_path / "tars", tmp_path / "back", layout="parquet")
    assert there.teachers == back.teachers == fd.open_labels(label_set).manifest.teachers
    assert same_label_sets(tmp_path / "back", label_set)
    assert back == fd.open_labels(label_set).manifest
    for folder in ("tars", "back"):
        assert fd.verify(tmp_path / folder, images=photos).ok


def test_other_crop_blocks(label_set, tmp_path):
    fd.convert(label_set, tmp_path / "out", layout="parquet", crops_per_block=7)
    assert same_label_sets(tmp_path / "out", label_set)
    assert [file.block for file in fd.open_labels(tmp_path / "out").manifest.shards[0].files] == [0, 1]


def test_images_that_are_missing_or_others(label_set, photos, tmp_path):
    with pytest.raises(UsageError, match="layout webdataset contains the images"):
        fd.convert(label_set, tmp_path / "a", layout="webdataset")
    copy = shutil.copytree(photos, tmp_path / "photos")
    first, second, *_ = sorted(copy.rglob("*.jpg"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(LabelSetError, match="is not the one that was labelled"):
        fd.convert(label_set, tmp_path / "b", layout="webdataset", images=copy)
    assert not (tmp_path / "b/manifest.json").exists()
    fd.convert(label_set, tmp_path / "b", layout="webdataset", images=photos)
    with pytest.raises(UsageError, match="holds another label set; give a new folder"):
        fd.convert(label_set, tmp_path / "b", layout="parquet")


def fkd_files(folder, labels, quantized):
    """As FKD's generator writes them: NumPy arrays, coordinates as fractions, labels by `quantized`."""
    for row in labels:
        path = folder / f"{row.key}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        coords = row.boxes / np.array([row.height, row.width] * 2)
        torch.save([coords, row.flip, quantized(row)], path)


def dense(labels, num_classes=10):
    full = np.zeros((*labels.class_index.shape[:-1], num_classes), np.float32)
    np.put_along_axis(full, labels.class_index.astype(int), labels.class_prob.astype(np.float32), axis=-1)
    return full


TYPES = {
    "marginal_smoothing_k4": (lambda row: np.stack([row.class_index.astype(np.float32), row.class_prob], axis=1), 4),
    "smoothing": (lambda row: np.stack([row.class_index[:, 0].astype(np.float32), row.class_prob[:, 0]], axis=1), 1),
    "hard": (lambda row: row.class_index[:, 0].astype(np.int64), 1),
    "full": (lambda row: dense(row), 4),
    "full fp16": (lambda row: dense(row).astype(np.float16), 4),
}


@pytest.mark.parametrize("kind", TYPES)
def test_fkd_files_of_every_type(label_set, photos, tmp_path, kind):
    quantized, top_k = TYPES[kind]
    fkd_files(tmp_path / "fkd", fd.open_labels(label_set), quantized)
    manifest = fd.import_fkd(
        tmp_path / "fkd",
        tmp_path / "out",
        images=photos,
        num_classes=10,
        teacher=TEACHER,
        top_k=top_k,
        images_per_shard=8,
    )
    assert (manifest.num_images, manifest.num_crops, manifest.top_k) == (20, 10, top_k)
    assert fd.verify(tmp_path / "out", images=photos).ok
    for ours, theirs in zip(fd.open_labels(label_set).shards(), fd.open_labels(tmp_path / "out").shards(), strict=True):
        assert list(ours.keys) == list(theirs.keys)
        assert np.array_equal(ours.boxes, theirs.boxes)
        assert np.array_equal(ours.flip, theirs.flip)
        assert np.array_equal(ours.class_index[:, :, :top_k], theirs.class_index)
        if kind != "hard":
            assert np.array_equal(ours.class_prob[:, :, :top_k], theirs.class_prob)


def test_export_and_import_again(label_set, photos, tmp_path):
    assert fd.export_fkd(label_set, tmp_path / "fkd") == "marginal_renorm"
    coords, flips, soft = torch.load(next((tmp_path / "fkd").rglob("*.tar")))
    assert (coords.shape, flips.shape, soft.shape) == ((10, 4), (10,), (10, 2, 4))
    fd.import_fkd(
        tmp_path / "fkd", tmp_path / "out", images=photos, num_classes=10, teacher=TEACHER, images_per_shard=8
    )
    for ours, theirs in zip(fd.open_labels(label_set).shards(), fd.open_labels(tmp_path / "out").shards(), strict=True):
        for name in ("boxes", "flip", "class_index", "class_prob", "image_digest"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))


@given(st.integers(1, 65535), st.integers(1, 65535), st.data())
def test_fractions_give_the_boxes_they_came_from(height, width, data):
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = [top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))]
    coords = np.array([box]) / np.array([height, width, height, width])
    assert boxes_of(coords, height, width).tolist() == [box]
    # FKD's generator keeps them as float32.
    assert boxes_of(coords.astype(np.float32).astype(np.float64), height, width).tolist() == [box]


def test_images_without_labels_are_rejects(label_set, photos, tmp_path):
    fd.export_fkd(label_set, tmp_path / "fkd")
    files = sorted((tmp_path / "fkd").rglob("*.tar"))
    files[3].unlink()
    files[5].write_bytes(files[5].read_bytes()[:200])
    torch.save([torch.full((10, 4), 0.9), torch.zeros(10, dtype=torch.bool), torch.rand(10, 2, 4)], files[7])
    torch.save([torch.zeros(3, 4), torch.zeros(3), torch.rand(3, 2, 4)], files[9])
    manifest = fd.import_fkd(tmp_path / "fkd", tmp_path / "out", images=photos, num_classes=10, teacher=TEACHER)
    assert (manifest.num_images, manifest.rejects.rows) == (16, 4)
    assert fd.verify(tmp_path / "out").ok
    with pytest.raises(UsageError, match=r"FOLDER/KEY\.tar is expected"):
        fd.import_fkd(tmp_path, tmp_path / "none", images=photos, num_classes=10, teacher=TEACHER)


def test_no_seed_is_told_of_crops_that_were_drawn_elsewhere(label_set, photos, tmp_path, capsys):
    fd.export_fkd(label_set, tmp_path / "fkd")
    fd.import_fkd(tmp_path / "fkd", tmp_path / "out", images=photos, num_classes=10, teacher=TEACHER)
    fd.write_report(tmp_path / "out", tmp_path / "report.html")
    assert run(["info", str(tmp_path / "out")]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "report.html").read_text(encoding="utf-8")):
        assert "drawn elsewhere, without a seed of ours" in text and "seed 0" not in text


def test_class_folders_that_are_a_part_of_the_classes_need_a_list(label_set, photos, tmp_path):
    """Numbered 0 and 1 in sorted order, they would be other classes than those of the label files."""
    fd.export_fkd(label_set, tmp_path / "fkd")
    some = tmp_path / "some"
    for name in ("class7", "class4"):
        shutil.copytree(photos / name, some / name)
    arguments = {"images": some, "num_classes": 10, "teacher": TEACHER}
    with pytest.raises(UsageError, match=r"2 classes in the source, 10 .*--classes.*than 10, .*--num-cl"):
        fd.import_fkd(tmp_path / "fkd", tmp_path / "out", **arguments)
    listed = tmp_path / "classes.txt"
    listed.write_text("".join(f"class{number}\n" for number in range(10)))
    fd.import_fkd(tmp_path / "fkd", tmp_path / "out", **arguments, classes=listed)
    targets = {row.key: row.target for row in fd.open_labels(tmp_path / "out")}
    assert targets == {row.key: row.target for row in fd.open_labels(label_set) if row.key in targets}
    assert set(targets.values()) == {4, 7}


ROUNDED = torch.tensor([0.5003, 0.2502, 0.2502, 0.0001])
"""Their sum is 1.0008, and 1.0011 in float16."""
DAMAGED = {
    "texts for coords": lambda c, f, s: [[["a", "b", "c", "d"]] * 10, f, s],
    "texts for flips": lambda c, f, s: [c, ["x"] * 10, s],
    "numbers without an axis": lambda c, f, s: [torch.tensor(1.0)] * 3,
    "NaN for a class": lambda c, f, s: [c, f, s.index_fill(1, torch.tensor(0), float("nan"))],
    "a class beyond every integer": lambda c, f, s: [c, f, s.index_fill(1, torch.tensor(0), 1e30)],
    "half a class": lambda c, f, s: [c, f, s + torch.tensor([[0.5], [0.0]])],
    "a class twice": lambda c, f, s: [c, f, s.index_fill(1, torch.tensor(0), 1.0)],
    "no probability": lambda c, f, s: [c, f, s * torch.tensor([[1.0], [0.0]])],
    "a sum that float16 takes above 1": lambda c, f, s: [c, f, torch.cat([s[:, :1], s[:, 1:] * 0 + ROUNDED], 1)],
    "a box beyond every integer": lambda c, f, s: [c * 1e300, f, s],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_costs_its_image_and_nothing_else(label_set, photos, tmp_path, name):
    """Whatever it holds, the label set is one that readers accept."""
    fd.export_fkd(label_set, tmp_path / "fkd")
    file = sorted((tmp_path / "fkd").rglob("*.tar"))[3]
    torch.save(DAMAGED[name](*torch.load(file)), file)
    manifest = fd.import_fkd(tmp_path / "fkd", tmp_path / "out", images=photos, num_classes=10, teacher=TEACHER)
    assert (manifest.num_images, manifest.rejects.rows) == (19, 1)
    assert fd.verify(tmp_path / "out").ok


def many_rejects(number, place, **_):
    """A source with so many more images that cannot be used before the others."""
    source = open_source(place)

    def list_images():
        yield from (Reject(key=f"class0/{i}", reason="bad_key", detail=f"photo number {i}") for i in range(number))
        yield from source.list_images()

    return SimpleNamespace(
        description=source.description, class_names=source.class_names, list_images=list_images, read=source.read
    )


def test_rejects_go_to_their_file_and_not_into_memory(label_set, photos, tmp_path, monkeypatch):
    fd.export_fkd(label_set, tmp_path / "fkd")
    peaks = {}
    for number in (5_000, 50_000):
        monkeypatch.setattr(fkd, "open_source", partial(many_rejects, number))
        tracemalloc.start()
        manifest = fd.import_fkd(
            tmp_path / "fkd", tmp_path / str(number), images=photos, num_classes=10, teacher=TEACHER
        )
        peaks[number] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (manifest.num_images, manifest.rejects.rows) == (20, number)
    assert fd.verify(tmp_path / "5000").ok
    assert peaks[50_000] < 1.5 * peaks[5_000], peaks


class Cut(Exception):
    pass


def test_an_import_that_was_interrupted_is_begun_again_in_its_folder(label_set, photos, tmp_path):
    fd.export_fkd(label_set, tmp_path / "fkd")
    sorted((tmp_path / "fkd").rglob("*.tar"))[0].unlink()
    settings = {"images": photos, "num_classes": 10, "teacher": TEACHER, "images_per_shard": 8}

    def cut(progress):
        if not progress.images:
            return
        here = {path.name for path in (tmp_path / "out").iterdir()}
        raise Cut(here)

    with pytest.raises(Cut) as caught:
        fd.import_fkd(tmp_path / "fkd", tmp_path / "out", on_progress=cut, **settings)
    assert caught.value.args == ({"labels", WORK},), "what a kill would leave: nothing that is in the way"
    assert fd.import_fkd(tmp_path / "fkd", tmp_path / "out", **settings).rejects.rows == 1
    assert fd.verify(tmp_path / "out").ok and not fd.verify(tmp_path / "out").warnings


class Attack:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def object_array(path):
    array = np.empty(1, object)
    array[0] = Attack(path)
    return array


@pytest.mark.parametrize(
    "content",
    [
        Attack,
        lambda path: [np.zeros((1, 4)), {"a": Attack(path)}, 0],
        object_array,
        lambda _: torch.nn.Linear(1, 1),
        lambda _: {1},
    ],
    ids=["reduce", "nested", "object array", "module", "set"],
)
def test_code_in_a_foreign_file_is_not_run(content, tmp_path):
    torch.save(content(tmp_path / "owned"), tmp_path / "x.tar")
    with pytest.raises(ForeignFileError, match=r"x\.tar"):
        load_arrays(tmp_path / "x.tar")
    assert not (tmp_path / "owned").exists()


def test_other_forms_of_foreign_files(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(pickle.dumps(Attack(tmp_path / "owned")))
    with pytest.raises(ForeignFileError, match=r"not in the form that torch.save has written"):
        load_arrays(path)
    torch.save([1], path, _use_new_zipfile_serialization=False)
    with pytest.raises(ForeignFileError, match=r"not in the form that torch.save has written"):
        load_arrays(path)
    torch.save(torch.zeros(1).expand(10**9), path)
    with pytest.raises(ForeignFileError, match="claims a tensor of shape"):
        load_arrays(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"0" * 10**6)
    with pytest.raises(ForeignFileError, match="is compressed or too large"):
        load_arrays(path)
    assert not (tmp_path / "owned").exists()


def test_the_commands(label_set, photos, tmp_path, capsys):
    assert (
        run(["convert", str(label_set), str(tmp_path / "tars"), "--layout", "webdataset", "--images", str(photos)]) == 0
    )
    assert "layout webdataset, 20 images with 10 crops" in capsys.readouterr().out
    assert run(["convert", str(tmp_path / "tars"), str(tmp_path / "fkd"), "--to", "fkd"]) == 0
    assert "--soft_label_type marginal_renorm" in capsys.readouterr().out
    back = ["convert", str(tmp_path / "fkd"), str(tmp_path / "back"), "--from", "fkd", "--images", str(photos)]
    assert run([*back, "--num-classes", "10"]) == 2
    assert "--teacher" in capsys.readouterr().err
    assert run([*back, "--num-classes", "10", "--teacher", "x"]) == 0
    assert run(["convert", str(label_set), str(tmp_path / "x")]) == 2
    capsys.readouterr()
    assert run([*back[:2], str(tmp_path / "both"), *back[3:], "--teacher", "x", "--layout", "webdataset"]) == 2
    assert "give one of" in capsys.readouterr().err
    assert SMALL["crops"] == fd.open_labels(tmp_path / "back").num_crops


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--from", "dr", "--top-k", "10"],
            "--top-k has no effect with --from dr; it is for --from fkd and --from rel",
        ),
        (["--from", "fkd", "--ids", "f"], "--ids has no effect with --from fkd; it is for --from dr"),
        (["--from", "relabel", "--teacher", "a"], "--teacher has no effect with --from relabel"),
        (["--to", "fkd", "--images", "x"], "--images has no effect with --to fkd"),
        (["--to", "fkd", "--min-crops", "4"], "--min-crops has no effect without --calibration"),
        (["--layout", "parquet", "--calibration", "fkd"], "--calibration is for --to fkd; a loader"),
        (["--layout", "parquet", "--seed", "0"], "--seed has no effect with --layout; it is for --from relabel"),
    ],
)
def test_options_that_would_be_ignored_are_refused(label_set, tmp_path, capsys, options, message):
    assert run(["convert", str(label_set), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
