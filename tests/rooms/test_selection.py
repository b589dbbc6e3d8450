"""Views of a label set: some of its images."""

from __future__ import annotations

import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from label_sets import same_labels

import ferkd_data as fd
from ferkd_data.errors import LabelSetError, UsageError
from ferkd_data.label_set import selection
from ferkd_data.label_set.views import SelectionReader
from ferkd_data.labels.rows import ShardLabels


def rows_of(labels):
    """Every row as it is shown, by key."""
    return {row.key: ShardLabels.from_rows([row]) for row in labels}


def same_as_whole(view, whole):
    """Whether a view shows just the rows of the whole that have its keys, whichever way it is read."""
    keys, every = list(view.keys()), rows_of(whole)
    position = {key: row for row, key in enumerate(whole.keys())}
    assert keys == sorted(keys, key=position.__getitem__) and len(view) == len(keys)
    assert list(rows_of(view)) == keys
    for row, key in enumerate(keys):
        assert same_labels(ShardLabels.from_rows([view[row]]), every[key])
        assert same_labels(ShardLabels.from_rows([view[key]]), every[key])
    outside = [key for key in every if key not in set(keys)]
    assert all(key in view for key in keys) and not any(key in view for key in outside)
    shards = list(view.shards())
    assert sum(map(len, shards)) == len(view) and view.statistics.crops == len(view) * view.num_crops
    targets = np.concatenate([view.targets_of(entry.index) for entry in view.filled_shards()])
    assert targets.tolist() == [row.target for row in view]
    return True


@pytest.fixture(params=["parquet", "webdataset", "ensemble", "fewer crops"])
def labels(request, label_set, tar_label_set):
    return {
        "parquet": lambda: fd.open_labels(label_set),
        "webdataset": lambda: fd.open_labels(tar_label_set),
        "ensemble": lambda: fd.open_labels([label_set, label_set], weights=[1, 2]),
        "fewer crops": lambda: fd.open_labels(label_set, crops=5),
    }[request.param]()


def test_a_view_shows_the_rows_that_were_asked_for(labels):
    keys = list(labels.keys())
    assert same_as_whole(labels.select(rows=[19, 3, 4]), labels)
    assert list(labels.select(rows=[19, 3, 4]).keys()) == [keys[3], keys[4], keys[19]]
    assert list(labels.select(rows=slice(5, 20, 7)).keys()) == keys[5::7]
    assert list(labels.select(rows=(row for row in (1, 2))).keys()) == keys[1:3]
    assert list(labels.select(rows=7).keys()) == keys[7:8]
    mask = np.arange(20) % 3 == 0
    for kind in (np.asarray, torch.from_numpy, np.ndarray.tolist):
        assert list(labels.select(rows=kind(mask)).keys()) == keys[::3]
        assert list(labels.select(rows=kind(np.array([3, 5]))).keys()) == [keys[3], keys[5]]
    assert same_as_whole(labels.select(keys=keys[9:12]), labels)
    assert list(labels.select(keys=iter(keys[9:12])).keys()) == keys[9:12]
    assert list(labels.select(keys=keys[2]).keys()) == [keys[2]]
    assert list(labels.select(keys=np.array(keys[2:4])).keys()) == keys[2:4]


def test_classes_by_number_and_by_name(labels):
    assert {row.target for row in labels.select(classes=[3, 7])} == {3, 7}
    assert len(labels.select(classes=[3, 7])) == 4
    assert {row.target for row in labels.select(classes="class4")} == {4}
    assert {row.target for row in labels.select(classes=["class4", 5])} == {4, 5}
    for numbers in (np.array([2]), torch.tensor([2]), {2}, {2: "two"}.keys(), np.array(["class2"]), torch.tensor(2)):
        assert {row.target for row in labels.select(classes=numbers)} == {2}
    assert same_as_whole(labels.select(classes=range(3)), labels)


def test_the_numbers_of_an_evaluation_set(labels):
    """Its folders may be fewer, and in another order."""
    names = labels.class_names
    assert labels.class_numbers([names[7], names[2], 3]).tolist() == [7, 2, 3]
    mapped = labels.map_classes({names[7]: "a", names[2]: "b"})
    assert mapped.class_numbers(["b", "a"]).tolist() == [1, 0]
    # The folders are those of the old classes.
    assert labels.class_folders and mapped.class_folders is None
    with pytest.raises(UsageError, match="1 of 1 classes are unknown: 'nobody'"):
        labels.class_numbers("nobody")


