"""Pictures of one image, and tables of label sets and targets in a notebook."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ferkd_data as fd
from ferkd_data.errors import ImageError, UsageError
from ferkd_data.report.show import BUCKET_COLOURS, boxes_on
from ferkd_data.targets import SoftTargets
from ferkd_data_cli.main import run


@pytest.fixture(scope="module")
def labels(label_set):
    return fd.open_labels(label_set)


def test_the_picture_has_the_image_and_the_crops(labels, photos, tmp_path):
    shown = fd.show(labels, "class3/photo0003", images=photos, crops=3)
    picture = Image.open(io.BytesIO(shown._repr_png_()))
    assert picture.width > 900 and picture.height > 400
    shown.save(tmp_path / "shown.png")
    assert (tmp_path / "shown.png").read_bytes() == shown._repr_png_()
    told = repr(shown).splitlines()
    image = labels["class3/photo0003"]
    order = np.argsort(image.class_prob[:, 0], kind="stable")
    assert [int(line.split()[1].rstrip(",")) for line in told if "crop " in line] == [*order[:3], *order[::-1][:3]]
    assert f"{float(image.class_prob[order[0], 0]):.2f}" in told[2]


def test_boxes_are_where_they_belong_in_the_colour_of_their_bucket(labels, photos):
    image = labels[0]
    black = np.zeros((image.height, image.width, 3), np.uint8)
    number = int(image.class_prob[:, 0].argmax())
    picture = np.asarray(boxes_on(image, black, [number]))
    shade = BUCKET_COLOURS[image.bucket[number]]
    colour = np.array([int(shade[i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.nonzero((picture == colour).all(axis=2))
    scale = 480 / image.width
    top, left, height, width = image.boxes[number].tolist()
    found = rows.min(), columns.min(), rows.max(), columns.max()
    expected = top * scale, left * scale, (top + height) * scale - 1, (left + width) * scale - 1
    np.testing.assert_allclose(found, expected, atol=1.5)


def test_rows_layouts_and_views(tar_label_set, labels, photos):
    own = fd.open_labels(tar_label_set)
    assert repr(fd.show(own, 5)) == repr(fd.show(own, own[5].key))
    view = own.select(rows=range(4, 9))
    assert repr(fd.show(view, 1)) == repr(fd.show(own, 5))


def test_errors_say_what_to_do(labels, photos, tmp_path):
    with pytest.raises(UsageError, match="images="):
        fd.show(labels, 0)
    with pytest.raises(KeyError):
        fd.show(labels, "no such key", images=photos)
    other = shutil.copytree(photos, tmp_path / "photos")
    shutil.copyfile(other / "class1/photo0001.jpg", other / "class0/photo0000.jpg")
    with pytest.raises(ImageError, match="another image"):
        fd.show(labels, "class0/photo0000", images=other)


def test_command_writes_a_picture(label_set, photos, tmp_path, capsys):
    file = tmp_path / "shown.png"
    assert run(["show", str(label_set), "--image", str(file), "--images", str(photos)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "width x height + left + top" in capsys.readouterr().out
    assert run(["show", str(label_set), "--images", str(photos)]) == 2


def test_command_never_replaces_a_photo(tmp_path, make_greys, tiny_teachers, capsys):
    """--image was taken for the image to show, and the photo was replaced by the drawing."""
    greys = make_greys(tmp_path / "greys", 2, each=1)
    photo = greys / "class1/grey001.png"
    before = photo.read_bytes()
    teachers = ["python:ferkd_tiny_teachers:brightness_of_two"]
    for layout in ("parquet", "webdataset"):
        out = tmp_path / layout
        fd.build(greys, out, teachers=teachers, crops=2, top_k=2, device="cpu", layout=layout)
        given = [] if layout == "webdataset" else ["--images", str(greys)]
        assert run(["show", str(out), "class1/grey001", "--image", str(photo), *given]) == 2
        assert "one of the photos" in capsys.readouterr().err and photo.read_bytes() == before
    # Another photo than the one that is shown.
    assert run(["show", str(out), "--image", str(photo), "--images", str(greys)]) == 2
    jpeg = tmp_path / "holiday.jpg"
    jpeg.write_bytes(b"a photo")
    assert run(["show", str(out), "--image", str(jpeg)]) == 2
    assert "must end in .png" in capsys.readouterr().err and jpeg.read_bytes() == b"a photo"
    # What it wrote itself is replaced.
    for _ in range(2):
        assert run(["show", str(out), "--image", str(tmp_path / "shown.PNG")]) == 0


def test_command_names_classes(tmp_path, photos, tiny_teachers, label_set, capsys):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class{n}\tanimal {n}\n" for n in range(10)))
    assert run(["show", str(label_set), "--classes", str(names)]) == 0
    assert "animal" in capsys.readouterr().out
    names.write_text("one\ntwo\n")
    assert run(["show", str(label_set), "--classes", str(names)]) == 2
    assert "names 2 classes, the label set has 10" in capsys.readouterr().err


def test_a_notebook_shows_a_label_set(hostile_labels):
    text = fd.open_labels(hostile_labels)._repr_html_()
    assert "31" in text and "top-4 of 10 classes" in text and "<table>" in text


def test_a_notebook_shows_targets_without_running_their_keys():
    targets = SoftTargets(
        index=torch.tensor([[1], [2]]),
        weight=torch.tensor([[0.7], [0.4]]),
        floor=torch.tensor([0.1, 0.2]),
        num_classes=3,
        hard=torch.tensor([1, -1]),
        keys=("<script>alert(1)</script>", "b"),
    )
    text = targets._repr_html_()
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "class 1: 0.800" in text and "2 crops and 3 classes" in text


def test_targets_of_one_class_and_many_rows():
    targets = SoftTargets(
        index=torch.zeros((40, 1), dtype=torch.int64), weight=torch.ones((40, 1)), floor=torch.zeros(40), num_classes=1
    )
    assert "the first 8" in targets._repr_html_() and targets._repr_html_().count("class 0") == 8


def test_json_is_as_before(label_set, capsys):
    assert run(["show", str(label_set), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["crops"][0]) == {"crop", "box", "flip", "bucket", "labels"}
