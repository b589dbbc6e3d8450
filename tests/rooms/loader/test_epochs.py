"""Every epoch has `len(loader)` batches, however the loop ends it."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ferkd_data as fd
from ferkd_data.errors import LoaderError, UsageError

EPOCHS = 12
BATCHES = 5


@pytest.fixture(scope="module")
def make(label_set, photos, tmp_path_factory):
    """A loader of 5 batches an epoch."""
    labels, cache = fd.open_labels(label_set), tmp_path_factory.mktemp("cache")

    def make_(**changes):
        given_ = {"batch_size": 8, "crops_per_image": 2, "size": 16, "cache_dir": cache, "calibration": "fkd"}
        return fd.CropLoader(labels, images=photos, **(given_ | changes))

    return make_


def name(batch):
    images, targets = batch
    return hashlib.sha1(images.numpy().tobytes() + targets.dense().numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def known(make):
    """Every batch of the first epochs: name -> (epoch, number)."""
    loader, found = make(), {}
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        found |= {name(batch): (epoch, number) for number, batch in enumerate(loader)}
    assert len(found) == EPOCHS * BATCHES
    return found


def whole(epoch, first=0):
    return [(epoch, number) for number in range(first, BATCHES)]


def to_the_end(loader):
    return list(loader)


def islice(loader):
    return list(itertools.islice(loader, len(loader)))


def zipped_with_a_range(loader):
    return [batch for _, batch in zip(range(len(loader)), loader, strict=False)]


def break_at_the_last_step(loader):
    given_ = []
    for step, batch in enumerate(loader, 1):
        given_.append(batch)
        if step == len(loader):
            break
    return given_


def next_as_often(loader):
    stream = iter(loader)
    return [next(stream) for _ in range(len(loader))]


def one_ahead(loader):
    """As a prefetcher does that knows the length: it asks for the next batch before it gives this one."""
    stream, given_ = iter(loader), []
    ahead = next(stream)
    for step in range(len(loader)):
        given_.append(ahead)
        if step + 1 < len(loader):
            ahead = next(stream)
    return given_


WAYS = [to_the_end, islice, zipped_with_a_range, break_at_the_last_step, next_as_often, one_ahead]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_three_epochs_of_each_way(make, known, way, num_workers):
    loader = make(num_workers=num_workers)
    for epoch in range(3):
        assert [known[name(batch)] for batch in way(loader)] == whole(epoch)
        assert loader.epoch == epoch + 1


def test_the_case_from_the_field(make):
    loader = make(batch_size=4)
    assert [sum(1 for _ in itertools.islice(loader, len(loader))) for _ in range(6)] == [10] * 6


def test_a_state_after_the_last_batch_loads_to_a_whole_epoch(make, known):
    loader = make()
    islice(loader)
    other = make()
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert other.epoch == 1 and [known[name(batch)] for batch in other] == whole(1)


def test_a_state_of_an_older_version_that_stands_at_an_epochs_end(make, known):
    state = make().state_dict()
    state["place"]["images"] = 20
    loader = make()
    loader.load_state_dict(state)
    assert loader.epoch == 1 and [known[name(batch)] for batch in loader] == whole(1)


def test_a_state_that_leaves_no_batch_for_more_ranks(make, known, monkeypatch):
    """Loaded before the process group is there: one rank has a batch left, and four have none."""
    loader = make()
    for _ in itertools.islice(loader, BATCHES - 1):
        pass
    other = make()
    other.load_state_dict(loader.state_dict())
    assert (other.epoch, len(list(other))) == (0, 1)
    other.load_state_dict(loader.state_dict())
    for name_, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 4)):
        monkeypatch.setattr(f"torch.distributed.{name_}", lambda value=value: value)
    assert (other.epoch, len(other)) == (1, 1)
    with pytest.warns(UserWarning, match="leaves no batch of epoch 0 for 4 ranks: epoch 1 begins"):
        assert [known[name(batch)] for batch in other] == [(1, 0)]
    assert other.epoch == 2


def test_a_set_epoch_after_the_last_batch_decides_the_length(make):
    """Also while a loop's name still holds the old iterator."""
    loader = make(crops_per_image=lambda epoch: (1, 2)[min(epoch, 1)])
    stream = iter(loader)
    for _ in range(2):
        next(stream)
        assert len(loader) == 2
    loader.set_epoch(1)
    assert len(loader) == BATCHES
    del stream


def test_a_look_at_one_batch_costs_the_next_epochs_none(make, known):
    """The epoch looked into is over, unless `set_epoch` asks for it again."""
    loader = make()
    assert known[name(next(iter(loader)))] == (0, 0)
    assert [known[name(batch)] for batch in loader] == whole(1)
    assert known[name(next(iter(loader)))] == (2, 0)
    loader.set_epoch(2)
    assert [known[name(batch)] for batch in loader] == whole(2)


def test_set_epoch_does_not_disturb_the_iteration_under_way(make, known):
    loader = make()
    stream = iter(loader)
    given_ = [next(stream), next(stream)]
    loader.set_epoch(7)
    assert loader.state_dict()["place"]["epoch"] == 7
    given_ += list(stream)
    assert [known[name(batch)] for batch in given_] == whole(0)
    assert [known[name(batch)] for batch in loader] == whole(7)


