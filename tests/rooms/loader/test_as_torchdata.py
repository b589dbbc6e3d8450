"""The same expectations of torchdata's StatefulDataLoader and of ours: what a loop may rely on, it may with both."""

from __future__ import annotations

import hashlib
import itertools
import json

import pytest

import ferkd_data as fd

BATCHES = 5
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@pytest.fixture(params=["torchdata", "ours"])
def make(request, label_set, photos, tmp_path):
    """Loaders of 5 batches that are the same each time; keyword arguments as DataLoader has them."""
    if request.param == "torchdata":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return lambda **settings: StatefulDataLoader(list(range(10)), batch_size=2, **settings)
    labels = fd.open_labels(label_set)
    fixed = {"images": photos, "batch_size": 8, "crops_per_image": 2, "size": 16, "cache_dir": tmp_path}
    return lambda **settings: fd.CropLoader(labels, order="sequential", **fixed, **settings)


def names(batches):
    """What is in them, without the epoch: ours has other crops in each."""
    found = []
    for batch in batches:
        rows = batch[1].rows if isinstance(batch, tuple) else batch
        found.append(hashlib.sha1(rows.numpy().tobytes()).hexdigest())
    return found


@pytest.fixture
def whole(make):
    found = names(make())
    assert len(found) == len(set(found)) == len(make()) == BATCHES
    return found


def copied(make, loader, **settings):
    other = make(**settings)
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    return other


def test_a_state_before_any_batch(make, whole):
    other = copied(make, make())
    assert names(other) == whole and names(other) == whole


@pytest.mark.parametrize("given", range(1, BATCHES))
def test_a_state_in_the_middle_gives_the_rest_and_then_whole_epochs(make, whole, given):
    loader = make()
    stream = iter(loader)
    assert names(itertools.islice(stream, given)) == whole[:given]
    other = copied(make, loader)
    assert names(other) == whole[given:] and names(other) == whole
    # The one that was saved is not disturbed.
    assert names(stream) == whole[given:]


def test_a_state_after_a_whole_epoch_gives_whole_epochs(make, whole):
    loader = make()
    assert names(loader) == whole
    other = copied(make, loader)
    assert [names(other) for _ in range(3)] == [whole] * 3


def test_a_new_iteration_begins_a_whole_epoch(make, whole):
    loader = make()
    for given in (1, 3):
        assert names(itertools.islice(loader, given)) == whole[:given]
    assert names(loader) == whole


def test_a_state_that_is_loaded_and_saved_is_the_same(make, whole):
    loader = make()
    names(itertools.islice(loader, 2))
    state = loader.state_dict()
    other = make()
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert names(other) == whole[2:]


def test_a_state_can_be_loaded_again_after_it_was_used(make, whole):
    loader = make()
    names(itertools.islice(loader, 2))
    state = loader.state_dict()
    names(loader)
    for _ in range(2):
        loader.load_state_dict(state)
        assert names(loader) == whole[2:]


def test_an_iterator_that_gave_nothing_leaves_a_state_in_force(make, whole):
    loader = make()
    names(itertools.islice(loader, 2))
    other = copied(make, loader)
    iter(other)
    assert len(other) == BATCHES
    assert names(copied(make, other)) == whole[2:]


def test_iterators_end_for_good(make):
    stream = iter(make())
    assert len(names(stream)) == BATCHES
    assert next(stream, None) is None and next(stream, None) is None


@pytest.mark.parametrize("form", ["rows", "stream"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_set_in_torchdatas_loader_goes_on_with_the_next_batch(label_set, photos, tmp_path, form, num_workers):
    """In a new process, which is told the epoch."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make_both():
        settings = {"images": photos, "size": 16, "calibration": "fkd", "cache_dir": tmp_path}
        data = fd.CropDataset(fd.open_labels(label_set), **settings)
        told = data if form == "rows" else data.stream()
        context = "forkserver" if num_workers else None
        settings = {"collate_fn": data.collate, "num_workers": num_workers, "multiprocessing_context": context}
        return told, StatefulDataLoader(told, batch_size=5, shuffle=form == "rows", **settings)

    def crops(batch):
        return batch[0].numpy().tobytes()

    told, loader = make_both()
    for epoch in range(2):
        told.set_epoch(epoch)
        batches = []
        for batch in loader:
            batches.append(crops(batch))
            if len(batches) == 2:
                state = loader.state_dict()
    told, loader = make_both()
    told.set_epoch(1)
    loader.load_state_dict(state)
    assert [crops(batch) for batch in loader] == batches[2:] and len(batches) >= 4
