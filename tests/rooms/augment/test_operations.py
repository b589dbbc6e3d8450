"""Recorded operations: pixels that never change, near those of torchvision's operations of the same names."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from ferkd_data.augment import OPERATIONS, Operations, apply_operations
from ferkd_data.augment.operations import (
    BY_CODE,
    CODES,
    FILL,
    UNIT,
    _histograms,
    _scattered_histograms,
    gaussian_weights,
)
from ferkd_data.errors import UsageError


def picture(side: int = 32, number: int = 0) -> torch.Tensor:
    """Make a smooth picture with some noise from integers alone: uint8 (1, 3, S, S)."""
    y, x = np.mgrid[:side, :side]
    noise = np.random.default_rng(number).integers(0, 40, (3, side, side))
    waves = np.stack([x * 7 + y * 3, (x * y) // 4, 255 - x * 5]) + number * 11
    return torch.from_numpy(((waves + noise) % 256).astype(np.uint8))[None]


def recorded(name: str, value: int = 0, crops: int = 1) -> Operations:
    return Operations(
        codes=np.full((crops, 1), CODES[name], np.uint8),
        values=np.full((crops, 1), value, np.int16),
        erase=np.zeros((crops, 4), np.uint16),
    )


def applied(name: str, value: int = 0, image: torch.Tensor | None = None) -> torch.Tensor:
    images = (picture() if image is None else image).clone()
    apply_operations(images, recorded(name, value))
    return images


VALUES = {
    "shear_x": 1234, "shear_y": -2500, "translate_x": 1100, "translate_y": -777, "rotate": 1730, "brightness": 1350,
    "contrast": 450, "saturation": 1800, "sharpness": 1900, "hue": -730, "posterize": 3, "solarize": 130, "blur": 210,
}  # fmt: skip

GOLDEN = {
    "shear_x": "b1ad6229071d44d9",
    "shear_y": "828028504b439bdc",
    "translate_x": "9cc25752d17580a1",
    "translate_y": "65a07a75f6e6ad2c",
    "rotate": "bec67fc6403e5338",
    "brightness": "6791e8ea5fb24a55",
    "contrast": "42a94d9ccdb8b995",
    "saturation": "4a63fe561afa09c8",
    "sharpness": "a6d175c368550c54",
    "hue": "3874f4a8c9d62b60",
    "posterize": "701b2b8db71bf5d5",
    "solarize": "57b9812659f94e3e",
    "autocontrast": "74952323f3c42ca3",
    "equalize": "670c53650be870f7",
    "invert": "fb0273f347ec68be",
    "grayscale": "69a8c7ceb8a5edcb",
    "blur": "1983bfaff62e3129",
}
"""First digits of the SHA-256 of each operation's result on the same picture."""


@pytest.mark.parametrize("name", list(CODES))
def test_golden_pixels(name):
    pixels = applied(name, VALUES.get(name, 0)).numpy().tobytes()
    assert hashlib.sha256(pixels).hexdigest()[:16] == GOLDEN[name], "this operation gives other pixels than it did"


@pytest.mark.parametrize(
    "name, value, theirs",
    [
        ("brightness", 1300, lambda x: functional.adjust_brightness(x, 1.3)),
        ("contrast", 700, lambda x: functional.adjust_contrast(x, 0.7)),
        ("saturation", 1700, lambda x: functional.adjust_saturation(x, 1.7)),
        ("sharpness", 1900, lambda x: functional.adjust_sharpness(x, 1.9)),
        ("hue", 1000, lambda x: functional.adjust_hue(x, 0.1)),
        ("posterize", 4, lambda x: functional.posterize(x, 4)),
        ("solarize", 100, lambda x: functional.solarize(x, 100)),
        ("autocontrast", 0, functional.autocontrast),
        ("equalize", 0, functional.equalize),
        ("invert", 0, functional.invert),
        ("grayscale", 0, lambda x: functional.rgb_to_grayscale(x, 3)),
        ("translate_x", 1250, lambda x: functional.affine(x, 0, [4, 0], 1.0, [0, 0], fill=list(FILL))),
        ("translate_y", -1250, lambda x: functional.affine(x, 0, [0, -4], 1.0, [0, 0], fill=list(FILL))),
        ("blur", 400, lambda x: functional.gaussian_blur(x, [9, 9], [400 * 32 / UNIT] * 2)),
    ],
)
def test_within_one_level_of_torchvision(name, value, theirs):
    ours = applied(name, value).int()
    assert (ours - theirs(picture()).int()).abs().max() <= 1


@pytest.mark.parametrize("degrees", [-135, -17, 3, 90])
def test_a_rotation_is_torchvisions_up_to_ties(degrees):
    image = picture(64)
    theirs = functional.rotate(image, degrees, fill=list(FILL))
    assert (applied("rotate", degrees * 100, image) != theirs).float().mean() < 0.02


@pytest.mark.parametrize("share", [-0.31, 0.07, 0.2503])
def test_a_shear_is_torchvisions_up_to_ties(share):
    image = picture(64)
    degrees = math.degrees(math.atan(share))
    theirs = functional.affine(image, 0, [0, 0], 1.0, [degrees, 0.0], fill=list(FILL), center=[0, 0])
    assert (applied("shear_x", round(share * UNIT), image) != theirs).float().mean() < 0.02


