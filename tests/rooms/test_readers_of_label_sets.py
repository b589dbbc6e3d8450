"""Readers hold readers: an ensemble, a selection and a class map on top of each other show the same rows either way."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import ferkd_data as fd
from ferkd_data.errors import ShardError
from ferkd_data.labels.statistics import add, shard_statistics


def rows(labels):
    return {row.key: row for row in labels}


def test_a_view_of_an_ensemble_is_the_ensemble_of_views(label_set):
    both = fd.open_labels([label_set, label_set], weights=[2, 1])
    chosen = both.select(rows=range(3, 17)).map_classes({number: number % 2 for number in range(10)})
    one = fd.open_labels(label_set).select(rows=range(3, 17)).map_classes({n: n % 2 for n in range(10)})
    assert list(chosen.keys()) == list(one.keys()) and len(chosen) == 14
    for key, row in rows(chosen).items():
        np.testing.assert_allclose(row.class_prob.astype("f4"), rows(one)[key].class_prob.astype("f4"), atol=2**-10)


def test_an_ensemble_and_views_count_their_crops(label_set):
    opened = fd.open_labels(label_set)
    both = fd.open_labels([label_set, label_set])
    assert both.statistics.crops == opened.statistics.crops == 20 * opened.num_crops
    part = both.select(rows=[0, 19])
    assert part.statistics == add(map(shard_statistics, part.shards()))
    assert part.statistics.crops == 2 * opened.num_crops


@pytest.mark.parametrize("make", [lambda one: one, lambda one: one.select(rows=[0, 9]), lambda one: one.unmapped])
def test_a_label_set_survives_pickling_and_keeps_its_identity(label_set, make):
    labels = make(fd.open_labels(label_set))
    labels[0]
    copy = pickle.loads(pickle.dumps(labels))
    assert copy.identity == labels.identity and list(copy.keys()) == list(labels.keys())
    assert repr(copy) == repr(labels)


def test_sizes_are_checked_of_what_is_shown_in_every_set(label_set, tmp_path):
    import shutil

    copy = shutil.copytree(label_set, tmp_path / "copy")
    last = fd.open_labels(copy).manifest.shards[-1].files[0].path
    (copy / last).write_bytes(b"cut")
    both = fd.open_labels([label_set, copy])
    both.select(rows=[0]).check_sizes()
    for labels in (both, fd.open_labels(copy)):
        with pytest.raises(ShardError, match="3 bytes, the manifest says"):
            labels.check_sizes()
