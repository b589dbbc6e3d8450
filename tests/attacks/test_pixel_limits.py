"""No decoder of a label set's images takes more pixels than were labelled, or than its manifest allows."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from label_sets import SMALL, edit_manifest

import ferkd_data as fd
from ferkd_data.errors import FerkdError, ImageError, LoaderError
from ferkd_data.images import DEFAULT_MAX_PIXELS
from ferkd_data.label_set import joined_images
from ferkd_data.loader import batch_maker, device_jpegs

PIXELS = 64 * 48
"""Of each photo."""
LOADERS = {
    "in workers": {},
    "on a device": {"decode_device": "cpu"},
    "reduced": {"decode_scale": "auto", "size": 8},
}


def load(folder, photos, tmp_path, **changes):
    settings = {"batch_size": 4, "crops_per_image": 2, "size": 32, "images": photos, "cache_dir": tmp_path / "cache"}
    return fd.CropLoader(fd.open_labels(folder), **(settings | changes))


def allow(folder, pixels):
    edit_manifest(folder, lambda content: content.update(max_pixels=pixels))


@pytest.fixture
def no_decoding(monkeypatch):
    """Fails the test when pixels are made: a header may be read."""

    def never(*_, **__):
        raise AssertionError("decoded")

    for module, name in (
        (joined_images, "decode_rgb"),
        (batch_maker, "decode_reduced"),
        (device_jpegs, "decode_rgb"),
        (device_jpegs, "decode"),
    ):
        monkeypatch.setattr(module, name, never)


@pytest.mark.parametrize("way", LOADERS)
def test_more_pixels_than_the_manifest_allows(copy, photos, tmp_path, way, request):
    allow(copy, PIXELS)
    assert len(list(load(copy, photos, tmp_path, **LOADERS[way]))) == 10
    allow(copy, PIXELS - 1)
    loader = load(copy, photos, tmp_path, **LOADERS[way])
    request.getfixturevalue("no_decoding")
    message = (
        r"image 'class\d/photo\d+' \(shard \d .*: pixel_bomb: it was labelled with 64x48 pixels; the limit "
        rf"\(max_pixels in the manifest, or its default\) is {PIXELS - 1}"
    )
    with pytest.raises(LoaderError, match=message):
        list(loader)


def test_a_crop_dataset_has_the_same_limit(copy, photos, tmp_path):
    allow(copy, PIXELS - 1)
    crops = fd.CropDataset(fd.open_labels(copy), images=photos, size=32, cache_dir=tmp_path / "cache")
    with pytest.raises(LoaderError, match=r"image 'class\d/photo\d+' .*pixel_bomb"):
        crops[0]


def test_verify_and_convert_hold_labels_against_the_limit(copy, tmp_path):
    allow(copy, PIXELS - 1)
    fault = fd.verify(copy).faults[0]
    assert fault.key and fault.field == "height" and f"{PIXELS - 1} pixels that max_pixels allows" in fault.message
    with pytest.raises(FerkdError, match=rf"'class\d/photo\d+'.*{PIXELS - 1} pixels that max_pixels allows"):
        fd.convert(copy, tmp_path / "out", layout="parquet", crops_per_block=5)


def test_a_manifest_without_a_limit_has_the_default_one(copy):
    edit_manifest(copy, lambda content: content.pop("max_pixels"))
    assert fd.open_labels(copy).manifest.pixel_limit == DEFAULT_MAX_PIXELS
    record = np.zeros(1, [("height", "<u2"), ("width", "<u2")])[0]
    record["height"], record["width"] = 65_535, 65_535
    with pytest.raises(ImageError, match="65535x65535"):
        batch_maker.labelled_pixels(batch_maker.labelled_size(record), DEFAULT_MAX_PIXELS)


def test_what_a_device_makes_of_another_header_is_not_cut(copy, photos, tmp_path, monkeypatch):
    """A crafted JPEG may show two decoders two sizes: then the host has the last word."""
    expected = [images.clone() for images, _ in load(copy, photos, tmp_path, decode_device="cpu")]
    decode = device_jpegs.decode
    loader = load(copy, photos, tmp_path, decode_device="cpu")
    monkeypatch.setattr(
        device_jpegs, "decode", lambda jpegs, device: [pixels[:, :-1] for pixels in decode(jpegs, device)]
    )
    for (images, _), before in zip(loader, expected, strict=True):
        assert (images.int() - before.int()).abs().max() <= 2
    decoder = device_jpegs.DeviceDecoder(torch.device("cpu"), 10**8)
    data = torch.frombuffer(bytearray(next(photos.rglob("*.jpg")).read_bytes()), dtype=torch.uint8)
    (size,) = decoder.decode([device_jpegs.Jpeg(0, data, (46, 64))])
    assert isinstance(size, ImageError) and re.search(r"\(48, 64\) pixels, its header has \(46, 64\)", str(size))


def test_the_limit_of_what_is_joined_is_the_larger_one(make_photos, tiny_teachers, tmp_path):
    """A merged or extended label set allows what its parts did, or it could not be loaded."""
    first, second = make_photos(tmp_path / "first", 10), make_photos(tmp_path / "second", 20)
    for path in list(second.rglob("*.jpg")):
        if (first / path.relative_to(second)).exists():
            path.unlink()
    settings = {"teachers": [tiny_teachers], **SMALL}
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"class{number}\n" for number in range(10)))
    fd.build(first, tmp_path / "a", classes=classes, max_pixels=PIXELS, **settings)
    fd.build(second, tmp_path / "b", classes=classes, max_pixels=2 * PIXELS, **settings)
    assert fd.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both").manifest.max_pixels == 2 * PIXELS
    more = make_photos(tmp_path / "more", 12)
    extended = fd.build(more, tmp_path / "a", extend=True, classes=classes, max_pixels=3 * PIXELS, device="cpu")
    assert extended.manifest.num_images == 12 and extended.manifest.max_pixels == 3 * PIXELS
    same = fd.build(more, tmp_path / "a", extend=True, classes=classes, max_pixels=4 * PIXELS, device="cpu")
    assert same.already_finished and same.manifest.max_pixels == 3 * PIXELS
