"""Which part of an epoch a process gets, where nobody says it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import ferkd_data as fd
from ferkd_data.loader.settings import Ranks, warn_if_alone

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
