"""Which part of an epoch a process gets, where nobody says it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import ferkd_data as fd
from ferkd_data.loader.ranks import Ranks, warn_if_alone

TRAINING = """
import sys, warnings
import torch.distributed as dist
import ferkd_data as fd

warnings.simplefilter("error")
labels, photos, cache, when = sys.argv[1:]
labels = fd.open_labels(labels)
settings = dict(images=photos, crops_per_image=2, size=16, cache_dir=cache)
if when == "before":
    dist.init_process_group("gloo")
loader = fd.CropLoader(labels, batch_size=4, **settings)
stream = fd.CropDataset(labels, **settings).stream()
alone = fd.CropLoader(labels, batch_size=4, rank=0, world_size=1, **settings)
if when == "after":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (loader.world_size, len(loader), len(stream)) == (1, 10, 20)
    dist.init_process_group("gloo")
rank = dist.get_rank()
assert (loader.rank, loader.world_size, len(loader), len(stream)) == (rank, 2, 5, 10)

def crops(batches):
    return {image.numpy().tobytes() for images, _ in batches for image in images}

mine = [crops(loader), crops(stream)]
everyone = [None, None]
dist.all_gather_object(everyone, mine)
for first, second in zip(*everyone):
    assert not first & second and len(first | second) == 40, (len(first), len(second))
assert len(list(alone)) == 10
print("done", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_those_of_torch_distributed(label_set, photos, tmp_path, when):
    """Also where it is initialised after the loader was made."""
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    command += [label_set, photos, tmp_path, when]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr[-3000:]


SENT = """
import itertools, sys
from pathlib import Path
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, DistributedSampler
import ferkd_data as fd

def crops(loader):
    return [image.numpy().tobytes() for images, _ in loader for image in images]

def train(rank, data, stream, repeated, store, epochs):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # As trainings do, for weights that begin alike: worker processes of both ranks then have the same seeds.
    torch.manual_seed(0)
    sampler = DistributedSampler(data)
    for num_workers in (1, 0):
        streamed = DataLoader(stream, batch_size=5, collate_fn=data.collate, num_workers=num_workers)
        sampled = DataLoader(data, batch_size=5, sampler=sampler, collate_fn=data.collate, num_workers=num_workers)
        for epoch in range(epochs or rank + 1):
            sampler.set_epoch(epoch)
            data.set_epoch(epoch)
            everyone = [crops(streamed), crops(sampled)]
            if epochs:
                gathered = [None, None]
                dist.all_gather_object(gathered, everyone)
                for first, second in zip(*gathered):
                    assert len(first) == len(second) == 10 and len({*first, *second}) == 20, (num_workers, epoch)
                    SEEN.append({*first, *second})
    try:
        repeated[0]
    except fd.errors.UsageError as error:
        print("refused" if "made before the process group of 2 processes" in str(error) else error, flush=True)
    if epochs:
        streams, samples = SEEN[::2], SEEN[1::2]
        # The stream goes on from epoch to epoch; the data set is told the same two epochs again.
        assert not any(a & b for a, b in itertools.combinations(streams, 2)), "the stream gave an epoch again"
        assert samples[:2] == samples[2:] and not samples[0] & samples[1]
        print("done", flush=True)
    dist.destroy_process_group()

SEEN = []
if __name__ == "__main__":
    labels, photos, cache, method = sys.argv[1:]
    settings = dict(images=photos, size=16, calibration="fkd", cache_dir=cache)
    labels = fd.open_labels(labels)
    data, streamed, repeated = (fd.CropDataset(labels, repeats=count, **settings) for count in (1, 1, 3))
    # The first training ends in the middle, its ranks in different epochs; the second one begins anew.
    stream = streamed.stream()
    for epochs in (0, 2):
        args = (data, stream, repeated, Path(cache) / f"store{epochs}", epochs)
        mp.start_processes(train, args, nprocs=2, start_method=method)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_data_set_that_is_sent_to_ranks_is_each_ones_own(label_set, photos, tmp_path, method):
    """`mp.spawn(train, args=(dataset,))`, a notebook's launcher, Lightning's ddp_spawn and ddp_fork."""
    script = tmp_path / "sent.py"
    script.write_text(SENT)
    command = [sys.executable, script, label_set, photos, tmp_path, method]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("refused") == 4


@pytest.fixture
def make(label_set, photos, tmp_path):
    def make_(**changes):
        return fd.CropLoader(
            fd.open_labels(label_set), images=photos, batch_size=8, size=16, cache_dir=tmp_path, **changes
        )

    return make_


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")])
def test_a_launcher_without_a_process_group_is_warned_of_once(make, monkeypatch, names):
    for name, value in zip(names, ("1", "4"), strict=True):
        monkeypatch.setenv(name, value)
    loader = make()
    with pytest.warns(UserWarning, match=rf"{names[0]}=1 and {names[1]}=4 .*each of them trains on all images") as said:
        next(iter(loader))
        list(loader)
    assert len(said) == 1
    assert len(list(make(rank=0, world_size=1))) == 10
    loader = make()
    repr(loader)
    # A learning rate's schedule is often made of it, before the process group.
    with pytest.warns(UserWarning, match=r"len\(\) counts all batches") as said:
        assert len(loader) == 10 and len(loader) == 10
        list(loader)
    assert len(said) == 1


def test_no_warning_where_there_is_nothing_to_say():
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "8"}, {"RANK": "0", "WORLD_SIZE": "?"}):
        warn_if_alone(Ranks(0, 1), None, environment)
    warn_if_alone(Ranks(1, 2), None, {"RANK": "1", "WORLD_SIZE": "2"})
