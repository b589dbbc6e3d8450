"""FIFOs, sockets and devices among images and other inputs: rejected, counted as left out, or an error; no wait."""

from __future__ import annotations

import shutil

import pytest
from attacks.test_waits import SPECIAL
from label_sets import SMALL

import ferkd_data as fd
from ferkd_data.errors import FerkdError, ImageError, SourceError
from ferkd_data.images import ImageRef, Reject, open_source
from ferkd_data.loader import CropLoader
from ferkd_data_cli.main import run

pytestmark = pytest.mark.usefixtures("in_time")


def device(path):
    """A link to a device that never ends."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


KINDS = {**SPECIAL, "device": device}
IMAGES = ("special.jpg", "special.JPEG", "special.heic", "special.tif", "special.png")
OTHERS = ("special", "special.xyz", "special.txt", "special.tar", "special.parquet", "special.json")


@pytest.fixture
def some(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "some")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["class0", "."])
def test_among_the_images_of_a_build(some, tiny_teachers, tmp_path, kind, place):
    """Named as an image: a reject; else counted as left out. Beside class folders, images are refused as always."""
    for number, name in enumerate((*IMAGES, *OTHERS) if place == "class0" else OTHERS):
        KINDS[kind](some / place / f"{number}{name}")
    manifest = fd.build(some, tmp_path / "out", teachers=[tiny_teachers], **SMALL).manifest
    assert manifest.num_images == 20
    assert manifest.rejects.rows == (len(IMAGES) if place == "class0" else 0)
    assert sum(manifest.source.left_out.values()) == len(OTHERS), manifest.source.left_out
    assert fd.verify(tmp_path / "out", images=some).ok


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_folder_of_nothing_else(tmp_path, kind):
    (tmp_path / "flat").mkdir()
    for name in IMAGES:
        KINDS[kind](tmp_path / "flat" / f"{name}-x{name}")
    items = list(open_source(tmp_path / "flat").list_images())
    assert len(items) == len(IMAGES) and all(isinstance(item, Reject) for item in items)
    assert {item.reason for item in items} == {"unreadable"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [{}, {"decode_device": "cpu"}])
def test_among_the_images_of_a_loader(label_set, some, tmp_path, kind, way):
    """In the place of a labelled image: before the loader lists the folder, and after it."""
    (some / "class0/extra.jpg").symlink_to("photo0000.jpg")
    settings = {"images": some, "batch_size": 4, "crops_per_image": 1, "size": 16, "cache_dir": tmp_path, **way}
    loader = CropLoader(fd.open_labels(label_set), **settings)
    KINDS[kind](some / "class1/photo0001.jpg")
    with pytest.raises(FerkdError, match=r"class1/photo0001.*not a regular file|image 'class1/photo0001'"):
        list(loader)
    with pytest.raises(FerkdError, match="class1/photo0001"):
        list(CropLoader(fd.open_labels(label_set), **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_replaced_after_it_was_listed(some, kind):
    source = open_source(some)
    refs = [item for item in source.list_images() if isinstance(item, ImageRef)]
    KINDS[kind](some / refs[0].file)
    first = next(iter(source.read(refs)))
    assert isinstance(first, ImageError) and first.reason == "unreadable" and "not a regular file" in first.detail


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.pq", "x.zip", "x"])
def test_as_a_source(tmp_path, kind, name):
    """Given by its name and by a pattern; in a folder of its own it is no source at all."""
    (tmp_path / "folder").mkdir()
    KINDS[kind](tmp_path / "folder" / name)
    for source in (tmp_path / "folder" / name, tmp_path / "folder/x*"):
        with pytest.raises(SourceError, match=r"not a regular file|unpack it first|is neither"):
            list(open_source(source).list_images())
    assert not list(open_source(tmp_path / "folder").list_images())


@pytest.mark.parametrize("kind", KINDS)
def test_beside_tars(tar_label_set, tmp_path, kind):
    """Tars of a label set are a source too: 20 images in three tars."""
    folder = shutil.copytree(tar_label_set / "shards", tmp_path / "tars")
    KINDS[kind](folder / "00009.tar")
    KINDS[kind](folder / "notes.txt")
    source = open_source(folder)
    assert sum(isinstance(item, ImageRef) for item in source.list_images()) == 20
    assert source.left_out.counts == {".tar": 1, ".txt": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["--classes", "--config", "checkpoint", "onnx", "torchscript"])
def test_given_on_the_command_line(photos, tmp_path, tiny_teachers, kind, option, capsys):
    path = tmp_path / "special"
    KINDS[kind](path)
    teachers = {
        "checkpoint": f"torchvision:resnet18@{path}",
        "onnx": f"onnx:{path}?size=8&mean=0.5&std=0.5",
        "torchscript": f"torchscript:{path}?size=8&mean=0.5&std=0.5",
    }
    options = [option, path] if option.startswith("--") else []
    command = ["build", photos, tmp_path / "out", "--teacher", teachers.get(option, tiny_teachers), *options]
    status = run([str(argument) for argument in [*command, "--device", "cpu", "--crops", "2", "--top-k", "3"]])
    said = capsys.readouterr().err
    assert status in (1, 2) and str(path) in said and "Traceback" not in said and "unexpected" not in said, said
    assert not (tmp_path / "out/manifest.json").exists()