def test_a_predicate_is_asked_shard_by_shard(labels):
    seen = []

    def certain(shard):
        seen.append(len(shard))
        assert shard.boxes.shape == (len(shard), labels.num_crops, 4)
        return shard.class_prob[..., 0].astype(float).max(axis=1) > 0.8

    view = labels.select(where=certain)
    assert seen == [8, 8, 4] and 0 < len(view) < 20
    expected = [row.key for row in labels if row.class_prob[:, 0].astype(float).max() > 0.8]
    assert list(view.keys()) == expected


def test_criteria_narrow_each_other_and_selections_chain(labels):
    shards = []
    view = labels.select(rows=range(8), classes=[0, 1, 2, 3], where=lambda s: shards.append(1) or s.target > 0)
    assert {row.target for row in view} == {1, 2, 3} and len(shards) == 1
    chained = labels.select(rows=range(8)).select(classes=[0, 1, 2, 3]).select(where=lambda s: s.target > 0)
    assert chained.identity == view.identity and list(chained.keys()) == list(view.keys())
    assert same_as_whole(chained, labels)


def test_the_identity_follows_the_rows(labels):
    some, others = labels.select(rows=[1, 2]), labels.select(rows=[1, 3])
    assert len({labels.identity, some.identity, others.identity}) == 3
    assert some.identity == labels.select(rows=[2, 1]).identity
    assert labels.select(rows=slice(None)) is labels
    assert some.select(rows=slice(None)) is some
    copy = pickle.loads(pickle.dumps(some))
    assert copy.identity == some.identity and list(copy.keys()) == list(some.keys())


def test_a_view_says_what_it_is(labels):
    assert repr(labels.select(rows=[1, 2])).startswith("<2 of ")


@pytest.mark.parametrize(
    ("criteria", "match"),
    [
        ({}, "needs at least one of"),
        ({"keys": ["nobody", "class0/photo0000"]}, r"1 of 2 keys are unknown: 'nobody'; keys look like 'class0/"),
        ({"keys": [f"x{i}" for i in range(9)]}, r"9 of 9 keys are unknown: 'x0', .*'x4', \.\.\.;"),
        ({"keys": []}, "no image of 20 is selected by keys="),
        ({"classes": []}, "no image of 20 is selected by classes="),
        ({"classes": [10]}, r"1 of 1 classes are unknown: 10; classes are 0\.\.9, with names such as 'class0'"),
        ({"classes": [-1]}, "unknown: -1"),
        ({"classes": [True]}, "unknown: True"),
        ({"classes": ["dog", "cat"]}, "2 of 2 classes are unknown: 'dog', 'cat'"),
        ({"rows": []}, "no image of 20 is selected by rows="),
        ({"rows": [20]}, "row 20 of 20 does not exist"),
        ({"rows": [-1]}, "row -1 of 20 does not exist"),
        ({"rows": [1, 1]}, "names a row twice"),
        ({"rows": [0.5]}, "rows must be row numbers"),
        ({"rows": [[1], [2]]}, "rows must be row numbers"),
        ({"rows": np.ones(19, bool)}, "a mask of rows has one entry for each of 20"),
        ({"where": lambda s: np.ones(3, bool)}, r"one bool for each image: shape \(8,\) for shard 0; got bool"),
        ({"where": lambda s: s.target}, "got int32 of shape"),
        ({"where": lambda s: s.target < 0}, "no image of 20 is selected by where="),
        ({"where": 3}, "where must be a function"),
        ({"classes": [0], "rows": [19]}, "selected by classes= and rows="),
    ],
)
def test_what_cannot_be_selected(label_set, criteria, match):
    labels = fd.open_labels(label_set)
    with pytest.raises(UsageError, match=match):
        labels.select(**criteria)


