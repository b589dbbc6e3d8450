"""Labels joined with an image source by key."""

from __future__ import annotations

import shutil

import pytest

import ferkd_data as fd
from ferkd_data import rng
from ferkd_data.errors import ImageError, LabelSetError
from ferkd_data.images import open_source
from ferkd_data.loader import image_table
from ferkd_data.loader.image_table import join_images


@pytest.mark.parametrize("spool_rows", [1, 3, 8192])
def test_every_row_finds_its_image_whatever_else_the_source_has(
    label_set, photos, make_photos, tmp_path, monkeypatch, spool_rows
):
    """More images than labels, in another order, with one missing; the join works by so many at a time."""
    monkeypatch.setattr(image_table, "SPOOL_ROWS", spool_rows)
    folder = shutil.copytree(photos, tmp_path / "photos")
    make_photos(folder / "class0", 4)
    (folder / "class3/photo0013.jpg").unlink()
    labels = fd.open_labels(label_set)
    with pytest.raises(LabelSetError, match=r"1 of 20 labelled images are missing.*'class3/photo0013'"):
        join_images(labels, open_source(folder), missing="raise")
    _, table = join_images(labels, open_source(folder), missing="later")
    for key in labels.keys():
        if key == "class3/photo0013":
            with pytest.raises(ImageError, match="no image of this key"):
                table.ref(rng.hash64(key))
        else:
            assert table.read_key(rng.hash64(key)) == (photos / f"{key}.jpg").read_bytes()
    (folder / "class0/photo0000.jpg").unlink()
    with pytest.raises(ImageError, match=r"class0/photo0000.jpg: No such file"):
        table.read_key(rng.hash64("class0/photo0000"))
    shutil.rmtree(table.folder)


class NoLabels:
    location = "empty"

    def __len__(self):
        return 0


def test_labels_of_no_image(photos):
    with pytest.raises(LabelSetError, match="empty: it has labels of no image"):
        join_images(NoLabels(), open_source(photos), missing="later")
