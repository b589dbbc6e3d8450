"""The same photos as people have them: each kind of source, with each odd thing in it, gives the same labels."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_sets import same_labels

import ferkd_data as fd
from ferkd_data.errors import SourceError
from ferkd_data.labels.rows import ShardLabels
from ferkd_data_cli.main import run

SETTINGS = {"crops": 4, "crops_per_block": 4, "top_k": 3, "images_per_shard": 8, "device": "cpu", "workers": 1}
NAMES = [f"class{number}" for number in range(10)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, make_photos):
    return make_photos(tmp_path_factory.mktemp("plain") / "photos", 12)


@pytest.fixture(scope="module")
def expected(plain, tiny_teachers, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    fd.build(plain, out, teachers=[tiny_teachers], **SETTINGS)
    return {row.key: row for row in fd.open_labels(out)}


def files_of(plain):
    """(key, class number, bytes) of each photo."""
    for path in sorted(plain.rglob("*.jpg")):
        yield f"{path.parent.name}/{path.stem}", int(path.parent.name[5:]), path.read_bytes()


def folder(plain, to, rename=lambda name: name):
    for key, _, data in files_of(plain):
        path = to / rename(f"{key}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return to


def put(to, *names, data=b"\0\5\x16\7 of no interest"):
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(data)


def with_system_files(plain, to):
    put(folder(plain, to), ".DS_Store", "class0/._photo0000.jpg", "class1/Thumbs.db", "@eaDir/photo.jpg/x.jpg")
    put(to, "lost+found/x", ".ipynb_checkpoints/x.jpg", "class2/.ipynb_checkpoints/photo0002-checkpoint.jpg")
    put(to, "__MACOSX/class0/._photo0000.jpg", "desktop.ini")
    return to


def with_other_files(plain, to):
    put(folder(plain, to), "README.txt", "class0/photo0000.xml", "class1/notes", "labels.csv")
    (to / "empty").mkdir()
    return to


def with_links(plain, to):
    for key, _, _ in files_of(plain):
        (to / key).parent.mkdir(parents=True, exist_ok=True)
        (to / f"{key}.jpg").symlink_to(plain / f"{key}.jpg")
    (to / "class3/up").symlink_to(to)
    return to


def tar(plain, to, label, *, name="images.tar", extension="jpg", around=()):
    to.mkdir(parents=True, exist_ok=True)
    with tarfile.open(to / name, "w") as out:
        for key, number, data in files_of(plain):
            for member, content in (*around, (f"{key}.{extension}", data), *label(key, number)):
                info = tarfile.TarInfo(member.format(key=key))
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
    return to / name


def cls(key, number):
    return [(f"{key}.cls", b"%d" % number)]


def parquet(plain, to, *, name="images.parquet", image="struct", keys="key", kind=None, features=None, **labels):
    """`labels` has a column's name and a function of the class number."""
    photos = list(files_of(plain))
    images = [data for _, _, data in photos]
    if image == "struct":
        paths = [f"{key.rpartition('/')[2]}.jpg" for key, _, _ in photos]
        column = pa.array([{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)])
    else:
        column = pa.array(images, kind)
    columns = {image if image != "struct" else "image": column}
    columns |= {column: [make(number) for _, number, _ in photos] for column, make in labels.items()}
    if keys:
        columns[keys] = [key for key, _, _ in photos]
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    to.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, to / name)
    return to


def img2dataset(plain, to):
    tar(plain, to, cls, name="00000.tar")
    pq.write_table(pa.table({"url": ["x"], "status": ["success"]}), to / "00000.parquet")
    put(to, "00000_stats.json", data=b"{}")
    return to


def one_split_of_two(plain, to):
    parquet(plain, to / "data", name="train-00000-of-00001.parquet", label=int)
    parquet(plain, to / "data", name="test-00000-of-00001.parquet", label=int)
    return f"{to}/data/train-*.parquet"