def test_a_name_that_two_classes_have(label_set):
    labels = fd.open_labels(label_set)
    names = ("crane", "crane", *labels.class_names[2:])
    twice = fd.LabelSet(replace(labels.reader, manifest=labels.manifest.model_copy(update={"class_names": names})))
    with pytest.raises(UsageError, match="'crane' is the name of classes 0, 1; give their numbers"):
        twice.select(classes="crane")
    assert {row.target for row in twice.select(classes=[1])} == {1}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chain_of_selections_is_the_selection_of_what_is_left(label_set, data):
    labels = fd.open_labels(label_set)
    view, keys = labels, list(labels.keys())
    for _ in range(data.draw(st.integers(1, 3))):
        rows = data.draw(st.lists(st.integers(0, len(keys) - 1), min_size=1, unique=True))
        view, keys = view.select(rows=rows), [keys[row] for row in sorted(rows)]
    assert list(view.keys()) == keys and len(view) == len(keys)
    assert view.identity == (labels.select(keys=keys)).identity
    assert np.array_equal(view.key_hashes(), labels.select(keys=keys).key_hashes())
    bounds = [view.position(row) for row in range(len(view))]
    assert [view.keys_of(shard)[row] for shard, row in bounds] == keys


def test_a_split_is_two_disjoint_views_that_stay(labels):
    train, held_out = labels.split(0.3, seed=5)
    keys = [*train.keys(), *held_out.keys()]
    assert sorted(keys) == sorted(labels.keys()) and len(train) + len(held_out) == len(labels)
    again = labels.split(0.3, seed=5)
    assert [view.identity for view in again] == [train.identity, held_out.identity]
    assert list(labels.split(0.3, seed=6)[1].keys()) != list(held_out.keys())
    # With fewer images, or other images beside it, each key keeps its side.
    part = labels.select(rows=range(3, 17))
    inside = set(part.split(0.3, seed=5)[1].keys())
    assert inside == set(held_out.keys()) & set(part.keys())
    # A larger share holds the smaller one.
    assert set(held_out.keys()) < set(labels.split(0.6, seed=5)[1].keys())


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, "a", None, float("nan")])
def test_a_split_that_cannot_be(label_set, share):
    with pytest.raises(UsageError, match="the share of a split must be a number between 0 and 1"):
        fd.open_labels(label_set).split(share)


def test_a_split_that_leaves_a_side_empty_and_a_seed_that_is_none(label_set):
    labels = fd.open_labels(label_set)
    with pytest.raises(UsageError, match="leaves one side empty"):
        labels.split(0.001)
    with pytest.raises(UsageError, match="the seed of a split must be a whole number"):
        labels.split(0.5, seed=0.5)


class Keys:
    """As much of a large label set as a split needs."""

    location, first_row = "large", None

    def __init__(self, num):
        self._num = num

    def __len__(self):
        return self._num

    def key_hashes(self):
        return np.random.default_rng(0).integers(0, 2**63, self._num, dtype=np.uint64)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_split_has_the_share_that_was_asked_for(share):
    most, rest = selection.split_rows(Keys(200_000), share, 3)
    assert len(most) + len(rest) == 200_000
    # Five standard deviations of a binomial.
    assert abs(len(rest) - 200_000 * share) < 5 * (200_000 * share * (1 - share)) ** 0.5


def test_a_view_takes_eight_bytes_an_image(label_set):
    """Besides the manifest."""
    labels = fd.open_labels(label_set)
    shards = [
        entry.model_copy(update={"rows": rows})
        for entry, rows in zip(labels.manifest.shards, (400_000, 400_000, 200_000), strict=True)
    ]
    manifest = labels.manifest.model_copy(update={"num_images": 10**6, "shards": tuple(shards)})
    large = replace(labels.reader, manifest=manifest)
    rows = np.arange(0, 10**6, 2)
    tracemalloc.start()
    view = fd.LabelSet(SelectionReader(large, rows))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(view) == 500_000 and used < rows.nbytes / 4
    assert [entry.rows for entry in view.manifest.shards] == [200_000, 200_000, 100_000]


def test_labels_of_another_host_fetch_only_the_shards_that_are_selected(label_set, tmp_path):
    """Here, files that are not there stand for those that were not fetched."""
    import shutil

    copy = shutil.copytree(label_set, tmp_path / "copy")
    labels = fd.open_labels(copy)
    view = labels.select(rows=[9, 10])
    for path in copy.glob("labels/*.parquet"):
        if not path.name.startswith("00001-"):
            path.unlink()
    assert [row.key for row in view] == list(view.keys()) and len(view) == 2
    with pytest.raises(LabelSetError):
        list(labels.keys())
