from __future__ import annotations

import copy
import gc
import pickle
import resource
from itertools import islice

import numpy as np
import pytest
import torch
from servers import serve
from torch.utils.data import DataLoader, RandomSampler

import ferkd_data as fd
from ferkd_data.errors import UsageError
from ferkd_data.loader.crops_and_targets import CROPS_TO_JUDGE
from ferkd_data.loader.ranks import Ranks
from ferkd_data.loader.readings import Turns


@pytest.fixture
def dataset(label_set, photos, tmp_path):
    return fd.CropDataset(
        fd.open_labels(label_set), images=photos, crops_per_image=2, size=32, calibration="fkd", cache_dir=tmp_path
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_under_a_plain_dataloader_it_gives_the_loaders_batches(dataset, label_set, photos, tmp_path, num_workers):
    loader = fd.CropLoader(
        fd.open_labels(label_set),
        images=photos,
        batch_size=10,
        crops_per_image=2,
        size=32,
        calibration="fkd",
        order="sequential",
        cache_dir=tmp_path,
    )
    plain = DataLoader(
        dataset,
        batch_size=5,
        collate_fn=dataset.collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        multiprocessing_context="forkserver" if num_workers else None,
    )
    for epoch in (0, 1, 2):
        loader.set_epoch(epoch)
        dataset.set_epoch(epoch)
        pairs = list(zip(plain, loader, strict=True))
        assert len(pairs) == 4
        for (images, targets), (same_images, same_targets) in pairs:
            assert torch.equal(images, same_images)
            torch.testing.assert_close(targets.dense(), same_targets.dense())


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forked_workers_read_from_a_server(tar_label_set, tmp_path):
    """Each over connections of its own; the main process has used one before, and the cache has let the tars go."""

    def dataset(labels, cache):
        opened = fd.open_labels(labels, cache_dir=tmp_path / cache)
        return fd.CropDataset(opened, size=16, cache_dir=tmp_path / cache)

    local = dataset(tar_label_set, "local")
    with serve(tar_label_set) as server:
        remote = dataset(server.url, "remote")
        gc.collect()
        for tar in (tmp_path / "remote").rglob("*.tar"):
            if tar.parent.name != "locks":
                tar.unlink()
        before = server.connections
        # Each worker begins with another tar. Fork was the default start method on Linux for long.
        rows = [0, 8, 16, *range(1, 8), *range(9, 16), 17, 18, 19]
        loader = DataLoader(remote, sampler=rows, batch_size=None, num_workers=2, multiprocessing_context="fork")
        seen = [images for images, _ in loader]
        assert server.connections >= before + 2
    assert all(torch.equal(images, local.item(row, 0)[0]) for row, images in zip(rows, seen, strict=True))


def with_few_files(_worker):
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_a_batch_takes_one_file_of_its_worker_and_not_one_for_each_image(dataset):
    """Shared memory is a file that is open: 300 images do not go into a process that may open 128."""
    rows = [number % 20 for number in range(300)]
    loader = loader_of(
        dataset, 1, batch_size=300, sampler=rows, collate_fn=dataset.collate, worker_init_fn=with_few_files
    )
    [(images, targets)] = loader
    assert images.shape == (600, 3, 32, 32) and len(targets) == 600
    assert images.is_shared() and images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images[:40], dataset.collate([dataset.item(row, 0) for row in range(20)])[0])