CLASS_LABEL = {"label": {"_type": "ClassLabel", "names": NAMES}}
SHUFFLED = {"label": {"_type": "ClassLabel", "names": NAMES[::-1]}}
DISGUISES = {
    "system files": with_system_files,
    "other files and an empty folder": with_other_files,
    "links and a loop": with_links,
    ".jfif": lambda plain, to: folder(plain, to, lambda name: name.replace(".jpg", ".jfif")),
    ".JPEG": lambda plain, to: folder(plain, to, lambda name: name.replace(".jpg", ".JPEG")),
    "no extension": lambda plain, to: folder(plain, to, lambda name: name.removesuffix(".jpg")),
    "JPEGs that are called .tif": lambda plain, to: folder(plain, to, lambda name: name.replace(".jpg", ".tif")),
    "tar": lambda plain, to: tar(plain, to, cls),
    "tar of macOS": lambda plain, to: tar(
        plain, to, cls, around=[("{key}.x/._a", b"x"), ("._b.jpg", b"x"), (".DS_Store", b"x")]
    ),
    "tar with JSON": lambda plain, to: tar(
        plain, to, lambda key, n: [(f"{key}.json", json.dumps({"label": n}).encode())]
    ),
    "tar with texts": lambda plain, to: tar(plain, to, lambda key, n: [(f"{key}.cls", NAMES[n].encode())]),
    "tar with .jfif": lambda plain, to: tar(plain, to, cls, extension="jfif"),
    "folder of tars": lambda plain, to: tar(plain, to, cls).parent,
    "img2dataset": img2dataset,
    "Parquet": lambda plain, to: parquet(plain, to, label=int),
    "Parquet of bytes": lambda plain, to: parquet(plain, to, image="jpg", label=int),
    "Parquet of large bytes": lambda plain, to: parquet(plain, to, image="image", kind=pa.large_binary(), label=int),
    "Parquet with labels": lambda plain, to: parquet(plain, to, labels=int),
    "Parquet with fine_label": lambda plain, to: parquet(plain, to, fine_label=int, caption=str),
    "Parquet with ClassLabel": lambda plain, to: parquet(plain, to, features=CLASS_LABEL, label=int),
    "Parquet with shuffled ClassLabel": lambda plain, to: parquet(plain, to, features=SHUFFLED, label=lambda n: 9 - n),
    "Parquet with texts": lambda plain, to: parquet(plain, to, label=lambda n: NAMES[n]),
    "Parquet with floats": lambda plain, to: parquet(plain, to, label=float),
    "Parquet without keys": lambda plain, to: parquet(plain, to, keys=None, label=int),
    "a pattern for one of two splits": one_split_of_two,
}
NEEDS_CLASSES = ("tar with texts", "Parquet with shuffled ClassLabel", "other files and an empty folder")
OTHER_KEYS = ("Parquet without keys",)


