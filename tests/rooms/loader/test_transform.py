"""The user's own augmentations: what they draw belongs to the crop, and to nobody else."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

import ferkd_data as fd
from ferkd_data.errors import LoaderError, StateMismatchError
from ferkd_data.loader.transform import crop_seed, lent_generators, transformed


def noisy(crop):
    """Draws from all three global generators."""
    level = random.randrange(50) + int(np.random.randint(50)) + int(torch.randint(0, 50, (1,)))  # noqa: NPY002
    return crop ^ (level % 256)


def inverted(crop):
    return 255 - crop


def turned(crop):
    """A view of the crop itself."""
    return crop.transpose(1, 2)


def darkened(crop):
    """In place."""
    return crop.div_(2, rounding_mode="floor")


class WithNumpy:
    """As a transform of another library, on (H, W, C) arrays."""

    def __call__(self, crop):
        array = crop.permute(1, 2, 0).numpy()
        return torch.from_numpy(array[::-1].copy()).permute(2, 0, 1)


V2 = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.4),
        v2.RandAugment(),
        v2.RandomErasing(p=0.5),
    ]
)
TRIVIAL = v2.TrivialAugmentWide()


@pytest.fixture
def make(label_set, photos, tmp_path):
    def make_(**changes):
        settings = {"batch_size": 4, "crops_per_image": 2, "size": 24, "calibration": "fkd", "images": photos}
        return fd.CropLoader(fd.open_labels(label_set), **(settings | {"cache_dir": tmp_path / "cache"} | changes))

    return make_


def contents(batches):
    return [(images.clone(), targets.dense().clone()) for images, targets in batches]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(t, u) for (x, t), (y, u) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (inverted, inverted),
        (turned, lambda crop: crop.clone().transpose(1, 2)),
        (darkened, lambda crop: crop // 2),
        (WithNumpy(), lambda crop: crop.flip(1)),
        (v2.RandomInvert(p=1.0), inverted),
        (lambda crop: crop, lambda crop: crop),
    ],
)
def test_every_crop_goes_through_the_transform_once(make, transform, expected):
    for (images, targets), (plain, same_targets) in zip(make(transform=transform), make(), strict=True):
        assert images.dtype == torch.uint8 and images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, torch.stack([expected(crop) for crop in plain]))
        assert torch.equal(targets.dense(), same_targets.dense())


CHANGES = {
    "plain": {},
    "spread": {"spread": True},
    "shards": {"order": "shards", "shards_together": 1},
    "by crops": {"epoch": "crops"},
    "selfmix": {"selfmix": fd.SelfMix(prob=0.7, per="sample")},
    "size": {"size": lambda epoch: 16 + 8 * epoch},
}


@pytest.mark.parametrize(
    ("name", "transform"), [("spread", noisy), ("selfmix", V2), ("plain", TRIVIAL)], ids=["noise", "v2", "trivial"]
)
def test_the_number_of_workers_changes_nothing(make, name, transform):
    alone = make(transform=transform, **CHANGES[name])
    two = make(transform=transform, num_workers=2, **CHANGES[name])
    for _ in range(2):
        assert same(contents(alone), contents(two))


def test_a_transform_of_a_notebooks_cell_reaches_the_workers(make):
    """It is a closure, over a torchvision transform of its own."""
    strength, jitter = 3, v2.ColorJitter(0.5)

    def cell(crop):
        return jitter(crop) ^ strength

    alone, two = make(transform=cell), make(transform=cell, num_workers=2)
    first = contents(two)
    two._workers.wait()
    assert same(first, contents(alone)) and same(contents(two), contents(alone))


def test_batches_of_this_process_and_of_workers_are_the_same(make):
    """The first ones are made here, until a worker is ready; the training's own draws go on undisturbed meanwhile."""
    seed_all()
    expected = [drawn() for _ in range(10)]
    seed_all()
    loader = make(transform=noisy, num_workers=1)
    for number, _ in enumerate(loader):
        assert drawn() == expected[number]


