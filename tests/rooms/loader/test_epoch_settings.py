"""Settings that are functions of the epoch, and epochs of crops: what each epoch has, its length, resume, ranks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ferkd_data as fd
from ferkd_data.errors import StateMismatchError, UsageError
from ferkd_data.loader.epochs import epoch_settings
from ferkd_data.loader.settings import LoaderSettings


def grow(epoch):
    """Progressive resizing."""
    return 16 + 8 * min(epoch, 3)


def more(epoch):
    return 2 if epoch < 2 else 4


def fewer(epoch):
    return (4, 2, 1, 2)[epoch % 4]


@pytest.fixture
def make(label_set, photos, tmp_path):
    def make_(**changes):
        settings = {"batch_size": 4, "crops_per_image": 2, "size": 16, "calibration": "fkd", "images": photos}
        return fd.CropLoader(fd.open_labels(label_set), **(settings | {"cache_dir": tmp_path / "cache"} | changes))

    return make_


def contents(batches):
    return [(images.clone(), targets.dense().clone(), targets.rows.clone()) for images, targets in batches]


def same(a, b):
    return len(a) == len(b) and all(
        all(torch.equal(x, y) for x, y in zip(one, other, strict=True)) for one, other in zip(a, b, strict=True)
    )


def rows_of(batches):
    return Counter(row for _, _, rows in batches for row in rows.tolist())


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_passes_draw_every_crop_of_every_image_one_after_the_other(data):
    """Whatever the functions are: no draw is left out, none comes twice, and each epoch knows what came before it."""
    by_crops = data.draw(st.booleans())
    per_image = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=20))
    num_images = data.draw(st.integers(12, 60))
    given_ = LoaderSettings(
        batch_size=12,
        crops_per_image=lambda epoch: per_image[epoch % len(per_image)],
        epoch="crops" if by_crops else "images",
        drop_last=data.draw(st.booleans()),
    )
    drawn = [0] * num_images
    passes = set()
    for epoch in range(12):
        at = epoch_settings(given_, num_images, epoch)
        passes.add(at.pass_number)
        assert at.first + at.shape.num_images <= num_images
        if at.first == 0:
            # A pass begins, with the M that its first epoch asks for; the one before is over for all images but few.
            assert at.shape.crops_per_image == per_image[epoch % len(per_image)]
            left_out = sum(count != at.drawn for count in drawn)
            assert left_out == 0 or (given_.drop_last and by_crops)
            drawn = [at.drawn] * num_images
        for position in range(at.first, at.first + at.shape.num_images):
            assert drawn[position] == at.drawn, "an image comes once in a pass"
            drawn[position] += at.shape.crops_per_image
        crops = at.shape.num_images * at.shape.crops_per_image
        if by_crops:
            assert abs(crops - num_images) < at.shape.crops_per_image
        else:
            assert at.shape.num_images == num_images and at.pass_number == epoch
    assert passes == set(range(max(passes) + 1))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 5))
def test_epochs_of_crops_are_equally_long(num_images, per_image, number):
    """With drop_last, to the image; and the parts of a pass do not overlap."""
    given_ = LoaderSettings(batch_size=12, crops_per_image=per_image, epoch="crops")
    parts = [epoch_settings(given_, num_images, number * per_image + part) for part in range(per_image)]
    assert {part.shape.num_images for part in parts} == {num_images // per_image}
    assert {part.pass_number for part in parts} == {number} and {part.drawn for part in parts} == {number * per_image}
    seen = [p for part in parts for p in range(part.first, part.first + part.shape.num_images)]
    assert len(seen) == len(set(seen)) >= num_images - per_image + 1
    whole = LoaderSettings(batch_size=12, crops_per_image=per_image, epoch="crops", drop_last=False)
    parts = [epoch_settings(whole, num_images, number * per_image + part) for part in range(per_image)]
    assert sorted(p for q in parts for p in range(q.first, q.first + q.shape.num_images)) == list(range(num_images))


ORDERS = {
    "global": {},
    "shards": {"order": "shards", "shards_together": 2},
    "sequential": {"order": "sequential"},
    "spread": {"spread": True},
    "selfmix": {"selfmix": fd.SelfMix(prob=1.0)},
}


@pytest.mark.parametrize("name", ORDERS)
def test_with_epochs_of_crops_every_image_comes_once_in_m_epochs(make, name):
    loader = make(epoch="crops", **ORDERS[name])
    whole = make(**ORDERS[name])
    assert len(loader) == 5 and len(whole) == 10
    seen, passes = set(), []
    for _ in range(3):
        batches = []
        for _ in range(2):
            epoch = contents(loader)
            assert len(epoch) == len(loader) == 5
            batches += epoch
        counts = rows_of(batches)
        assert counts == dict.fromkeys(range(20), 2)
        passes.append(counts)
        seen |= {crop.numpy().tobytes() for images, _, _ in batches for crop in images}
    if name != "selfmix":
        # 3 passes of 2 out of 10 crops: none of them twice.
        assert len(seen) == 20 * 2 * 3
    if name in ("global", "sequential"):
        # The same images in the same order as with epochs of images: only the ends of epochs lie elsewhere.
        first = make(epoch="crops", **ORDERS[name])
        assert same(contents(first) + contents(first), contents(whole))


def test_two_ranks_have_equally_many_batches_of_disjoint_images(make):
    loaders = [make(epoch="crops", rank=rank, world_size=2, batch_size=2) for rank in (0, 1)]
    for _ in range(4):
        epochs = [contents(loader) for loader in loaders]
        assert len(epochs[0]) == len(epochs[1]) == len(loaders[0]) == 5
        assert not set(rows_of(epochs[0])) & set(rows_of(epochs[1]))


SCHEDULES = {
    "size": {"size": grow},
    "crops": {"crops_per_image": more, "drop_last": False},
    "both": {"size": grow, "crops_per_image": fewer},
    "by crops": {"epoch": "crops", "size": grow},
    "by crops, changing": {"epoch": "crops", "crops_per_image": fewer, "drop_last": False},
    "spread": {"spread": True, "crops_per_image": more, "size": grow},
    "shards": {"order": "shards", "crops_per_image": more},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_after_every_batch_of_every_epoch(make, name):
    changes = SCHEDULES[name]
    loader = make(**changes)
    epochs, states = [], []
    for _ in range(4):
        epochs.append([])
        for images, targets in loader:
            epochs[-1] += contents([(images, targets)])
            states.append((len(epochs) - 1, len(epochs[-1]), loader.state_dict()))
    for epoch, done, state in states:
        second = make(**changes)
        second.load_state_dict(state)
        rest = epochs[epoch][done:]
        if rest:
            assert second.epoch == epoch and same(contents(second), rest)
        if not rest and epoch < 3:
            assert second.epoch == epoch + 1 and same(contents(second), epochs[epoch + 1])


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_number_of_workers_changes_nothing(make, name):
    alone, two = make(**SCHEDULES[name]), make(num_workers=2, **SCHEDULES[name])
    for _ in range(4):
        assert len(alone) == len(two) > 0
        assert same(contents(alone), contents(two))


def test_sizes_and_lengths_follow_the_functions(make):
    loader = make(size=grow, crops_per_image=more)
    for epoch in range(4):
        assert len(loader) == 20 * more(epoch) // 4
        batches = contents(loader)
        assert {images.shape[-1] for images, _, _ in batches} == {grow(epoch)}
        assert rows_of(batches) == dict.fromkeys(range(20), more(epoch))


def test_no_crop_comes_again_before_all_have_come_whatever_the_function(make):
    loader = make(crops_per_image=lambda epoch: (1, 4, 2, 2, 1)[epoch], batch_size=4, order="sequential")
    crops = {}
    for _ in range(5):
        for images, _, rows in contents(loader):
            for row, crop in zip(rows.tolist(), images, strict=True):
                crops.setdefault(row, []).append(crop.numpy().tobytes())
    assert all(len(set(of)) == len(of) == 10 for of in crops.values()) and len(crops) == 20


def test_a_state_of_other_functions_is_refused_where_they_differ(make):
    loader = make(size=grow, crops_per_image=more)
    loader.set_epoch(3)
    state = loader.state_dict()
    make(size=lambda epoch: 40, crops_per_image=lambda epoch: 2 if epoch < 2 else 4).load_state_dict(state)
    for changes, match in [
        ({"size": 16, "crops_per_image": more}, "size: 40 in .* 16|size.*40.*16"),
        ({"size": grow, "crops_per_image": lambda epoch: 4}, "crops drawn before.*8.*12"),
        ({"size": grow, "crops_per_image": lambda epoch: 2}, "crops_per_image.*4.*2"),
        ({"size": grow, "crops_per_image": more, "epoch": "crops"}, "epoch"),
    ]:
        with pytest.raises(StateMismatchError, match=match):
            make(**changes).load_state_dict(state)


def test_a_state_of_another_calibration_is_refused_whatever_its_function_is_called(make):
    def schedule(later, **changes):
        return lambda epoch: fd.Calibration.fkd() if epoch < 2 else fd.Calibration(moderate_hard=later, **changes)

    loader = make(calibration=schedule("blend"))
    loader.set_epoch(1)
    make(calibration=schedule("soften")).load_state_dict(loader.state_dict())
    loader.set_epoch(2)
    state = loader.state_dict()
    make(calibration=schedule("blend")).load_state_dict(state)
    with pytest.raises(StateMismatchError, match=r"moderate_hard: saved 'blend', now 'soften'"):
        make(calibration=schedule("soften")).load_state_dict(state)
    with pytest.raises(StateMismatchError, match=r"temperature: saved 1\.0, now 2\.0"):
        make(calibration=schedule("blend", temperature=2.0)).load_state_dict(state)


def test_states_are_plain_json_and_a_constant_says_nothing_of_functions(make):
    import json

    functions = {"size": grow, "crops_per_image": more, "calibration": lambda epoch: fd.Calibration()}
    for changes in ({}, functions | {"epoch": "crops", "transform": torch.flip}):
        state = make(**changes).state_dict()
        assert json.loads(json.dumps(state)) == state
    constant = make().state_dict()["settings"]
    assert make(size=lambda epoch: 16).state_dict()["settings"] == constant


def test_a_function_that_goes_wrong_later_is_an_error_of_its_epoch(make):
    loader = make(size=lambda epoch: 16 if epoch < 2 else "big")
    for _ in range(2):
        contents(loader)
    with pytest.raises(UsageError, match="size must give a whole number for every epoch; for 2 it gave 'big'"):
        contents(loader)
    loader = make(crops_per_image=lambda epoch: (2, 3)[epoch])
    contents(loader)
    with pytest.raises(UsageError, match="batch_size 4 must be a multiple of crops_per_image 3 in epoch 1"):
        contents(loader)


def test_an_epoch_without_a_batch_is_an_error(make):
    with pytest.raises(UsageError, match="10 images x 2 crops make no batch of 40 for each of 1 ranks in epoch 0"):
        make(epoch="crops", batch_size=40)
    loader = make(crops_per_image=lambda epoch: (40, 1)[epoch], batch_size=40)
    contents(loader)
    with pytest.raises(UsageError, match=r"20 images x 1 crops make no batch of 40 .* in epoch 1"):
        contents(loader)
    with pytest.raises(
        UsageError, match=r'0 images x 30 crops .*; epoch="crops" needs at least crops_per_image images'
    ):
        make(epoch="crops", batch_size=30, crops_per_image=30, drop_last=False)


@pytest.mark.parametrize("close", [True, False])
def test_a_loop_that_asks_for_the_length_once_is_warned_when_epochs_grow(make, close):
    """Lightning and HF Trainer ask before the first epoch, and leave out what a longer epoch has beyond that."""

    def left_after(epoch, steps):
        loader.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(steps):
            next(batches)
        if close:
            batches.close()

    loader = make(crops_per_image=lambda epoch: (1, 2, 1)[epoch])
    steps = len(loader)
    assert steps == 5
    left_after(0, steps)
    with pytest.warns(UserWarning, match="epoch 1 has 10 batches and was left after 5, the length of another epoch"):
        left_after(1, steps)
    # What a user does on purpose: another number of steps, and epochs of one length.
    left_after(1, 4)
    left_after(2, 5)
    loader = make()
    for epoch in (0, 1):
        left_after(epoch, len(loader) - 1)
        left_after(epoch, len(loader))


def test_digests_are_checked_in_the_whole_first_pass(make, photos, tmp_path):
    import shutil

    from ferkd_data.errors import LoaderError

    copy = shutil.copytree(photos, tmp_path / "copy")
    for path in copy.rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + b" ")
    for start in (0, 1):
        loader = make(epoch="crops", images=copy)
        loader.set_epoch(start)
        with pytest.raises(LoaderError, match="digest differs"):
            contents(loader)
    loader = make(epoch="crops", images=copy, verify_images="never")
    assert len(contents(loader)) == 5


def test_a_data_set_takes_a_size_for_each_epoch(label_set, photos, tmp_path):
    dataset = fd.CropDataset(fd.open_labels(label_set), images=photos, size=grow, cache_dir=tmp_path)
    for epoch in (0, 1, 5):
        dataset.set_epoch(epoch)
        assert dataset[3][0].shape == (1, 3, grow(epoch), grow(epoch))


def test_other_sizes_and_numbers_of_crops_need_no_new_workers(make):
    """The functions are defined here, as in a notebook's cell, and with spread a window has another number of crops."""
    sides, numbers = {0: 16, 1: 40, 2: 24}, {0: 2, 1: 4, 2: 1}
    changes = {"size": lambda epoch: sides[epoch], "crops_per_image": lambda epoch: numbers[epoch], "spread": True}
    loader, alone = make(num_workers=2, **changes), make(**changes)
    processes = []
    for epoch in range(3):
        batches = contents(loader)
        assert {images.shape[-1] for images, _, _ in batches} == {sides[epoch]} and same(batches, contents(alone))
        loader._workers.wait()
        processes.append([worker.pid for worker in loader._workers._pool._processes._workers])
    assert len(processes[0]) == 2 and processes[0] == processes[1] == processes[2]