@pytest.mark.parametrize("name", DISGUISES)
def test_the_labels_are_the_same(plain, expected, tiny_teachers, tmp_path, name):
    source = DISGUISES[name](plain, tmp_path / "source")
    classes = None
    if name in NEEDS_CLASSES:
        classes = tmp_path / "classes.txt"
        classes.write_text("\r\n".join(NAMES) + "\r\n\r\n")
    out = tmp_path / "out"
    result = fd.build(source, out, teachers=[tiny_teachers], classes=classes, **SETTINGS)
    assert result.rejects == 0
    rows = {row.key: row for row in fd.open_labels(out)}
    targets = {row.image_digest: row.target for row in rows.values()}
    assert targets == {row.image_digest: row.target for row in expected.values()}
    if name not in OTHER_KEYS:
        assert rows.keys() == expected.keys()
        assert all(
            same_labels(ShardLabels.from_rows([rows[key]]), ShardLabels.from_rows([expected[key]])) for key in rows
        )
    assert fd.verify(out, images=source).ok


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda plain, to: [shutil.copytree(plain, to / split) for split in ("train", "val")], "splits of a data set"),
        (lambda plain, to: folder(plain, to / "photos"), "whose folders look like the classes"),
        (lambda plain, to: [folder(plain, to), put(to, "x.jpg", data=b"\xff\xd8\xff")], "beside folders"),
        (lambda plain, to: one_split_of_two(plain, to), "several splits: test .1., train .1."),
        (lambda plain, to: put(to, "a/notes.txt", "b/Thumbs.db"), "no images found; left out: .*1 .txt file"),
    ],
)
def test_or_the_reason_is_said(plain, tiny_teachers, tmp_path, make, reason):
    make(plain, tmp_path / "source")
    with pytest.raises(SourceError, match=reason):
        fd.build(tmp_path / "source", tmp_path / "out", teachers=[tiny_teachers], **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_what_was_left_out_is_said_everywhere(plain, tiny_teachers, tmp_path, capsys):
    source, out = with_other_files(plain, with_system_files(plain, tmp_path / "source")), tmp_path / "out"
    options = ["--crops", "2", "--top-k", "2", "--device", "cpu", "--workers", "1"]
    command = ["build", str(source), str(out), "--teacher", tiny_teachers, *options]
    assert run([*command, "--dry-run"]) == 0
    said = capsys.readouterr().err
    left_out = "left out      9 system files (.DS_Store), 1 .csv file (labels.csv), 1 .txt file (README.txt)"
    assert left_out in said and "1 folder without images (empty)" in said
    assert run(command) == 0
    said = capsys.readouterr().err
    assert left_out in said
    assert "source        folder source: 12 images in 1 shard\n" in said
    assert "ground truth  known for 12, unknown for 0\n" in said
    assert "classes       10: 0 is class0, 9 is class9\n" in said
    assert f"teacher       {tiny_teachers}: 32 px, 10 outputs\n" in said
    assert "on 12 images: " in said and "% right, p_max 0." in said
    assert len(said[: said.index("to do")].splitlines()) <= 10
    assert fd.open_labels(out).manifest.source.left_out == {
        "system": 9,
        "empty_folder": 1,
        ".txt": 1,
        ".xml": 1,
        "no_image": 1,
        ".csv": 1,
    }
    assert run(["info", str(out)]) == 0
    assert "left out      9 system files" in capsys.readouterr().out


def test_evaluate_says_what_it_did_not_look_at(plain, tiny_teachers, tmp_path, capsys):
    source = with_system_files(plain, tmp_path / "source")
    (source / "class0/broken.jpg").write_bytes(b"no picture")
    assert run(["evaluate", str(source), "--teacher", tiny_teachers, "--diagnose", "0", "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert "left out: 9 system files\n" in said and "1 image could not be used" in said
    flat = tmp_path / "flat"
    put(flat, "a.jpg", data=(plain / "class0/photo0000.jpg").read_bytes())
    assert run(["evaluate", str(flat), "--teacher", tiny_teachers, "--device", "cpu"]) == 1
    assert "no image has a target" in capsys.readouterr().err


def test_the_overview_is_in_the_json(plain, tiny_teachers, tmp_path, capsys):
    options = ["--crops", "2", "--top-k", "2", "--device", "cpu", "--workers", "1", "--json"]
    command = ["build", str(plain), str(tmp_path / "out"), "--teacher", tiny_teachers, *options]
    assert run([*command, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["overview"]["teachers"][0]["num_classes"] == 10
    assert run(command) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["overview"]["images_with_target"] == 12 and content["already_finished"] is False
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out)["already_finished"] is True


def test_unlabelled_images_have_an_unknown_ground_truth(plain, tiny_teachers, tmp_path, capsys):
    source = tmp_path / "flat"
    for key, _, data in files_of(plain):
        put(source, f"{key.replace('/', '-')}.jpg", data=data)
    out = tmp_path / "out"
    teachers = ["--teacher", tiny_teachers, "--teacher", "python:ferkd_tiny_teachers:second"]
    assert run(["build", str(source), str(out), *teachers, "--crops", "2", "--top-k", "2", "--device", "cpu"]) == 0
    assert "ground truth  known for 0, unknown for 12" in capsys.readouterr().err
    assert run(["stats", str(out)]) == 0
    text = capsys.readouterr().out
    assert "the ground truth is unknown" in text and " 0.0%" not in text
    assert run(["stats", str(out), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["agreement_with_target"] is None and summary["teacher_agreement_with_target"] == []


def test_an_extension_takes_the_classes_from_the_manifest(plain, make_photos, tiny_teachers, tmp_path):
    """Built with --classes for fewer folders than classes: the same numbers, without the file."""
    few = tmp_path / "few"
    for key, _, data in files_of(plain):
        if key.startswith(("class2", "class7")):
            put(few, f"{key}.jpg", data=data)
    (tmp_path / "classes.txt").write_text("".join(f"{name}\tname of {name}\n" for name in NAMES))
    out = tmp_path / "out"
    fd.build(few, out, teachers=[tiny_teachers], classes=tmp_path / "classes.txt", **SETTINGS)
    shutil.copytree(plain / "class5", few / "class5")
    fd.build(few, out, extend=True, device="cpu")
    assert {row.key.partition("/")[0]: row.target for row in fd.open_labels(out)} == {
        "class2": 2,
        "class5": 5,
        "class7": 7,
    }
    assert not (out / ".build").exists() and fd.verify(out).warnings == ()
    again = fd.build(few, out, extend=True, device="cpu")
    assert again.already_finished


def test_a_teacher_s_module_that_changes_the_process_changes_no_label(
    plain, expected, tmp_path, monkeypatch, tiny_teachers
):
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(plain, tmp_path / "source")
    whole = (source / "class0/photo0000.jpg").read_bytes()
    (source / "class0/half.jpg").write_bytes(whole[: len(whole) // 2])
    from PIL import Image, ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with np.errstate():  # the module's own settings end here
        result = fd.build("source", "out", teachers=["python:rude_teacher:first"], **SETTINGS)
    assert result.rejects == 1 and (tmp_path / "out/manifest.json").exists()
    rows = {row.key: row for row in fd.open_labels(tmp_path / "out")}
    assert rows.keys() == expected.keys()
    assert all(same_labels(ShardLabels.from_rows([rows[key]]), ShardLabels.from_rows([expected[key]])) for key in rows)
