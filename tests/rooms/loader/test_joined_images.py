"""Labels joined with an image source by key."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

import ferkd_data as fd
from ferkd_data import rng
from ferkd_data.errors import ImageError, LabelSetError
from ferkd_data.images import open_source
from ferkd_data.label_set import joined_images
from ferkd_data.label_set.joined_images import join_images


@pytest.mark.parametrize("spool_rows", [1, 3, 8192])
def test_every_row_finds_its_image_whatever_else_the_source_has(
    label_set, photos, make_photos, tmp_path, monkeypatch, spool_rows
):
    """More images than labels, in another order, with one missing; the join works by so many at a time."""
    monkeypatch.setattr(joined_images, "SPOOL_ROWS", spool_rows)
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


TRAINING = """
import sys, time
import ferkd_data as fd

labels, images, cache = sys.argv[1:]
labels = fd.open_labels(labels)
dataset = fd.CropDataset(labels, images=images, cache_dir=cache)
loader = fd.CropLoader(
    labels, images=images, batch_size=4, crops_per_image=2, size=32, cache_dir=cache, num_workers=1, keys=True
)
next(iter(loader))
print("begun", flush=True)
time.sleep(600)
"""


def test_what_a_killed_training_left_goes_when_the_next_loader_opens(label_set, photos, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    command = [sys.executable, "-c", TRAINING, *map(str, (label_set, photos, tmp_path / "cache"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as training:
        try:
            assert training.stdout.readline() == "begun\n"
        finally:
            training.send_signal(signal.SIGKILL)
        assert "Traceback" not in training.stderr.read()
    left = set(temporary.iterdir())
    assert {path.name.split("-")[2] for path in left} == {"images", "keys", "epoch"}
    loader = fd.CropLoader(
        fd.open_labels(label_set), images=photos, batch_size=4, crops_per_image=2, size=32, cache_dir=tmp_path / "cache"
    )
    assert len(next(iter(loader))[0]) == 4
    assert not left & set(temporary.iterdir())


def test_workers_do_not_import_pandas(label_set, photos, tmp_path):
    """pyarrow imports it on the way from a column to NumPy; in every worker it would take 30 MB."""
    pytest.importorskip("pandas")
    training = os.getpid()

    def transform(crop):
        if os.getpid() != training and "pandas" in sys.modules:
            raise AssertionError("this worker has pandas")
        return crop

    loader = fd.CropLoader(
        fd.open_labels(label_set), images=photos, batch_size=4, num_workers=1, transform=transform, cache_dir=tmp_path
    )
    loader._open_workers().wait()
    stats = [loader.stats() for _ in loader][-1]
    assert stats.here_share < 1
