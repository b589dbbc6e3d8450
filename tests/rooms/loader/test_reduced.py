"""decode_scale="auto": large JPEGs decoded at a fraction of their sides, and everything else as it was."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import ferkd_data as fd
from ferkd_data.crops import CropDistribution, Crops, draw_crops
from ferkd_data.errors import StateMismatchError, UsageError
from ferkd_data.images.decode import MARGIN, decode_reduced, decode_rgb, divisor_for, reduced_crops


def photo(height, width, seed=0, mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


SIDES = st.integers(1, 700)


@given(SIDES, SIDES, st.sampled_from([1, 7, 32, 64]), st.integers(0, 99))
def test_boxes_stay_inside_and_large_enough(height, width, size, seed):
    crops = draw_crops(str(seed), height, width, seed=seed, count=4, distribution=CropDistribution())
    divisor = divisor_for(crops.boxes, size)
    small_height, small_width = -(-height // divisor), -(-width // divisor)
    found = reduced_crops(crops, divisor, small_height, small_width)
    top, left, high, wide = found.boxes.astype(int).T
    assert (top + high <= small_height).all() and (left + wide <= small_width).all()
    assert (found.flip == crops.flip).all()
    if divisor == 1:
        assert (found.boxes == crops.boxes).all()
    else:
        assert (found.boxes[:, 2:] >= MARGIN * size).all()
        edges = found.boxes.astype(float) * divisor - crops.boxes
        assert np.abs(edges[:, :2]).max() <= divisor / 2 and np.abs(edges[:, 2:]).max() <= divisor


def test_the_divisor_follows_the_smallest_side():
    def of(*sides):
        return divisor_for(np.array([[0, 0, *pair] for pair in sides], np.uint16), 100)

    assert [of((side, 9999)) for side in (399, 400, 799, 800, 1599, 1600, 60000)] == [1, 2, 2, 4, 4, 8, 8]
    assert of((9999, 9999), (9999, 401)) == 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 60}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_reduced_jpeg_is_the_picture(options, mode):
    for height, width in ((301, 403), (304, 400), (17, 9)):
        data = encoded(photo(height, width, mode=mode), **options)
        whole = decode_rgb(data)
        for divisor in (2, 4, 8):
            small = decode_reduced(data, divisor)
            assert small is not None and small.shape == (-(-height // divisor), -(-width // divisor), 3)
            if min(height, width) > 100:
                mean = np.asarray(Image.fromarray(whole).reduce(divisor), np.int16)
                assert np.abs(small[: len(mean), : mean.shape[1]].astype(np.int16) - mean).mean() < 2


def test_what_cannot_be_reduced():
    assert decode_reduced(encoded(photo(60, 80), "PNG"), 2) is None
    assert decode_reduced(encoded(photo(60, 80, mode="CMYK")), 2) is None
    assert decode_reduced(encoded(photo(300, 400))[:2000], 2) is None, "ends too early: the whole decoder decides"
    assert decode_reduced(b"\xff\xd8\xff rubbish", 2) is None


@pytest.fixture(scope="module")
def large(tmp_path_factory, tiny_teachers):
    """JPEGs and a PNG of 600 x 800 and 61 x 83, with labels."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(10):
        (folder / f"class{number}").mkdir()
        small = number % 3 == 2
        image = photo(*((61, 83) if small else (600, 800)), seed=number)
        image.save(folder / f"class{number}" / f"photo{number}.{'png' if number == 4 else 'jpg'}")
    fd.build(folder, folder.with_name("large-labels"), teachers=[tiny_teachers], crops=8, top_k=3)
    return folder, folder.with_name("large-labels")


def batches(large, **settings):
    folder, labels = large
    loader = fd.CropLoader(fd.open_labels(labels), images=folder, batch_size=20, size=32, seed=3, **settings)
    return [(images.clone(), targets) for images, targets in loader]


@pytest.mark.parametrize("settings", [{}, {"num_workers": 1}, {"spread": 2, "crops_per_image": 2}])
def test_only_pixels_change_and_those_little(large, settings):
    exact, reduced = batches(large, **settings), batches(large, decode_scale="auto", **settings)
    differing = []
    for (images, targets), (others, same) in zip(exact, reduced, strict=True):
        assert torch.equal(targets.index, same.index) and torch.equal(targets.weight, same.weight)
        difference = (images.int() - others.int()).abs().float().mean(dim=(1, 2, 3))
        assert difference.max() < 6
        differing += difference.tolist()
    assert sum(each > 0 for each in differing) >= len(differing) / 3, "large crops of large JPEGs were reduced"
    assert sum(each == 0 for each in differing) >= 4, "small images and the PNG were not"


def test_a_resume_within_a_window_gives_the_same_pixels(large):
    """Where only small crops of an image are left, it is decoded as it was for all of them."""
    folder, labels = large
    given = {"images": folder, "batch_size": 4, "crops_per_image": 4, "spread": 4, "size": 32, "decode_scale": "auto"}
    loader, states, expected = fd.CropLoader(fd.open_labels(labels), **given), [], []
    for images, _ in loader:
        expected.append(images.clone())
        states.append(loader.state_dict())
    for number, state in enumerate(states[:-1], 1):
        other = fd.CropLoader(fd.open_labels(labels), **given)
        other.load_state_dict(state)
        assert torch.equal(next(iter(other))[0], expected[number]), number


def test_another_size_than_was_labelled_is_still_noticed(large, tmp_path):
    import shutil

    folder = shutil.copytree(large[0], tmp_path / "photos")
    photo(599, 800).save(folder / "class0" / "photo0.jpg")
    loader = fd.CropLoader(
        fd.open_labels(large[1]),
        images=folder,
        batch_size=20,
        size=8,
        decode_scale="auto",
        verify_images="never",
    )
    with pytest.raises(fd.errors.LoaderError, match="800x599 pixels, 800x600 were labelled"):
        list(loader)


def test_settings_that_do_not_go_together(large):
    with pytest.raises(UsageError, match="decode_scale must be one of exact, auto"):
        batches(large, decode_scale="half")
    with pytest.raises(UsageError, match="leave out decode_device"):
        batches(large, decode_scale="auto", decode_device="cpu")


def test_a_state_of_other_pixels_is_refused(large):
    folder, labels = large
    settings = {"images": folder, "batch_size": 20, "size": 32}
    state = fd.CropLoader(fd.open_labels(labels), decode_scale="auto", **settings).state_dict()
    with pytest.raises(StateMismatchError, match="decode_scale"):
        fd.CropLoader(fd.open_labels(labels), **settings).load_state_dict(state)


def test_crops_keep_their_operations():
    crops = Crops(
        boxes=np.array([[4, 8, 100, 200]], np.uint16), flip=np.array([True]), operations=np.ones((1, 3), np.uint16)
    )
    found = reduced_crops(crops, 4, 200, 200)
    assert found.boxes.tolist() == [[1, 2, 25, 50]] and found.operations is crops.operations
