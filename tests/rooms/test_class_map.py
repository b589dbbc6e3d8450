"""Class maps: the arithmetic against dense distributions, and what users write.

Legend: B crops, k stored classes, C old classes, D new classes.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ferkd_data as fd
from ferkd_data.calibration import calibrate
from ferkd_data.class_map import ClassMap, class_numbers, make_class_map, map_columns
from ferkd_data.errors import UsageError
from ferkd_data.labels.buckets import Thresholds
from ferkd_data.labels.rows import ShardLabels
from ferkd_data.losses import entropy, soft_cross_entropy
from ferkd_data.targets import RECOVERIES, recover

NAMES = ("tabby", "tiger cat", "beagle", "poodle", "lorry")


@st.composite
def stored(draw, max_classes=12, rows=6):
    """class_index and class_prob (B, k) as a build stores them, and C."""
    num_classes = draw(st.integers(2, max_classes))
    top_k = draw(st.integers(1, num_classes))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    prob = random.dirichlet(np.full(num_classes, draw(st.sampled_from([0.05, 0.5, 5.0]))), rows)
    index = np.argsort(-prob, axis=1, kind="stable")[:, :top_k]
    return index.astype(np.uint16), np.take_along_axis(prob, index, axis=1).astype(np.float16), num_classes


@st.composite
def class_maps(draw, num_old):
    num_new = draw(st.integers(1, num_old + 3))
    new = draw(st.lists(st.integers(-1, num_new - 1), min_size=num_old, max_size=num_old))
    if max(new) < 0:
        new[draw(st.integers(0, num_old - 1))] = 0
    return ClassMap(new=np.array(new), num_classes=num_new, names=None)


def dense_recovered(index, prob, num_classes, mode, temperature):
    """Over all old classes, in float64."""
    weight, floor = recover(prob, num_classes=num_classes, mode=mode, temperature=temperature)
    dense = np.repeat(floor[:, None].astype(np.float64), num_classes, axis=1)
    np.add.at(dense, (np.arange(len(index))[:, None], index.astype(np.int64)), weight.astype(np.float64))
    return dense.clip(min=0)


def matrix(class_map):
    """(C, D): 1 where an old class becomes a new one."""
    member = np.zeros((len(class_map.new), class_map.num_classes))
    kept = np.flatnonzero(class_map.new >= 0)
    member[kept, class_map.new[kept]] = 1
    return member


def targets_of(index, prob, num_classes, class_map, **settings):
    calibration = fd.Calibration(**dict.fromkeys(("extreme_hard", "moderate_hard"), "keep"), **settings)
    return calibrate(
        calibration,
        class_index=index,
        class_prob=prob,
        codes=np.full(len(index), 2, np.uint8),
        target=np.full(len(index), -1),
        num_classes=num_classes,
        class_map=class_map,
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data(), mode=st.sampled_from(RECOVERIES), temperature=st.sampled_from([1.0, 0.5, 2.0, 7.0]))
def test_a_mapped_target_is_the_dense_one_mapped_and_rescaled(data, mode, temperature):
    index, prob, num_classes = data.draw(stored())
    class_map = data.draw(class_maps(num_classes))
    targets = targets_of(index, prob, num_classes, class_map, recovery=mode, temperature=temperature)
    mapped = dense_recovered(index, prob, num_classes, mode, temperature) @ matrix(class_map)
    mass = mapped.sum(axis=1)
    # Where the class that `hard` and `label_smoothing` look at is dropped, they look at the next one instead.
    looks_elsewhere = mode in ("hard", "label_smoothing") and (class_map.new[index[:, 0]] < 0)
    sure = (mass > 1e-4) & ~np.asarray(looks_elsewhere)
    expected = mapped[sure] / mass[sure][:, None]
    assert targets.num_classes == class_map.num_classes
    np.testing.assert_allclose(targets.dense().numpy()[sure], expected, atol=2e-5)
    np.testing.assert_allclose(targets.total().numpy(), 1, atol=2e-5)
    assert torch.isfinite(targets.dense()).all()


@settings(max_examples=100, deadline=None)
@given(data=st.data(), mode=st.sampled_from(["hard", "label_smoothing"]))
def test_the_first_class_that_is_kept_stands_for_one_that_is_dropped(data, mode):
    index, prob, num_classes = data.draw(stored())
    class_map = data.draw(class_maps(num_classes))
    kept = class_map.new[index] >= 0
    rows = np.flatnonzero(kept.any(axis=1))
    if not len(rows):
        return
    first = kept.argmax(axis=1)[rows]
    moved_index, moved_prob = index[rows].copy(), prob[rows].copy()
    at = np.arange(len(rows))
    for moved in (moved_index, moved_prob):
        moved[at, first], moved[at, 0] = moved[at, 0].copy(), moved[at, first].copy()
    mapped = dense_recovered(moved_index, moved_prob, num_classes, mode, 1.0) @ matrix(class_map)
    mass = mapped.sum(axis=1)
    found = targets_of(index, prob, num_classes, class_map, recovery=mode).dense().numpy()[rows]
    sure = mass > 1e-4
    np.testing.assert_allclose(found[sure], mapped[sure] / mass[sure][:, None], atol=2e-5)
    if mode == "hard":
        assert (found.argmax(axis=1) == class_map.new[moved_index[:, 0]]).all() and (found.max(axis=1) == 1).all()


def test_a_target_with_nothing_on_the_kept_classes_is_even_over_them():
    """Top-2 of all mass on a class that is dropped; three old classes are kept, two of which become one."""
    class_map = ClassMap(new=np.array([-1, 0, 1, 1, -1]), num_classes=3, names=None)
    index, prob = np.array([[0, 4]], np.uint16), np.array([[1.0, 0.0]], np.float16)
    for mode in RECOVERIES:
        targets = targets_of(index, prob, 5, class_map, recovery=mode)
        np.testing.assert_allclose(targets.dense().numpy(), [[1 / 3, 2 / 3, 0]], atol=1e-6)


def test_worked_by_hand():
    """q = .5 .2 and the missing .3 on three others; 'lorry' is dropped, the cats and the dogs become one each."""
    class_map = make_class_map(["cat", "cat", "dog", "dog", None], num_old=5, old_names=NAMES)
    index, prob = np.array([[2, 0]], np.uint16), np.array([[0.5, 0.25]], np.float16)
    targets = targets_of(index, prob, 5, class_map)
    # cat: .25 + .25/3, dog: .5 + .25/3, lorry: .25/3
    cat, dog = 0.25 + 0.25 / 3, 0.5 + 0.25 / 3
    np.testing.assert_allclose(targets.dense().numpy(), [[cat / (cat + dog), dog / (cat + dog)]], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_losses_agree_with_the_dense_target(data):
    """Uneven classes make entries that add up, also negative ones, and as many as there are classes."""
    index, prob, num_classes = data.draw(stored())
    class_map = data.draw(class_maps(num_classes))
    targets = targets_of(index, prob, num_classes, class_map)
    dense = targets.dense().double()
    logits = torch.randn(len(index), class_map.num_classes, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        soft_cross_entropy(logits, targets).double(), -(dense * logits.double().log_softmax(1)).sum(1).mean(),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    torch.testing.assert_close(entropy(targets).double(), torch.special.entr(dense).sum(dim=1), atol=1e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_softened_ground_truth_is_of_the_new_classes(data):
    index, prob, num_classes = data.draw(stored())
    class_map = data.draw(class_maps(num_classes))
    old = np.arange(len(index)) % num_classes
    target = class_map.targets(old)
    targets = calibrate(
        fd.Calibration(moderate_hard="blend", blend_weight=0.25, epsilon=0.1),
        class_index=index,
        class_prob=prob,
        codes=np.ones(len(index), np.uint8),
        target=target,
        num_classes=num_classes,
        class_map=class_map,
    )
    soft = targets_of(index, prob, num_classes, class_map).dense().numpy()
    size = class_map.num_classes
    truth = np.full((len(index), size), 0.1 / max(size - 1, 1))
    known = np.flatnonzero(target >= 0)
    truth[known, target[known]] = 0.9 if size > 1 else 1
    expected = soft.copy()
    expected[known] = 0.25 * soft[known] + 0.75 * truth[known]
    np.testing.assert_allclose(targets.dense().numpy(), expected, atol=1e-5)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_columns_hold_what_the_teacher_gave_to_the_new_classes(data):
    index, prob, num_classes = data.draw(stored())
    class_map = data.draw(class_maps(num_classes))
    truth = np.random.default_rng(3).integers(-1, num_classes, len(index))
    target_prob = np.where(truth < 0, np.nan, 0.0)[:, None].astype(np.float16)
    for row in np.flatnonzero(truth >= 0):
        place = np.flatnonzero(index[row] == truth[row])
        target_prob[row] = prob[row, place[0]] if len(place) else np.float16(0.001)
    columns = {
        "class_index": index[:, None],
        "class_prob": prob[:, None],
        "target": truth.astype(np.int32),
        "target_prob": target_prob,
        "bucket": np.zeros((len(index), 1), np.uint8),
    }
    mapped = map_columns(class_map, columns, Thresholds())
    new_index, new_prob = mapped["class_index"][:, 0].astype(int), mapped["class_prob"][:, 0]
    assert new_index.shape[1] == min(index.shape[1], class_map.num_classes)
    dense = np.zeros((len(index), num_classes))
    np.put_along_axis(dense, index.astype(np.int64), prob.astype(np.float64), axis=1)
    expected = dense @ matrix(class_map)
    for row in range(len(index)):
        assert len(set(new_index[row])) == new_index.shape[1]
        assert (np.diff(new_prob[row].astype(float)) <= 0).all()
        np.testing.assert_allclose(new_prob[row], expected[row, new_index[row]], atol=1e-3)
        assert expected[row].sum() == pytest.approx(new_prob[row].astype(float).sum(), abs=5e-3)
        target = class_map.new[truth[row]] if truth[row] >= 0 else -1
        assert mapped["target"][row] == target
        said = mapped["target_prob"][row, 0]
        if target < 0:
            assert np.isnan(said)
        else:
            outside = 0 if truth[row] in index[row] else 0.001
            assert float(said) == pytest.approx(expected[row, target] + outside, abs=2e-3)


def test_buckets_follow_the_new_classes():
    """Two cats of 0.5 each are one certain cat; a certain lorry, which is dropped, is nothing the map knows."""
    class_map = make_class_map({"tabby": "cat", "tiger cat": "cat"}, num_old=5, old_names=NAMES)
    columns = {
        "class_index": np.array([[[0, 1], [4, 0]]], np.uint16),
        "class_prob": np.array([[[0.5, 0.48], [0.98, 0.01]]], np.float16),
        "target": np.array([1], np.int32),
        "target_prob": np.array([[0.48, 0.005]], np.float16),
        "bucket": np.array([[2, 3]], np.uint8),
    }
    mapped = map_columns(class_map, columns, Thresholds())
    assert mapped["bucket"].tolist() == [[3, 0]]
    assert mapped["target_prob"][0].tolist() == pytest.approx([0.98, 0.015], abs=1e-3)
    renamed = make_class_map([4, 3, 2, 1, 0], num_old=5, old_names=NAMES)
    assert map_columns(renamed, columns, Thresholds())["bucket"].tolist() == [[2, 3]]


FORMS = {
    "dict of numbers": ({0: 1, 3: 0}, [1, -1, -1, 0, -1], 2, ("poodle", "tabby")),
    "dict of names": ({"beagle": 0, "poodle": 0, 4: 1}, [-1, -1, 0, 0, 1], 2, ("beagle / poodle", "lorry")),
    "dict to names": ({"beagle": "dog", "tabby": "cat", "poodle": "dog"}, [1, -1, 0, 0, -1], 2, ("dog", "cat")),
    "dict with None": ({"beagle": 0, "tabby": None}, [-1, -1, 0, -1, -1], 1, ("beagle",)),
    "list of numbers": ([0, 0, 1, 1, -1], [0, 0, 1, 1, -1], 2, ("tabby / tiger cat", "beagle / poodle")),
    "array": (np.array([0, 0, 1, 1, -1]), [0, 0, 1, 1, -1], 2, ("tabby / tiger cat", "beagle / poodle")),
    "tensor": (torch.tensor([0, 0, 1, 1, -1]), [0, 0, 1, 1, -1], 2, ("tabby / tiger cat", "beagle / poodle")),
    "list of new names": (["cat", "cat", "dog", "dog", None], [0, 0, 1, 1, -1], 2, ("cat", "dog")),
    "some new names": (
        ["tabby", "tiger", "beagle", "dog", "lorry"],
        [0, 1, 2, 3, 4],
        5,
        (
            "tabby",
            "tiger",
            "beagle",
            "dog",
            "lorry",
        ),
    ),
    "names to keep": (["poodle", "tabby"], [1, -1, -1, 0, -1], 2, ("poodle", "tabby")),
    "all names in another order": (list(NAMES[::-1]), [4, 3, 2, 1, 0], 5, NAMES[::-1]),
    "gaps": ({0: 3}, [3, -1, -1, -1, -1], 4, ("class 0", "class 1", "class 2", "tabby")),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_class_map(form):
    given_, new, num_classes, names = FORMS[form]
    class_map = make_class_map(given_, num_old=5, old_names=NAMES)
    assert class_map.new.tolist() == new and class_map.num_classes == num_classes and class_map.names == names


def test_more_classes_than_are_used_and_names_of_ones_own():
    class_map = make_class_map({0: 2}, num_old=5, old_names=None, num_classes=6)
    assert class_map.num_classes == 6 and class_map.names is None
    named = make_class_map([0, 0, 1, 1, 1], num_old=5, old_names=NAMES, names=["cat", "other"])
    assert named.names == ("cat", "other")
    assert make_class_map({"tabby": "cat"}, num_old=5, old_names=NAMES, num_classes=3).names == (
        "cat", "class 1", "class 2",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "more", "match"),
    [
        ({"dog": 0}, {}, r"1 of 1 classes are unknown: 'dog'; classes are 0\.\.4, with names such as 'tabby'"),
        ({9: 0}, {}, "unknown: 9"),
        ({0: 1, "tabby": 1}, {}, "names an old class twice"),
        ({0: -5}, {}, "a new class is a number from 0, a name, or None"),
        ({0: 1.5}, {}, r"got 1\.5"),
        ({0: True}, {}, "got True"),
        ({0: "cat", 1: 1}, {}, "all numbers or all names"),
        ({0: None}, {}, "drops every class"),
        ({}, {}, "drops every class"),
        ([], {}, "one new class .or None. for each of the 5 old ones, got 0"),
        ([0, 1], {}, "for each of the 5 old ones, got 2; a dict"),
        (["tabby", "wolf"], {}, "1 of 2 classes are unknown: 'wolf'"),
        # One misspelt: as new names of all classes, every label would be another class's.
        (["lorry", "poodle", "beagles", "tiger cat", "tabby"], {}, "'beagles' is none of them, or .* but 'lorry'"),
        (["tabby", "tiger", "beagle", "lorry", "poodle"], {}, r"'tiger' is none of them.*than number 3; give a dict"),
        ("tabby", {}, "a class map is a dict, a list"),
        ({0: 5}, {"num_classes": 5}, "num_classes must be above 5"),
        ({0: 0}, {"names": ["a", "b"], "num_classes": 1}, "1 new classes have 2 names"),
        ({0: 2**40}, {}, "a new class is a number from 0"),
    ],
)
def test_what_is_no_class_map(classes, more, match):
    with pytest.raises(UsageError, match=match):
        make_class_map(classes, num_old=5, old_names=NAMES, **more)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_map_after_another_is_one_map(data):
    first = data.draw(class_maps(7))
    second = data.draw(class_maps(first.num_classes))
    try:
        both = first.then(second)
    except UsageError:
        assert not (matrix(first) @ matrix(second)).any()
        return
    assert np.array_equal(matrix(both), matrix(first) @ matrix(second))
    target = np.arange(-1, 7)
    assert np.array_equal(both.targets(target), second.targets(first.targets(target)))


@pytest.fixture(params=["parquet", "webdataset"])
def labels(request, label_set, tar_label_set):
    return fd.open_labels(label_set if request.param == "parquet" else tar_label_set)


def test_images_of_dropped_classes_are_left_out_unless_they_are_kept(labels):
    mapped = labels.map_classes({"class1": "odd", "class3": "odd", "class2": "even"})
    assert len(mapped) == 6 and mapped.num_classes == 2 and mapped.class_names == ("odd", "even")
    assert mapped.top_k == 2 and sorted(row.target for row in mapped) == [0, 0, 0, 0, 1, 1]
    every = labels.map_classes({"class1": "odd", "class3": "odd", "class2": "even"}, keep_images=True)
    assert len(every) == 20 and sum(row.target == -1 for row in every) == 14
    assert list(every.select(classes=["odd", "even"]).keys()) == list(mapped.keys())
    assert every.select(classes=["odd", "even"]).identity == mapped.identity
    assert labels.select(classes=[1, 2, 3]).map_classes({1: 0, 3: 0, 2: 1}).identity == mapped.identity


def test_views_of_mapped_labels(labels):
    mapped = labels.map_classes([number // 3 for number in range(10)])
    assert len(mapped) == 20 and mapped.num_classes == 4
    assert mapped.class_names[3] == "class9" and mapped.class_names[0] == "class0 / class1 / class2"
    some = mapped.select(classes="class9")
    assert [row.target for row in some] == [3, 3] and len(some) == 2
    train, held_out = mapped.split(0.4)
    assert set(train.keys()) == set(labels.split(0.4)[0].keys())
    assert len(train) + len(held_out) == 20
    assert mapped.statistics.crops == 200 and mapped.statistics.crops_with_target == 200
    again = mapped.map_classes({0: 0, 3: 0}, keep_images=True)
    assert again.num_classes == 1 and again.unmapped.num_classes == 10 and len(again) == 20
    assert repr(some) == f"<4 classes out of the 10 of {some.unmapped!r}>"
    copy = pickle.loads(pickle.dumps(some))
    assert copy.identity == some.identity and [row.target for row in copy] == [3, 3]
    assert len({labels.identity, mapped.identity, some.identity, again.identity}) == 4
    for shard, block in ((0, 0), (2, 0)):
        own = mapped.block(shard, block)
        assert isinstance(own, ShardLabels) and own.class_index.max() < 4 and own.class_index.dtype == np.uint16


def test_a_map_that_leaves_no_image(labels):
    only = labels.select(classes=[1])
    with pytest.raises(UsageError, match="no image of 2 is of a class that is kept"):
        only.map_classes({2: 0})


@pytest.mark.parametrize("policy", ["soften", "blend", "keep", "thin(0.5)"])
@pytest.mark.parametrize("recovery", RECOVERIES)
def test_targets_of_a_single_class_are_that_class(policy, recovery):
    """Nothing is left over that could take epsilon: the softened ground truth summed to 1 - epsilon."""
    class_map = make_class_map(["pet", "pet", "pet", "pet", None], num_old=5, old_names=NAMES)
    index, prob = np.array([[2, 0], [4, 1]], np.uint16), np.array([[0.5, 0.25], [0.9, 0.05]], np.float16)
    targets = calibrate(
        fd.Calibration(hard_positive=policy, recovery=recovery, blend_weight=0.25, epsilon=0.3),
        class_index=index,
        class_prob=prob,
        codes=np.array([2, 2], np.uint8),
        target=np.array([0, -1]),
        num_classes=5,
        class_map=class_map,
    )
    torch.testing.assert_close(targets.total(), torch.ones(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(targets.dense(), torch.ones(2, 1), atol=1e-6, rtol=0)


IMAGENET = ("tench, Tinca tinca", "crane", "crane, hoist", "goldfish, Carassius auratus")
FOLDERS = ("n01440764", "n02012849", "n03126707", "n01443537")


def number(word, folders=FOLDERS):
    return class_numbers(word, num_classes=4, names=IMAGENET, folders=folders).tolist()


def test_a_synonym_and_a_class_folder_name_a_class():
    assert number("tench") == number("Tinca tinca") == number("n01440764") == number(IMAGENET[0]) == [0]
    assert number(["hoist", "n01443537", 1]) == [2, 3, 1]
    # The whole name comes before a synonym of another class.
    assert number("crane") == [1]
    with pytest.raises(UsageError, match=r"unknown: 'n01440764'"):
        number("n01440764", folders=None)
    with pytest.raises(UsageError, match=r"1 of 2 classes are unknown: 'goldfsh'; did you mean 'goldfish'\?"):
        number(["tench", "goldfsh"])
    both = ("cat, tabby", "dog, tabby")
    with pytest.raises(UsageError, match="'tabby' is the name of classes 0, 1; give their numbers"):
        class_numbers("tabby", num_classes=2, names=both)


def test_synonyms_in_another_order_are_no_new_names():
    """All old classes, by synonyms and in another order: taken as new names, every label would be wrong."""
    names = ["goldfish", "hoist", "tench", "crane"]
    made = make_class_map(names, num_old=4, old_names=IMAGENET)
    assert made.new.tolist() == [2, 3, 1, 0] and made.names == tuple(names)
    with pytest.raises(UsageError, match="may be the old classes in another order, but 'hoit' is none of them"):
        make_class_map(["goldfish", "hoit", "tench", "crane"], num_old=4, old_names=IMAGENET)
    with pytest.raises(UsageError, match="name one of them twice"):
        make_class_map(["tench", "Tinca tinca"], num_old=4, old_names=IMAGENET)
