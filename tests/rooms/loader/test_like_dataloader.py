"""What loops ask of a DataLoader besides its batches."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils.data import DataLoader

import ferkd_data as fd
from ferkd_data.errors import UsageError


@pytest.fixture
def make(label_set, photos, tmp_path):
    def make_(kind=fd.CropLoader, **changes):
        settings = {"images": photos, "size": 16, "cache_dir": tmp_path, "calibration": "fkd"}
        return kind(fd.open_labels(label_set), **(settings | changes))

    return make_


def test_a_loader_has_what_a_dataloader_has(make):
    loader = make(batch_size=8, num_workers=2, prefetch_factor=3, drop_last=False, pin_memory=True)
    assert (loader.batch_size, loader.num_workers, loader.prefetch_factor) == (8, 2, 3)
    assert (loader.drop_last, loader.pin_memory, loader.persistent_workers) == (False, True, True)
    for name in inspect.signature(DataLoader.__init__).parameters:
        if name not in ("self", "shuffle", "pin_memory_device"):
            assert hasattr(loader, name), name
    assert len(loader.dataset) == 20 and len(loader.sampler) == len(loader) * 8
    assert len(loader.batch_sampler) == len(loader)
    # timm's train.py asks its prefetcher for it.
    assert loader.mixup_enabled is False


def test_the_classes_are_those_of_the_labels(make):
    for dataset in (make(batch_size=8).dataset, make(fd.CropDataset)):
        assert dataset.classes == [f"class{number}" for number in range(10)] and len(dataset) == 20
        assert dataset.class_to_idx == {f"class{number}": number for number in range(10)}


@pytest.mark.parametrize("through", ["sampler", "dataset"])
def test_an_epoch_can_be_set_through_sampler_and_dataset(make, through):
    loader = make(batch_size=8)
    getattr(loader, through).set_epoch(3)
    assert loader.epoch == 3
    list(loader)
    assert loader.epoch == 4


def test_what_cannot_be_honoured_is_refused_in_words(make):
    loader = make(batch_size=8)
    for dataset in (loader.dataset, make(fd.CropDataset)):
        with pytest.raises(UsageError, match=r"--aa, --color-jitter .* have no effect.*transform="):
            dataset.transform = torch.nn.Identity()
        assert dataset.transform is None
    with pytest.raises(UsageError, match=r"load_state_dict \(HF Trainer: ignore_data_skip=True\)"):
        loader.dataset[0]
    with pytest.raises(UsageError, match="its sampler can only set_epoch"):
        iter(loader.sampler)
    with pytest.raises(AttributeError):
        loader.batch_size = 16


def test_timms_own_loader_around_the_data_set_is_refused_in_words(make):
    from timm.data import create_loader

    with pytest.raises(UsageError, match=r"dataset\.transform = Compose cannot change that"):
        create_loader(
            make(fd.CropDataset), input_size=(3, 16, 16), batch_size=4, is_training=True, use_prefetcher=False
        )


@pytest.mark.parametrize("kind", ["loader", "dataset"])
def test_dense_targets_are_the_plain_ones(make, kind):
    if kind == "loader":
        soft, dense = list(make(batch_size=8)), list(make(batch_size=8, targets="dense"))
    else:
        pairs = [make(fd.CropDataset, crops_per_image=2, targets=targets) for targets in ("soft", "dense")]
        soft, dense = ([*DataLoader(data, batch_size=4, collate_fn=data.collate)] for data in pairs)
    assert len(soft) == len(dense) >= 5
    for (images, targets), (same_images, plain) in zip(soft, dense, strict=True):
        assert torch.equal(images, same_images) and torch.equal(targets.dense(), plain)
        assert type(plain) is torch.Tensor and plain.dtype == torch.float32 and plain.shape == (8, 10)


def test_batches_in_the_form_that_a_loop_wants(make):
    plain = list(make(batch_size=8, targets="dense"))
    loader = make(batch_size=8, targets="dense", to_batch=lambda images, targets: {"x": images, "y": targets})
    for (images, targets), batch in zip(plain, loader, strict=True):
        assert batch.keys() == {"x", "y"}
        assert torch.equal(batch["x"], images) and torch.equal(batch["y"], targets)
    with pytest.raises(UsageError, match="to_batch must be a function of images and targets"):
        make(batch_size=8, to_batch="dict")
    with pytest.raises(UsageError, match="targets must be one of soft, dense, got 'hard'"):
        make(batch_size=8, targets="hard")


def test_reprs_tell_what_is_there(make):
    loader = make(batch_size=8, crops_per_image=2, spread=True, seed=3)
    list(loader)
    lines = repr(loader).splitlines()
    assert lines[0] == "CropLoader: epoch 1 of 5 batches"
    assert lines[1] == "  batches: 8 crops of 16 px, 2 of each image"
    assert "20 in this epoch, each with 10 labelled crops" in lines[2] and "LabelSet(" in lines[3]
    assert lines[-1] == "  also:    spread=True, seed=3" and max(map(len, lines)) < 400
    assert "rank 1 of 2" in repr(make(batch_size=8, rank=1, world_size=2))
    _, targets = next(iter(loader))
    assert repr(targets).startswith("SoftTargets(8 rows, 10 classes, ") and "float32 on cpu, with hard" in repr(targets)
    assert repr(make(fd.CropDataset)).startswith("CropDataset(20 images, 1 of 10 crops at a time, size 16, epoch 0)")
    assert repr(loader.dataset).startswith("LoaderDataset(20 images, 10 classes, ")