@pytest.mark.parametrize("name", CHANGES)
def test_resume_after_every_batch(make, name):
    loader = make(transform=noisy, **CHANGES[name])
    whole, states = [], []
    for _ in range(2):
        for batch in loader:
            whole += contents([batch])
            states.append(loader.state_dict())
    per_epoch = len(whole) // 2
    for done, state in enumerate(states[:-1], 1):
        second = make(transform=noisy, **CHANGES[name])
        # Whatever the training has drawn meanwhile.
        random.random(), torch.rand(1)
        second.load_state_dict(state)
        rest = contents(second)
        assert same(rest, whole[done : (done // per_epoch + 1) * per_epoch])


def test_what_is_drawn_belongs_to_the_crop(make):
    """Not to its neighbours, its batch or its rank; and every draw of an image is another one."""

    def noise(**changes):
        found = {}
        given, plain = make(transform=noisy, **changes), make(**changes)
        for _ in range(2):
            for (images, targets), (bare, _) in zip(given, plain, strict=True):
                for row, crop, before in zip(targets.rows.tolist(), images, bare, strict=True):
                    found[(row, before.numpy().tobytes())] = int((crop ^ before)[0, 0, 0])
        return found

    alone = noise()
    assert len(alone) == 20 * 2 * 2
    assert len(set(alone.values())) > 40
    for changes in ({"batch_size": 10}, {"order": "sequential"}, {"spread": True}):
        assert noise(**changes) == alone
    ranks = noise(rank=0, world_size=2) | noise(rank=1, world_size=2)
    assert ranks == alone
    other = noise(seed=1)
    assert other.values() != alone.values()


def test_another_epoch_augments_the_same_crop_anew(make):
    """After all 10 crops of an image have been drawn, they come again."""
    loader = make(transform=noisy, crops_per_image=10, batch_size=10, order="sequential")
    plain = make(crops_per_image=10, batch_size=10, order="sequential")
    levels = []
    for _ in range(2):
        levels.append({})
        for (images, targets), (bare, _) in zip(loader, plain, strict=True):
            for row, crop, before in zip(targets.rows.tolist(), images, bare, strict=True):
                levels[-1][(row, before.numpy().tobytes())] = int((crop ^ before)[0, 0, 0])
    assert levels[0].keys() == levels[1].keys()
    assert sum(levels[0][key] != levels[1][key] for key in levels[0]) > 150


def drawn():
    """A draw of each global generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002


def seed_all():
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)


@pytest.mark.parametrize("transform", [noisy, V2])
def test_the_trainings_own_random_numbers_are_left_alone(make, transform):
    seed_all()
    expected = [drawn() for _ in range(10)]
    seed_all()
    for number, _ in enumerate(make(transform=transform)):
        assert drawn() == expected[number]


def test_what_the_training_draws_changes_no_crop(make):
    quiet = contents(make(transform=noisy))
    loud = []
    for batch in make(transform=noisy):
        loud += contents([batch])
        drawn()
    assert same(quiet, loud)


def test_the_generators_are_put_back_after_an_error():
    seed_all()
    expected = drawn()
    seed_all()
    with pytest.raises(RuntimeError), lent_generators():
        drawn()
        raise RuntimeError
    assert drawn() == expected


def test_the_seed_of_each_generator_is_used():
    def values(seed):
        found = []

        def look(crop):
            found.append(drawn())
            return crop

        with lent_generators():
            transformed(look, torch.zeros(3, 2, 2, dtype=torch.uint8), seed, lambda: "")
        return found[0]

    first, again, other = values(crop_seed(0, 2**63 + 5, 3)), values(crop_seed(0, 2**63 + 5, 3)), values(2**64 - 1)
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))
    # Neighbours in any part are unrelated.
    assert len({crop_seed(*parts) for parts in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0))}) == 4


def failing(crop):
    raise KeyError("no such thing")


WRONG = {
    "float": (lambda crop: crop.float() / 255, r"it gave torch\.float32 \(3, 24, 24\)"),
    "smaller": (v2.Resize(16), r"it gave torch\.uint8 \(3, 16, 16\)"),
    "grey": (v2.Grayscale(1), r"it gave torch\.uint8 \(1, 24, 24\)"),
    "channels last": (lambda crop: crop.permute(1, 2, 0), r"it gave torch\.uint8 \(24, 24, 3\)"),
    "PIL": (v2.ToPILImage(), "it gave Image"),
    "array": (lambda crop: crop.numpy(), "it gave ndarray"),
    "None": (lambda crop: None, "it gave NoneType"),
    "error": (failing, "transform failed with KeyError: 'no such thing'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_transform_that_cannot_be_used_says_which_crop_and_why(make, name):
    transform, match = WRONG[name]
    with pytest.raises(LoaderError, match=match) as caught:
        contents(make(transform=transform))
    assert re.match(r"image 'class\d/photo\d+' \(shard \d of ", str(caught.value))
    assert name == "error" or "torch.uint8 (3, 24, 24)" in str(caught.value)


def test_an_error_in_a_worker_is_the_same_error(make):
    with pytest.raises(LoaderError, match=r"image 'class.*transform failed with KeyError: 'no such thing'"):
        contents(make(transform=failing, num_workers=2, on_error="skip"))


def test_a_state_is_of_its_transform(make):
    state = make(transform=V2).state_dict()
    make(transform=V2).load_state_dict(state)
    for other in (None, noisy, v2.Compose([v2.RandomHorizontalFlip(p=0.7)])):
        with pytest.raises(StateMismatchError, match="transform"):
            make(transform=other).load_state_dict(state)
    # An object that does not say what it is: its class, without its address.
    make(transform=WithNumpy()).load_state_dict(make(transform=WithNumpy()).state_dict())


def test_a_data_set_transforms_too(label_set, photos, tmp_path):
    settings = {"images": photos, "size": 24, "crops_per_image": 2, "cache_dir": tmp_path}
    labels = fd.open_labels(label_set)
    plain, noised = fd.CropDataset(labels, **settings), fd.CropDataset(labels, transform=noisy, **settings)
    loader = torch.utils.data.DataLoader(
        noised, batch_size=5, collate_fn=noised.collate, num_workers=2, multiprocessing_context="fork"
    )
    batches = torch.cat([images for images, _ in loader])
    assert torch.equal(batches, torch.cat([noised.item(row, 0)[0] for row in range(20)]))
    assert not torch.equal(batches, torch.cat([plain.item(row, 0)[0] for row in range(20)]))


class OwnGenerator:
    """As Albumentations: a generator of its own, which nobody seeds."""

    def __init__(self):
        self.generator = np.random.default_rng()

    def __call__(self, crop):
        if self.generator.random() < 0.5:
            return crop
        return crop ^ int(self.generator.integers(1, 256))


def test_a_generator_of_its_own_is_warned_of_and_can_be_seeded(make, label_set, photos, tmp_path):
    own = OwnGenerator()
    with pytest.warns(UserWarning, match=r"transform gives different crops for the same seed.*torch\.randint") as said:
        make(transform=own)
    with pytest.warns(UserWarning, match="transform gives different crops"):
        fd.CropDataset(fd.open_labels(label_set), images=photos, transform=own, cache_dir=tmp_path)
    assert len(said) == 1

    def seeded(crop):
        own.generator = np.random.default_rng(int(torch.randint(2**31, ())))
        return own(crop)

    assert same(contents(make(transform=seeded)), contents(make(transform=seeded)))
    # Those that fail are no such case: the first crop says so, by name.
    make(transform=failing)


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomResizedCrop(24),
        v2.Compose([v2.RandomHorizontalFlip(), v2.RandomApply([v2.CenterCrop(24)])]),
        torch.nn.Sequential(v2.RandomCrop(24)),
    ],
)
def test_a_second_crop_is_warned_of(make, label_set, photos, tmp_path, transform):
    """Pasted from a training on whole images, it would show the student another crop than the teachers saw."""
    with pytest.warns(UserWarning, match=r"transform contains \w+Crop, and the images are crops already"):
        make(transform=transform)
    with pytest.warns(UserWarning, match="the images are crops already"):
        fd.CropDataset(fd.open_labels(label_set), images=photos, size=24, transform=transform, cache_dir=tmp_path)