def test_an_iterator_that_has_given_everything_just_ends(make):
    loader = make()
    first = iter(loader)
    list(itertools.islice(first, len(loader)))
    next(iter(loader))
    assert next(first, None) is None


def test_the_next_window_is_that_of_the_next_batch(make, known):
    """Within an epoch, at its end, and after a loop left it early."""
    loader = make()

    def ahead():
        return loader.next_window()[1].epoch, int(loader.next_window()[1].positions[0])

    assert ahead() == (0, 0)
    stream = iter(loader)
    next(stream)
    assert ahead() == (0, 4)
    del stream
    assert ahead() == (1, 0)
    islice(loader)
    assert ahead() == (2, 0) and known[name(next(iter(loader)))] == (2, 0)


def two_then_one(epoch):
    return 2 if epoch % 2 == 0 else 1


@pytest.mark.parametrize("way", WAYS)
def test_epochs_of_different_lengths(make, way):
    """M is 2 and 1 by turns: 5 and 2 batches of 8. A loop counts before it begins, also after it left one early."""
    loader = make(crops_per_image=two_then_one)
    assert [len(way(loader)) for _ in range(4)] == [5, 2, 5, 2]
    stream = iter(loader)
    next(stream)
    assert len(loader) == 5
    del stream
    assert len(loader) == 2 and [len(way(loader)) for _ in range(2)] == [2, 5]
    loader.set_epoch(1)
    assert len(loader) == 2
    next(iter(loader))
    state = loader.state_dict()
    assert len(loader) == 5
    assert [step == len(loader) - 1 for step, _ in enumerate(loader)] == [False] * 4 + [True]
    loader.load_state_dict(state)
    assert len(loader) == 2 and loader.epoch == 1


def test_loading_a_state_ends_the_iteration_under_way(make, known):
    loader = make()
    stream = iter(loader)
    next(stream)
    state = loader.state_dict()
    loader.load_state_dict(state)
    with pytest.raises(LoaderError, match="this iteration ended"):
        next(stream)
    assert [known[name(batch)] for batch in loader] == whole(0, first=1)


def test_nested_loops_over_one_loader_are_refused_in_words(make):
    loader = make()
    with pytest.raises(LoaderError, match="another one over the same loader began"):
        for _ in loader:
            for _ in loader:
                pass


def test_the_first_epoch_after_a_resume_is_checked_too(make, photos, tmp_path):
    """`verify_images` compares digests in the first epoch that this process reads."""
    loader = make()
    next(iter(loader))
    copy = shutil.copytree(photos, tmp_path / "photos")
    for path in copy.rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + b"\0")
    changed = fd.CropLoader(
        loader.labels, images=copy, batch_size=8, crops_per_image=2, size=16, calibration="fkd", cache_dir=tmp_path
    )
    changed.load_state_dict(loader.state_dict())
    with pytest.raises(LoaderError, match="digest differs"):
        next(iter(changed))


@pytest.mark.parametrize(("epoch", "message"), [(-1, "must not be negative"), (1.0, "whole number"), (True, "whole")])
def test_what_is_no_epoch(make, epoch, message):
    with pytest.raises(UsageError, match=message):
        make().set_epoch(epoch)


class Model:
    """What the loader promises, in a few lines: the epoch and number of the next batch."""

    def __init__(self) -> None:
        self.epoch, self.number, self.goes_on = 0, 0, True

    def start(self) -> None:
        if not self.goes_on:
            self.epoch, self.number = self.epoch + 1, 0
        self.goes_on = True

    def give(self, count: int) -> list[tuple[int, int]]:
        given_ = [(self.epoch, self.number + i) for i in range(count)]
        self.number, self.goes_on = self.number + count, False
        if self.number == BATCHES:
            self.epoch, self.number, self.goes_on = self.epoch + 1, 0, True
        return given_


STEPS = st.one_of(
    st.tuples(st.just("whole"), st.sampled_from(WAYS[:4])),
    st.tuples(st.just("some"), st.integers(0, BATCHES)),
    st.tuples(st.just("set_epoch"), st.integers(0, 3)),
    st.tuples(st.just("resume"), st.none()),
    st.tuples(st.just("unused iterator"), st.none()),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=7))
def test_any_mixture_of_ways(make, known, steps):
    loader, model = make(), Model()
    for kind, detail in steps:
        if kind == "whole":
            model.start()
            rest = BATCHES - model.number
            expected = model.give(rest)
            # A loop that counts to len(loader) gets the rest of a resumed epoch, and no more.
            got = [known[name(batch)] for batch in (list(loader) if rest < BATCHES else detail(loader))]
            assert got == expected
        elif kind == "some":
            stream = iter(loader)
            if detail:
                model.start()
                detail = min(detail, BATCHES - model.number)
                assert [known[name(next(stream))] for _ in range(detail)] == model.give(detail)
        elif kind == "set_epoch":
            loader.set_epoch(detail)
            if not (detail == model.epoch and model.goes_on):
                model.epoch, model.number, model.goes_on = detail, 0, True
        elif kind == "resume":
            state = json.loads(json.dumps(loader.state_dict()))
            loader = make()
            loader.load_state_dict(state)
            model.goes_on = True
        else:
            iter(loader)
        assert loader.epoch == model.epoch and len(loader) == BATCHES