class Floats(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        images, targets = self.dataset[row]
        return images.float() / 255, targets


@pytest.mark.parametrize("num_workers", [0, 1])
def test_items_that_another_data_set_has_changed_are_joined_too(dataset, num_workers):
    loader = loader_of(Floats(dataset), num_workers, batch_size=20, collate_fn=dataset.collate)
    [(images, _)] = loader
    expected = torch.cat([dataset.item(row, 0)[0] for row in range(20)])
    assert torch.equal(images, expected.float() / 255)


def test_items_and_errors(dataset):
    images, targets = dataset[3]
    assert len(dataset) == 20 and images.shape == (2, 3, 32, 32) and len(targets) == 2
    with pytest.raises(IndexError):
        dataset[20]
    with pytest.raises(TypeError):
        dataset[0.5]
    assert len(dataset[np.int64(3)][0]) == len(dataset[torch.tensor(3)][0]) == 2
    with pytest.raises(UsageError, match="negative"):
        dataset.set_epoch(-1)


def crops_of(batches):
    return [image.numpy().tobytes() for images, _ in batches for image in images]


@pytest.fixture
def epochs(dataset):
    """The crops of each image in each of the first epochs: (epoch, row) -> bytes of M crops."""
    return {
        dataset.item(row, epoch)[0].numpy().tobytes(): (epoch, row) for epoch in range(4) for row in range(len(dataset))
    }


def loader_of(data, num_workers, persistent=False, **settings):
    return DataLoader(
        data,
        num_workers=num_workers,
        persistent_workers=persistent,
        multiprocessing_context="forkserver" if num_workers else None,
        **({"batch_size": None} | settings),
    )


WORKERS = [(0, False), (2, False), (2, True)]


@pytest.mark.parametrize(("num_workers", "persistent"), WORKERS)
def test_under_a_dataloader_it_moves_on_by_itself(dataset, epochs, num_workers, persistent):
    loader = loader_of(dataset, num_workers, persistent, shuffle=True)
    for epoch in range(3):
        seen = [epochs[images.numpy().tobytes()] for images, _ in loader]
        assert sorted(seen) == [(epoch, row) for row in range(20)]


def test_a_batch_of_rows_that_are_in_different_epochs(label_set, photos, tmp_path):
    """A sampler that repeats rows takes them ahead of the others, and schedules are by epoch."""

    def dataset(**changes):
        return fd.CropDataset(fd.open_labels(label_set), images=photos, cache_dir=tmp_path, **({"size": 16} | changes))

    mixed = dataset(calibration=lambda epoch: fd.Calibration.fkd() if epoch < 1 else fd.Calibration.blend())
    _, targets = mixed.collate(mixed.__getitems__([0, 0, 1]))
    own = [mixed.item(row, epoch)[1].dense() for row, epoch in ((0, 0), (0, 1), (1, 0))]
    assert torch.equal(targets.dense(), torch.cat(own))
    sized = dataset(size=lambda epoch: 16 + 16 * epoch)
    with pytest.raises(
        UsageError, match=r"crops of 16 and 32 pixels do not .* left early, .* sampler=dataset\.numbered"
    ):
        sized.collate(sized.__getitems__([0, 0, 1]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_set_epoch_says_where_to_go_on(dataset, epochs, num_workers):
    loader = loader_of(dataset, num_workers, num_workers > 0)
    for epoch in (2, 0, 3):
        dataset.set_epoch(epoch)
        assert [epochs[images.numpy().tobytes()] for images, _ in loader] == [(epoch, row) for row in range(20)]


def test_set_epoch_begins_anew_whatever_was_read(dataset, epochs):
    """Rows that were read again, by a sampler or by workers that read ahead, are no further than others afterwards."""

    def read(*rows):
        return [epochs[dataset[row][0].numpy().tobytes()] for row in rows]

    for epoch in (0, 1, 2, 2, 1):
        dataset.set_epoch(epoch)
        assert read(7, 7, 8) == [(epoch, 7), (epoch + 1, 7), (epoch, 8)]


def leave_early(loader):
    for _ in loader:
        return


def test_rows_read_ahead_in_an_epoch_that_was_left_do_not_stay_ahead(dataset, epochs):
    """Persistent workers read what is left of an epoch after `set_epoch` of the next one, as part of it."""
    loader = loader_of(dataset, 2, True, prefetch_factor=8)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        leave_early(loader)
    dataset.set_epoch(2)
    seen = [epochs[images.numpy().tobytes()] for images, _ in loader]
    assert [row for _, row in seen] == list(range(20)) and {epoch for epoch, _ in seen} <= {2, 3}
    dataset.set_epoch(3)
    assert [epochs[images.numpy().tobytes()] for images, _ in loader] == [(3, row) for row in range(20)]


def size_of(epoch):
    return 16 + 8 * epoch


@pytest.mark.parametrize("told", [True, False])
def test_a_numbered_sampler_keeps_epochs_apart_that_are_left_early(label_set, photos, tmp_path, told):
    """With a size of each epoch, a row of another one in a batch would be an error."""
    dataset = fd.CropDataset(fd.open_labels(label_set), images=photos, size=size_of, cache_dir=tmp_path)
    sampler = dataset.numbered(RandomSampler(dataset))
    loader = loader_of(dataset, 2, True, batch_size=4, sampler=sampler, collate_fn=dataset.collate, prefetch_factor=8)
    for epoch in range(3):
        if told:
            sampler.set_epoch(epoch)
        leave_early(loader)
    assert [images.shape[-1] for images, _ in loader] == [size_of(3)] * 5


@pytest.fixture
def repeated(label_set, photos, tmp_path):
    return fd.CropDataset(
        fd.open_labels(label_set), images=photos, repeats=3, size=16, calibration="fkd", cache_dir=tmp_path
    )


def samplers(dataset):
    from timm.data.distributed_sampler import RepeatAugSampler

    return {
        "timm": RepeatAugSampler(dataset, num_replicas=1, rank=0, num_repeats=3, selected_round=0),
        "plain": [row for row in (3, 1, 4, 6, 5) for _ in range(3)],
    }


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", ["timm", "plain"])
def test_a_sampler_that_repeats_rows_gets_other_crops_each_time(repeated, name, num_workers):
    """Batches of 6 hold whole repetitions. No crop comes twice in 3 epochs of at most 3 crops, of 10."""
    sampler = samplers(repeated)[name]
    loader = loader_of(repeated, num_workers, batch_size=6, sampler=sampler, collate_fn=repeated.collate)
    seen = []
    for epoch in range(3):
        repeated.set_epoch(epoch)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        seen.append(crops_of(loader))
        repeated.set_epoch(epoch)
        assert crops_of(loader) == seen[-1]
    every = [crop for crops in seen for crop in crops]
    assert len(every) >= 45 and len(set(every)) > 0.9 * len(every)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_numbered_rows_do_not_depend_on_the_workers(repeated, num_workers):
    """Batches of 4 cut repetitions in two, which go to two workers."""
    sampler = repeated.numbered(samplers(repeated)["timm"])
    loader = loader_of(repeated, num_workers, batch_size=4, sampler=sampler, collate_fn=repeated.collate)
    expected = []
    for epoch in range(2):
        inner = samplers(repeated)["timm"]
        inner.set_epoch(epoch)
        counts = [0] * 20
        for row in inner:
            expected.append(repeated.item(row, epoch, counts[row])[0].numpy().tobytes())
            counts[row] += 1
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen += crops_of(loader)
    assert seen == expected and len(sampler) == len(seen) // 2


def test_rows_that_a_numbered_sampler_repeats_beyond_what_was_said_are_warned_of(label_set, photos, tmp_path):
    """Counted anew in each epoch, the second reading of a row is the first of the next epoch."""

    def dataset(**changes):
        return fd.CropDataset(fd.open_labels(label_set), images=photos, size=16, cache_dir=tmp_path, **changes)

    once = dataset()
    rows = once.numbered([3, 1, 3])
    with pytest.warns(
        UserWarning, match=r"row 3 more often in an epoch than repeats= says \(1\).*next epoch gives again"
    ):
        readings = list(rows)
    first, again = (once[readings[place]][0] for place in (0, 2))
    assert not torch.equal(first, again) and torch.equal(again, once[next(iter(rows))][0])
    twice = dataset(repeats=3, rank=0, world_size=2)
    assert len(list(twice.numbered([3, 1, 3]))) == 3
    with pytest.warns(UserWarning, match=r"than repeats= says \(3\)"):
        list(twice.numbered([3, 1, 3, 3]))
    with pytest.raises(UsageError, match="each image once in an epoch, so repeats=3 would leave crops out"):
        twice.stream()


def test_ranks_draw_different_crops_where_rows_repeat():
    """An image's three readings go to any ranks of eight, or two to one rank of two."""
    for world_size in range(1, 9):
        turns = [Turns.of(3, Ranks(rank, world_size)) for rank in range(world_size)]
        taken = [t.turn(number) for t in turns for number in range(t.per_rank)]
        assert len(set(taken)) == len(taken) == turns[0].count and {ahead for ahead, _ in taken} == {0}
        assert turns[0].turn(turns[0].per_rank) == (1, 0)


def test_repeated_rows_before_the_process_group_are_warned_of(label_set, photos, tmp_path, monkeypatch):
    """Each process would take itself for the only one, and all would give the same crops of a row."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = {"images": photos, "size": 16, "cache_dir": tmp_path}
    with pytest.warns(UserWarning, match=r"RANK=1 and WORLD_SIZE=2 .* torch\.distributed is not initialised"):
        fd.CropDataset(fd.open_labels(label_set), repeats=3, **settings)
    for changes in ({}, {"repeats": 3, "rank": 1, "world_size": 2}):
        fd.CropDataset(fd.open_labels(label_set), **settings, **changes)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_of_timms_sampler_never_train_on_one_crop(label_set, photos, tmp_path, world_size):
    from timm.data.distributed_sampler import RepeatAugSampler

    seen = []
    for rank in range(world_size):
        data = fd.CropDataset(
            fd.open_labels(label_set),
            images=photos,
            repeats=3,
            rank=rank,
            world_size=world_size,
            size=16,
            calibration="fkd",
            cache_dir=tmp_path,
        )
        sampler = RepeatAugSampler(data, num_replicas=world_size, rank=rank, num_repeats=3, selected_round=0)
        seen += [data[row][0].numpy().tobytes() for row in sampler]
    assert len(seen) >= 18 and len(set(seen)) == len(seen)


def test_ranks_that_count_apart_are_warned_once(label_set, photos, tmp_path):
    """A distributed sampler gives a row to any rank, and each rank counts its own readings of it."""

    def dataset(**changes):
        settings = {"images": photos, "size": 16, "calibration": "fkd", "cache_dir": tmp_path}
        return fd.CropDataset(fd.open_labels(label_set), **settings | {"rank": 1, "world_size": 2} | changes)

    data = dataset()
    data[3], data[4]
    with pytest.warns(UserWarning, match=r"rank 1 of 2 reads a row again.*dataset\.set_epoch\(epoch\)"):
        data[3]
    data[3]
    told = dataset()
    for epoch in range(3):
        told.set_epoch(epoch)
        told[3]
    alone, repeated, counted = dataset(rank=0, world_size=1), dataset(repeats=3), dataset()
    rows = counted.numbered([3, 4])
    for _ in range(3):
        alone[3], repeated[3], [counted[row] for row in rows]
    # Worker processes have copies, and know no process group.
    sent = dataset()
    copy = pickle.loads(pickle.dumps(sent))
    sent[3]
    with pytest.warns(UserWarning, match="rank 1 of 2"):
        copy[3]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("order", ["global", "shards", "sequential"])
def test_a_stream_gives_every_image_of_the_epoch_once(dataset, epochs, order, num_workers):
    """To 3 ranks of 6 images each; which image an item is, shows in its pixels."""
    ranks = []
    for rank in range(3):
        stream = dataset.stream(order=order, rank=rank, world_size=3)
        ranks.append([epochs[images.numpy().tobytes()] for images, _ in loader_of(stream, num_workers)])
        assert len(ranks[-1]) == len(stream) == 6
    seen = sorted(row for rank in ranks for _, row in rank)
    assert len(set(seen)) == 18 and set(seen) < set(range(20))
    assert {epoch for rank in ranks for epoch, _ in rank} == {0}
    in_order = [row for _, row in ranks[0]] == [0, 3, 6, 9, 12, 15] and seen == list(range(18))
    assert (order == "sequential") == in_order


@pytest.mark.parametrize(("num_workers", "persistent"), WORKERS)
def test_each_iteration_over_a_stream_is_the_next_epoch(dataset, epochs, num_workers, persistent):
    stream = dataset.stream()
    loader = loader_of(stream, num_workers, persistent)

    def run():
        return sorted(epochs[images.numpy().tobytes()] for images, _ in loader)

    assert [run() for _ in range(3)] == [[(epoch, row) for row in range(20)] for epoch in range(3)]
    stream.set_epoch(1)
    assert [run()[0][0] for _ in range(2)] == [1, 2]
    dataset.set_epoch(3)
    assert {epoch for epoch, _ in run()} == {3}


@pytest.mark.parametrize(("num_workers", "persistent"), [(2, False), (2, True)])
@pytest.mark.parametrize("anew", [False, True])
def test_a_stream_moves_on_also_where_the_training_seeds_its_generator_anew(
    dataset, epochs, num_workers, persistent, anew
):
    """Worker processes then have the seeds of an earlier iteration. With `anew`, so has a new DataLoader."""
    stream = dataset.stream()

    def seeded():
        return loader_of(stream, num_workers, persistent, generator=torch.Generator().manual_seed(7))

    loader = seeded()
    for epoch in range(4):
        loader = seeded() if anew else loader
        loader.generator.manual_seed(7)
        assert sorted(epochs[images.numpy().tobytes()] for images, _ in loader) == [(epoch, row) for row in range(20)]


@pytest.mark.parametrize(("num_workers", "persistent"), WORKERS)
def test_a_stream_that_is_left_early_goes_on_with_the_next_epoch(dataset, epochs, num_workers, persistent):
    loader = loader_of(dataset.stream(), num_workers, persistent)
    for _ in loader:
        break
    assert sorted(epochs[images.numpy().tobytes()] for images, _ in loader) == [(1, row) for row in range(20)]


@pytest.fixture
def prepare():
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("form", [lambda dataset: dataset, fd.CropDataset.stream])
def test_accelerates_loader_says_which_epoch_it_is(dataset, epochs, prepare, form, num_workers):
    """It counts whole epochs only, and from 0 in a process that goes on with epoch 4."""
    loader = prepare(loader_of(form(dataset), num_workers))
    for epoch in (2, 3, 1):
        loader.set_epoch(epoch)
        dataset.set_epoch(epoch)
        assert {epochs[images.numpy().tobytes()][0] for images, _ in islice(loader, 3)} == {epoch}
    assert {epochs[images.numpy().tobytes()][0] for images, _ in loader} == {1}
    assert {epochs[images.numpy().tobytes()][0] for images, _ in loader} == {2}


@pytest.mark.parametrize("form", [lambda dataset: dataset, fd.CropDataset.stream])
def test_an_epoch_that_accelerate_takes_back_is_warned_of(dataset, prepare, form):
    """It calls set_epoch of the data set in its loader's turn, with its own count."""
    data = form(dataset)
    loader = prepare(loader_of(data, 0))
    data.set_epoch(0)
    leave_early(loader)
    leave_early(loader)
    data.set_epoch(1)
    loader.set_epoch(0)
    leave_early(loader)
    data.set_epoch(3)
    with pytest.warns(UserWarning, match=r"Accelerate begins epoch 0, after set_epoch\(3\) .* of the prepared loader"):
        leave_early(loader)
    leave_early(loader)


def test_a_numbered_sampler_under_accelerate(dataset, epochs, prepare):
    sampler = dataset.numbered(range(20))
    loader = prepare(loader_of(dataset, 0, batch_size=2, sampler=sampler, collate_fn=list))
    loader.set_epoch(3)
    assert {epochs[images.numpy().tobytes()][0] for batch in loader for images, _ in batch} == {3}
    sampler.set_epoch(1)
    with pytest.warns(UserWarning, match=r"Accelerate begins epoch 4, after set_epoch\(1\)"):
        leave_early(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("dispatch", [True, False])
def test_accelerate_must_not_deal_a_stream_out_again(dataset, num_workers, dispatch):
    """What `accelerator.prepare` makes of its DataLoader in the first of two processes."""
    from accelerate.data_loader import prepare_data_loader

    def prepared(stream):
        loader = DataLoader(stream, batch_size=2, collate_fn=dataset.collate, num_workers=num_workers)
        device = torch.device("cpu")
        return prepare_data_loader(
            loader, device, num_processes=2, process_index=0, put_on_device=True, dispatch_batches=dispatch
        )

    with pytest.raises(UsageError, match=r"Leave its DataLoader out of accelerator\.prepare"):
        next(iter(prepared(dataset.stream(rank=0, world_size=2))))
    if not dispatch:
        # Each process then reads everything, and Accelerate alone deals out.
        assert sum(len(images) for images, _ in prepared(dataset.stream(rank=0, world_size=1))) == 20


def test_what_a_stream_cannot_be(dataset):
    for changes, message in (
        ({"rank": 2, "world_size": 2}, r"rank must be 0\.\.1"),
        ({"rank": 1}, "rank and world_size go together"),
        ({"order": "random"}, "order must be"),
    ):
        with pytest.raises(UsageError, match=message):
            dataset.stream(**changes)
    with pytest.raises(UsageError, match="negative"):
        dataset.stream().set_epoch(-1)


@pytest.mark.parametrize("name", ["repeats", "crops_per_image"])
@pytest.mark.parametrize(
    ("value", "message"), [(0, "at least 1, got 0"), (True, "whole number"), (1.5, "whole number")]
)
def test_what_counts_cannot_be(label_set, photos, name, value, message):
    with pytest.raises(UsageError, match=f"{name} must be .*{message}"):
        fd.CropDataset(fd.open_labels(label_set), images=photos, **{name: value})


def test_a_path_is_no_label_set(label_set, photos):
    with pytest.raises(UsageError, match=r"labels must be a label set, as fd\.open_labels"):
        fd.CropDataset(str(label_set), images=photos)


def test_the_file_that_processes_share_goes_with_the_data_set(dataset):
    path = dataset.shared._path
    assert path.exists()
    copied = pickle.loads(pickle.dumps(dataset))
    dataset.set_epoch(7)
    assert copied.epoch == 7
    del copied
    gc.collect()
    assert path.exists()
    shared = dataset.shared
    dataset.__dict__.clear()
    del shared
    gc.collect()
    assert not path.exists()


@pytest.mark.parametrize("ranks", [{}, {"rank": 1, "world_size": 2}])
def test_a_copy_within_the_process_counts_for_itself(label_set, photos, tmp_path, ranks):
    """Unlike the copies of workers: whoever copies a data set, for a second loader, wants another one."""
    settings = {"images": photos, "size": 16, "calibration": "fkd", "cache_dir": tmp_path}
    dataset = fd.CropDataset(fd.open_labels(label_set), **settings, **ranks)
    dataset.set_epoch(2)
    dataset[7]
    other = copy.deepcopy(dataset)
    assert other.epoch == 2
    assert torch.equal(other[7][0], dataset.item(7, 3)[0]) and torch.equal(other[8][0], dataset.item(8, 2)[0])
    other.set_epoch(5)
    assert dataset.epoch == 2 and torch.equal(dataset[7][0], dataset.item(7, 3)[0])
    path = other.shared._path
    del dataset
    gc.collect()
    assert torch.equal(other[7][0], other.item(7, 5)[0])
    del other
    gc.collect()
    assert not path.exists()


def test_a_copy_of_a_stream_goes_its_own_way(dataset, epochs):
    stream = dataset.stream()
    stream.set_epoch(2)
    other = copy.deepcopy(stream)
    for epoch in (2, 3):
        for form in (stream, other):
            assert sorted(epochs[images.numpy().tobytes()] for images, _ in form) == [(epoch, row) for row in range(20)]


def test_a_calibration_that_discards_everything_is_warned_of_once(label_set, photos, tmp_path):
    """In the process that reads, as soon as it has read enough crops."""
    everything = fd.Calibration(thresholds=fd.Thresholds(low=1.0, mid=1.0, top=1.0))
    labels = fd.open_labels(label_set)
    settings = {"size": 8, "crops_per_image": 4, "cache_dir": tmp_path}
    dataset = fd.CropDataset(labels, images=photos, calibration=everything, **settings)
    with pytest.warns(
        UserWarning, match=r"^9\d% of the crops so far are of images whose crops are all discarded"
    ) as said:
        for _ in range(2 * CROPS_TO_JUDGE // (4 * len(dataset))):
            for row in range(len(dataset)):
                dataset[row]
    assert len(said) == 1
