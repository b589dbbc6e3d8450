"""Names that a URL, a pattern, a spec or an encoding reads otherwise: they work, or are refused in words."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

import ferkd_data as fd
from ferkd_data.errors import UsageError

TEACHER = "python:ferkd_tiny_teachers:first"
TINY = ("--crops", "4", "--top-k", "3", "--device", "cpu")
NAMES = ["a b", "a#b", "a%20b", "a:b", "s3:b", "a,b", "a*b", "a[0]b", "a{0,1}b", "a{b", "a&b=c", "a@b", "a'b\"", "a?b"]


def write_tar(path, photos):
    with tarfile.open(path, "w") as tar:
        for number, photo in enumerate(sorted(photos.rglob("*.jpg"))):
            tar.add(photo, f"{number}.jpg")
            text = str(number % 10).encode()
            member = tarfile.TarInfo(f"{number}.cls")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_with_a_mark_in_it_is_that_name(name, call, photos, tmp_path, monkeypatch, tiny_teachers):
    """Relative paths: Arrow took a:b for a URI."""
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    source, tar, classes = (f"{name}/{name}{end}" for end in ("", ".tar", ".txt"))
    shutil.copytree(photos, source)
    write_tar(tar, photos)
    Path(classes).write_text("".join(f"class{number}\n" for number in range(10)))
    whole = [f"{name}/out{number}" for number in range(3)]
    for place, out, more in zip((source, tar, source), whole, ((), (), ("--classes", classes)), strict=True):
        assert call("build", place, out, "--teacher", TEACHER, *TINY, *more)[0] == 0
        assert call("verify", out, "--images", place)[0] == 0
    pulled, blocks, page = (f"{name}/{name}-{word}" for word in ("pulled", "blocks", "page.html"))
    assert call("pull", whole[0], pulled)[0] == 0
    assert call("convert", pulled, blocks, "--layout", "parquet", "--crops-per-block", "2")[0] == 0
    assert call("report", blocks, page, "--images", source)[0] == 0
    loader = fd.CropLoader(fd.open_labels(blocks), images=source, batch_size=4, crops_per_image=2, size=32)
    assert len(list(loader)) == 10
    # Everything lies where it was asked for.
    assert [path.name for path in Path().iterdir()] == [name]


@pytest.mark.parametrize("name", [name for name in NAMES if "?" not in name])
def test_so_is_the_name_of_a_teacher_s_file(name, call, photos, tmp_path, monkeypatch, tiny_teachers):
    import ferkd_tiny_teachers

    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    torch.save(ferkd_tiny_teachers.second().state_dict(), f"{name}/{name}.pth")
    assert call("build", photos, "out", "--teacher", f"{TEACHER}@{name}/{name}.pth?weight=2", *TINY)[0] == 0
    (teacher,) = fd.open_labels("out").manifest.teachers
    assert fd.TeacherSpec.parse(teacher.spec).checkpoint == f"{name}/{name}.pth"


@pytest.mark.parametrize("file", ["a?b/m.onnx", "m.onnx?download=true", "a?size=32/m.onnx"])
def test_a_question_mark_in_a_teacher_s_path_is_refused_with_the_way_out(file, call, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_bytes(b"x")
    status, _, err = call("build", photos, "out", "--teacher", f"onnx:{file}", *TINY)
    assert status == 2 and ("link to it" in err or "size=32/m.onnx" in err)
    with pytest.raises(UsageError, match="a \\? begins the options"):
        fd.TeacherSpec(kind="onnx", name=file)
    status, _, err = call("bench", "--teacher", TEACHER, "--export", file)
    assert status == 2 and "begins the options" in err
    assert Path(file).read_bytes() == b"x"


BAD = os.fsdecode(b"caf\xe9")


@pytest.fixture
def latin(photos, tmp_path):
    """A folder whose names are in Latin-1; skipped where the file system takes UTF-8 alone."""
    try:
        (tmp_path / BAD).mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    return shutil.copytree(photos, tmp_path / BAD / "photos")


def test_a_source_with_a_name_that_is_not_utf8_works(latin, call, tmp_path, tiny_teachers):
    (latin / f"notes.{BAD}").write_text("x")
    source = latin.rename(latin.parent / BAD)
    assert call("build", source, tmp_path / "out", "--teacher", TEACHER, *TINY)[0] == 0
    assert call("verify", tmp_path / "out", "--images", source)[0] == 0
    assert call("report", tmp_path / "out", tmp_path / f"{BAD}.html", "--images", source)[0] == 0
    tars = ("convert", tmp_path / "out", tmp_path / "tars", "--layout", "webdataset", "--images", source)
    assert call(*tars)[0] == 0
    manifest = fd.open_labels(tmp_path / "out").manifest
    assert manifest.source.description == r"folder caf\xe9" and manifest.source.left_out == {"other": 1}
    loader = fd.CropLoader(fd.open_labels(tmp_path / "out"), images=source, batch_size=4, crops_per_image=2, size=32)
    assert len(list(loader)) == 10


def test_an_image_with_such_a_name_is_rejected_and_a_class_folder_or_tar_is_refused(
    latin, photos, call, tmp_path, tiny_teachers
):
    (latin / "class0/photo0000.jpg").rename(latin / f"class0/{BAD}.jpg")
    assert call("build", latin, tmp_path / "out", "--teacher", TEACHER, *TINY)[0] == 3
    (latin / "class0").rename(latin / BAD)
    status, _, err = call("build", latin, tmp_path / "other", "--teacher", TEACHER, *TINY)
    assert status == 1 and r"caf\xe9: the name of this class folder is not UTF-8; rename it" in err
    write_tar(tmp_path / f"{BAD}.tar", photos)
    status, _, err = call("build", tmp_path / f"{BAD}.tar", tmp_path / "other", "--teacher", TEACHER, *TINY)
    assert status == 1 and r"caf\xe9.tar: the path is not UTF-8" in err
    assert not (tmp_path / "other").exists()


def test_a_label_set_in_such_a_folder_is_refused_before_its_files_are_blamed(
    latin, label_set, call, photos, tmp_path, tiny_teachers
):
    """`verify` found faults in every file."""
    there, new = latin.parent / "labels", latin.parent / "new"
    shutil.copytree(label_set, there)
    fine = tmp_path / "fine"
    commands = [
        *((command, there) for command in ("verify", "info", "stats", "show")),
        ("pull", there, fine),
        ("publish", there, fine, "--license", "mit"),
        ("merge", there, there, fine),
        ("convert", there, fine, "--layout", "parquet"),
        ("report", there, tmp_path / "page.html"),
        ("build", photos, new, "--teacher", TEACHER, *TINY),
        ("pull", label_set, new),
        ("publish", label_set, new, "--license", "mit"),
        ("merge", label_set, label_set, new),
        ("convert", label_set, new, "--layout", "parquet"),
    ]
    for command in commands:
        status, out, err = call(*command)
        assert (status, out) == (2, ""), command
        assert r"caf\xe9" in err and "is not UTF-8" in err, command
    assert not fine.exists() and not new.exists()


def test_so_is_a_teacher_s_file(call, photos, tmp_path, tiny_teachers):
    status, _, err = call("build", photos, tmp_path / "out", "--teacher", f"onnx:{BAD}.onnx", *TINY)
    assert status == 2 and r"onnx:caf\xe9.onnx: the name is not UTF-8" in err


def test_the_home_of_a_user_that_does_not_exist_is_an_ordinary_name(call, photos, tmp_path, monkeypatch, tiny_teachers):
    """pathlib ended every command with a RuntimeError."""
    monkeypatch.chdir(tmp_path)
    place = "~no-such-user/labels"
    for command in (
        ("info", place),
        ("pull", place, "out"),
        ("verify", place),
        ("evaluate", place, "--teacher", TEACHER),
    ):
        status, _, err = call(*command)
        assert status == 1 and "no-such-user" in err and "unexpected" not in err
    for name in (f"onnx:{place}", f"{TEACHER}@{place}", f"torchscript:{place}"):
        status, _, err = call("build", photos, "out", "--teacher", name, *TINY)
        assert status == 1 and "no-such-user" in err and "unexpected" not in err
    status, _, err = call("build", photos, "out", "--teacher", TEACHER, *TINY, "--classes", place)
    assert status == 1 and "no-such-user" in err and "unexpected" not in err


@pytest.mark.parametrize("option", ["--name", "--author", "--homepage", "--citation", "--source-dataset", "--license"])
def test_a_field_of_a_card_that_is_not_utf8_is_named(option, call, label_set, tmp_path):
    license_ = () if option == "--license" else ("--license", "mit")
    status, _, err = call("publish", label_set, tmp_path / "public", *license_, option, BAD)
    assert status == 2 and r"caf\xe9 is not UTF-8" in err
    assert not (tmp_path / "public").exists()


def test_a_demo_is_not_written_into_a_folder_of_other_things(call, copy):
    """It wrote photos and teachers there before it refused."""
    before = sorted(copy.iterdir())
    status, _, err = call("demo", copy)
    assert status == 2 and "holds 'labels' and no demo; give a new folder" in err
    assert call("demo", copy.parent / "new", "--crops", "0")[0] == 2
    assert call("demo", copy.parent / "a?b")[0] == 2
    assert sorted(copy.iterdir()) == before and not (copy.parent / "new").exists()
