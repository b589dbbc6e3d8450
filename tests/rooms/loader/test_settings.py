"""`LoaderSettings` refuses what cannot be right, and is what `CropLoader`'s signature says."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields

import numpy as np
import pytest

import ferkd_data as fd
from ferkd_data.errors import UsageError
from ferkd_data.loader.settings import LoaderSettings

NOT_SETTINGS = {"self", "labels", "images", "cache_dir", "verify_labels", "to_batch"}
"""Parameters of `CropLoader` that are not part of `LoaderSettings`."""
COMPLETED = {"crops_per_image", "kinds", "size"}
"""Settings that are None in the signature, since what is not given depends on the labels and on each other."""


def test_the_loaders_signature_is_the_settings():
    flat = {
        name: parameter.default
        for name, parameter in inspect.signature(fd.CropLoader.__init__).parameters.items()
        if name not in NOT_SETTINGS
    }
    settings = {field.name: field.default for field in fields(LoaderSettings)}
    assert flat.keys() == settings.keys()
    for name, default in settings.items():
        default = None if name in COMPLETED else default
        assert flat[name] == (inspect.Parameter.empty if default is MISSING else default), name


def test_numbers_of_any_integer_type_become_plain_ones():
    settings = LoaderSettings(batch_size=np.int64(8), seed=np.uint32(3), spread=np.int32(4))
    assert [type(n) for n in (settings.batch_size, settings.seed, settings.spread)] == [int, int, int]
    assert settings.window_batches_of(4) == 4


@pytest.mark.parametrize(("spread", "batches"), [(False, 1), (True, 8), (1, 1), (5, 5)])
def test_spread_in_batches(spread, batches):
    assert LoaderSettings(batch_size=8, spread=spread).window_batches_of(4) == batches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"crops_per_image": 0}, "crops_per_image must be at least 1, got 0"),
        ({"shards_together": 0}, "shards_together must be at least 1, got 0"),
        ({"seed": 1.5}, r"seed must be a whole number, got 1\.5"),
        ({"spread": 2.0}, r"spread must be a whole number, got 2\.0"),
        ({"spread": 0}, "spread is 0 batches"),
        ({"drop_last": "no"}, "drop_last must be True or False, got 'no'"),
        ({"pin_memory": 1}, "pin_memory must be True or False, got 1"),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip, got 'ignore'"),
        ({"rank": -1, "world_size": 1}, r"rank must be 0\.\.0, got -1"),
        ({"rank": 1}, "rank and world_size go together, got rank=1 and world_size=None"),
        ({"world_size": 2}, "go together, got rank=None and world_size=2"),
        ({"rank": "0", "world_size": 1}, "rank must be a whole number, got '0'"),
        ({"epoch": "all"}, "epoch must be one of images, crops, got 'all'"),
        ({"keys": "yes"}, "keys must be True or False, got 'yes'"),
        ({"transform": 3}, "transform must be a function of a crop"),
        ({"keys": True, "targets": "dense"}, 'keys=True needs targets="soft"'),
        ({"transform": str, "decode_device": "cpu"}, "transform needs crops that workers cut"),
        ({"batch_size": 10, "crops_per_image": 4}, "10 must be a multiple of crops_per_image 4, such as 8 or 12"),
        ({"batch_size": 2, "crops_per_image": 4}, "2 must be a multiple of crops_per_image 4, such as 4"),
        ({"size": (64, 96)}, r"size must be a whole number \(a side in pixels: crops are square\), got \(64, 96\)"),
        ({"size": lambda epoch: 0}, r"size must be 1\.\.8192, got 0 in epoch 0"),
        ({"size": lambda epoch: 1.5}, r"size must give a whole number for every epoch; for 0 it gave 1\.5"),
        ({"crops_per_image": lambda epoch: 3}, "must be a multiple of crops_per_image 3 in epoch 0"),
        ({"crops_per_image": lambda epoch: True}, "for 0 it gave True"),
        ({"crops_per_image": lambda epoch: 0}, "crops_per_image must be at least 1, got 0 in epoch 0"),
        ({"crops_per_image": lambda epoch: 1, "selfmix": fd.SelfMix()}, "crops_per_image is 1 in epoch 0"),
        ({"spread": 2, "crops_per_image": lambda epoch: 4}, "with 4 crops per image in epoch 0, at least that many"),
    ],
)
def test_a_value_that_cannot_be_right(changes, message):
    with pytest.raises(UsageError, match=message):
        LoaderSettings(**({"batch_size": 8} | changes))