@given(st.data())
def test_crops_given_together_get_what_each_gets_alone(data):
    count, slots = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3))
    chosen = data.draw(st.lists(st.sampled_from([0, *BY_CODE]), min_size=count * slots, max_size=count * slots))
    values = [data.draw(st.integers(*BY_CODE[code].values)) if code else 0 for code in chosen]
    halves = st.integers(0, 32768)
    erase = data.draw(st.lists(st.tuples(halves, halves, halves, halves), min_size=count, max_size=count))
    operations = Operations(
        codes=np.array(chosen, np.uint8).reshape(count, slots),
        values=np.array(values, np.int16).reshape(count, slots),
        erase=np.array(erase, np.uint16).reshape(count, 4),
    )
    images = torch.cat([picture(12, number) for number in range(count)])
    alone = images.clone()
    for row in range(count):
        apply_operations(alone[row : row + 1], operations[row : row + 1])
    apply_operations(images, operations)
    assert torch.equal(images, alone)


@pytest.mark.parametrize("operation", BY_CODE.values(), ids=lambda operation: operation.name)
@pytest.mark.parametrize("side", [1, 2, 5, 33])
def test_a_group_of_crops_gets_what_each_gets_alone(operation, side):
    """A GPU gets all crops of an operation in one call, a CPU one by one."""
    low, high = operation.values
    values = np.array(sorted({low, high, (2 * low + high) // 3, (low + 2 * high) // 3}))
    images = torch.cat([picture(side, number) for number in range(len(values))])
    alone = [operation.apply(image[None], value[None]) for image, value in zip(images, values, strict=True)]
    assert torch.equal(operation.apply(images, values), torch.cat(alone))


def test_a_gpu_counts_the_same_histograms():
    channels = torch.cat([picture(9, number)[0].flatten(1) for number in range(4)])
    assert torch.equal(_scattered_histograms(channels), _histograms(channels))


NEUTRAL = {
    "brightness": 1000, "contrast": 1000, "saturation": 1000, "sharpness": 1000, "hue": 0, "rotate": 0, "shear_x": 0,
    "translate_y": 0, "posterize": 8, "solarize": 256, "blur": 0,
}  # fmt: skip


@pytest.mark.parametrize("name, neutral", NEUTRAL.items())
def test_a_neutral_value_changes_nothing(name, neutral):
    assert torch.equal(applied(name, neutral), picture())


def test_channels_last_memory_gives_the_same():
    image = picture(24).contiguous(memory_format=torch.channels_last)
    for name in CODES:
        assert torch.equal(applied(name, VALUES.get(name, 0), image), applied(name, VALUES.get(name, 0), picture(24)))


def test_an_erased_box_covers_its_pixels_at_every_size():
    for side in (8, 224, 333):
        images = torch.zeros((1, 3, side, side), dtype=torch.uint8)
        box = np.array([[16384, 32768, 32768, 16384]], np.uint16)
        none = np.zeros((1, 0))
        apply_operations(images, Operations(codes=none.astype(np.uint8), values=none.astype(np.int16), erase=box))
        covered = (images[0, 0] != 0).nonzero()
        top, left = (side * 16384 + 32768) >> 16, (side * 32768 + 32768) >> 16
        assert covered.min(dim=0).values.tolist() == [top, left]
        assert (images[0, 0] != 0).sum() / side**2 == pytest.approx(0.125, abs=0.02)


@given(st.floats(0.05, 60))
def test_blur_weights_add_up(sigma):
    weights = gaussian_weights(sigma)
    assert weights[0] + 2 * sum(weights[1:]) == 65536 and min(weights) >= 0
    # The largest sum fits into 32 bits, and is exact.
    assert 255 * 65536 < 2**31


@pytest.mark.parametrize("name, value", [("posterize", 0), ("solarize", 257), ("rotate", 18001), ("hue", -5001)])
def test_a_value_outside_the_list_is_an_error(name, value):
    with pytest.raises(UsageError, match=name):
        apply_operations(picture(), recorded(name, value))


def test_an_unknown_code_is_an_error():
    operations = Operations(
        codes=np.array([[99]], np.uint8), values=np.zeros((1, 1), np.int16), erase=np.zeros((1, 4), np.uint16)
    )
    with pytest.raises(UsageError, match="operation 99"):
        apply_operations(picture(), operations)


def test_codes_are_what_they_were():
    """Label sets store these numbers."""
    assert [(operation.code, operation.name) for operation in OPERATIONS] == list(
        enumerate(
            "shear_x shear_y translate_x translate_y rotate brightness contrast saturation sharpness hue posterize "
            "solarize autocontrast equalize invert grayscale blur".split(),
            1,
        )
    )


def standalone():
    path = Path(__file__).parents[3] / "examples/standalone_operations.py"
    spec = importlib.util.spec_from_file_location("standalone_operations", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list(CODES))
def test_a_reader_written_from_the_text_gets_the_same(name):
    reader = standalone()
    low, high = BY_CODE[CODES[name]].values
    rng = np.random.default_rng(CODES[name])
    for value in {low, high, *rng.integers(low, high + 1, 4).tolist()} if name != "blur" else {0, 90, 333}:
        for side in (11, 16):
            image = picture(side, number=value % 7)
            theirs = reader.apply(image[0].permute(1, 2, 0).numpy(), [CODES[name]], [value], [0, 0, 0, 0])
            assert np.array_equal(applied(name, value, image)[0].permute(1, 2, 0).numpy(), theirs), value


def test_a_reader_written_from_the_text_applies_several_in_order():
    reader = standalone()
    codes, values = [CODES["rotate"], 0, CODES["contrast"], CODES["equalize"]], [1200, 0, 1700, 0]
    erase = [10000, 20000, 30000, 8000]
    image = picture(24, 3)
    theirs = reader.apply(image[0].permute(1, 2, 0).numpy(), codes, values, erase)
    operations = Operations(
        codes=np.array([codes], np.uint8), values=np.array([values], np.int16), erase=np.array([erase], np.uint16)
    )
    assert np.array_equal(Operations.unpack(operations.pack()).values, operations.values)
    apply_operations(image, operations)
    assert np.array_equal(image[0].permute(1, 2, 0).numpy(), theirs)
