"""The loader as a training loop meets it."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ferkd_data as fd
from ferkd_data.calibration import calibrate
from ferkd_data.crops import Crops
from ferkd_data.errors import LabelSetError, LoaderError, StateMismatchError, UsageError
from ferkd_data.images import decode_rgb
from ferkd_data.loader.crops_and_targets import draw, epoch_draws
from ferkd_data.loader.label_cache import LabelCache
from ferkd_data.loader.schedule import Cursor, windows
from ferkd_data.replay import replay
from ferkd_data.storage import image_digest
from ferkd_data.targets import TENSORS

KEEP_ALL = fd.Calibration.fkd()


@pytest.fixture
def make(label_set, photos, tmp_path):
    """A loader over the small label set; keyword arguments override."""

    def make_(labels=label_set, **changes):
        settings = {"batch_size": 8, "crops_per_image": 2, "size": 32, "cache_dir": tmp_path / "cache"}
        settings |= {"images": photos, "calibration": KEEP_ALL}
        opened = fd.open_labels(labels) if not isinstance(labels, fd.LabelSet) else labels
        loader = fd.CropLoader(opened, **(settings | changes))
        if loader.settings.num_workers:
            # Otherwise so short an epoch is over before the first worker is ready.
            loader._open_workers().wait()
        return loader

    return make_


def contents(batches):
    return [(images.clone(), targets.dense().clone()) for images, targets in batches]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(t, u) for (x, t), (y, u) in zip(a, b, strict=True)
    )


def test_batches_have_the_promised_form(make):
    loader = make()
    batches = list(loader)
    assert len(loader) == len(batches) == 5
    for images, targets in batches:
        assert images.shape == (8, 3, 32, 32) and images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert isinstance(targets, fd.SoftTargets) and len(targets) == 8 and targets.num_classes == 10
    assert loader.epoch == 1


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_every_crop_is_the_builders_crop_and_its_label(layout, label_set, tar_label_set, photos, tmp_path):
    """One epoch in sequential order, against the labels and the cutter, byte for byte."""
    path = label_set if layout == "parquet" else tar_label_set
    labels = fd.open_labels(path)
    loader = fd.CropLoader(
        labels,
        images=photos if layout == "parquet" else None,
        batch_size=10,
        crops_per_image=2,
        size=32,
        order="sequential",
        calibration=KEEP_ALL,
        seed=3,
        cache_dir=tmp_path,
    )
    loader.set_epoch(1)
    images = torch.cat([batch.clone() for batch, _ in loader])
    loader.set_epoch(1)
    dense = torch.cat([targets.dense() for _, targets in loader])
    block = labels.manifest.block_crops(0)
    (part,) = epoch_draws(2, crops_per_image=2, num_crops=10, crops_per_block=block)
    for row, image in enumerate(labels):
        key_hash = LabelCache(labels, tmp_path).block(part.block)["key_hash"][row : row + 1]
        start = part.block * block
        chosen = start + draw(key_hash, np.ones((1, block), np.float32), part, seed=3)[0]
        pixels = decode_rgb((photos / f"{image.key}.jpg").read_bytes())
        crops = Crops(boxes=image.boxes[chosen], flip=image.flip[chosen])
        assert torch.equal(images[2 * row : 2 * row + 2], replay(pixels, crops, size=32))
        expected = calibrate(
            KEEP_ALL,
            class_index=image.class_index[chosen],
            class_prob=image.class_prob[chosen],
            codes=image.bucket[chosen],
            target=np.full(2, image.target),
            num_classes=10,
        )
        torch.testing.assert_close(dense[2 * row : 2 * row + 2], expected.dense())


SETTINGS = {
    "plain": {},
    "selfmix": {"selfmix": fd.SelfMix(prob=0.7, mode="both", per="sample"), "calibration": "ferkd"},
    "spread": {"spread": 3},
    "shards": {"order": "shards", "shards_together": 2},
    "short last batch": {"drop_last": False, "batch_size": 12},
    "bicubic, one crop": {"interpolation": "bicubic", "crops_per_image": 1},
    "draws cross blocks": {"crops_per_image": 4},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_number_of_workers_changes_nothing(make, name):
    alone, two = make(**SETTINGS[name]), make(num_workers=2, **SETTINGS[name])
    for epoch in (0, 1):
        for loader in (alone, two):
            loader.set_epoch(epoch)
        assert same(contents(alone), contents(two))


RESUMED = SETTINGS | {"shards, spread": {"order": "shards", "shards_together": 2, "spread": 3}}


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
@pytest.mark.parametrize("name", RESUMED)
def test_resume_after_every_batch(make, name, layout, tar_label_set):
    changes = RESUMED[name] | ({"labels": tar_label_set, "images": None} if layout == "webdataset" else {})
    whole = contents(make(**changes))
    for stop in range(1, len(whole) + 1):
        first = make(**changes)
        for number, _ in enumerate(first, 1):
            if number == stop:
                break
        state = first.state_dict()
        second = make(**changes)
        second.load_state_dict(state)
        if stop < len(whole):
            assert same(contents(second), whole[stop:])
        else:
            assert second.epoch == 1 and len(contents(second)) == len(whole)


def test_a_resumed_loader_reads_nothing_that_was_consumed(make, monkeypatch):
    loader = make()
    stream = iter(loader)
    for _ in range(3):
        next(stream)
    second = make()
    second.load_state_dict(loader.state_dict())
    read = []
    original = second._maker.images.read
    monkeypatch.setattr(second._maker.images, "read", lambda row, record: read.append(row) or original(row, record))
    assert len(list(second)) == 2
    assert len(read) == 8


def test_ranks_share_an_epoch_and_resume_with_other_ranks(make):
    def keys(loaders):
        return [image.tobytes() for loader in loaders for images, _ in loader for image in images.numpy()]

    one = sorted(keys([make(drop_last=False)]))
    two = sorted(keys([make(rank=rank, world_size=2, batch_size=4) for rank in range(2)]))
    assert one == two
    for changes in ({"batch_size": 4}, {"batch_size": 4, "spread": 3}):
        loaders = [make(rank=rank, world_size=2, **changes) for rank in range(2)]
        begun = []
        for loader in loaders:
            stream = iter(loader)
            for _ in range(2):
                begun += [image.tobytes() for image in next(stream)[0].numpy()]
        assert loaders[0].state_dict() == loaders[1].state_dict()
        last = make(**changes)
        last.load_state_dict(loaders[0].state_dict())
        assert sorted(begun + keys([last])) == one


def test_a_state_of_another_loader_names_both_values(make, tar_label_set):
    state = make().state_dict()
    with pytest.raises(StateMismatchError, match=r"batch_size: saved 8, now 4.*seed: saved 0, now 9"):
        make(batch_size=4, seed=9).load_state_dict(state)
    with pytest.raises(StateMismatchError, match="labels: saved"):
        make(labels=tar_label_set).load_state_dict(state)
    with pytest.raises(StateMismatchError, match="calibration"):
        make(calibration="ferkd").load_state_dict(state)
    with pytest.raises(StateMismatchError, match="version: saved None, now 1"):
        make().load_state_dict({})


DAMAGED = {
    "none": (None, "its place must hold epoch, images, crops, .*; it is None"),
    "a list": ([0, 0], r"must hold epoch, .*; it is \[0, 0\]"),
    "a field is missing": ({"images": 0}, "must hold epoch"),
    "a field too many": (lambda place: {**place, "shards": 1}, "'shards': 1"),
    "text": (lambda place: {**place, "images": "8"}, "images of its place is '8', not a number"),
    "a fraction": (lambda place: {**place, "crops": 0.5}, "crops of its place is 0.5, not a number"),
    "yes": (lambda place: {**place, "epoch": True}, "epoch of its place is True"),
    "negative": (lambda place: {**place, "epoch": -1}, "epoch of its place is -1"),
    "beyond the images": (lambda place: {**place, "images": 21}, "is in no epoch of 20 images with 2 crops of each"),
    "crops of no window": (lambda place: {**place, "crops": 8}, "is in no epoch"),
    "a window without crops": (lambda place: {**place, "window_batches": 1, "window_ranks": 2}, "is in no epoch"),
    "a huge window": (lambda place: {**place, "crops": 1, "window_batches": 10**9, "window_ranks": 1}, "in no epoch"),
    "crops beyond their window": (
        lambda place: {**place, "crops": 8, "window_batches": 1, "window_ranks": 1},
        "in no epoch",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_state_that_no_loader_saved(make, damage):
    change, message = DAMAGED[damage]
    loader = make()
    state = loader.state_dict()
    state["place"] = change(state["place"]) if callable(change) else change
    with pytest.raises(StateMismatchError, match=f"this state is damaged: .*{message}"):
        loader.load_state_dict(state)
    with pytest.raises(StateMismatchError, match="a loader's state is a dictionary"):
        loader.load_state_dict(list(state))
    assert loader.epoch == 0 and len(list(loader)) == 5


def test_a_torch_loader_around_it_is_refused(make):
    with pytest.raises(UsageError, match=r"iterate over it as it is, .*CropDataset is for a DataLoader of your own"):
        next(iter(torch.utils.data.DataLoader(make())))


def test_all_crops_are_seen_once_before_any_again(make):
    loader = make(crops_per_image=2, batch_size=4)
    seen = []
    for epoch in range(5):
        loader.set_epoch(epoch)
        seen += [image.tobytes() for images, _ in loader for image in images.numpy()]
    assert len(seen) == 200 and len(set(seen)) > 195


def test_spread_batches_hold_different_images(make):
    def groups(loader):
        """Largest number of crops of one image in a batch, by the images' targets under hard recovery."""
        labels = fd.open_labels(loader.labels.location)
        assert len(labels) == 20
        window = next(windows(loader._shape(0), Cursor(), rank=0, world_size=1))
        image_of = {int(slot): i for i, row in enumerate(window.slots) for slot in row}
        return [
            max(np.bincount([image_of[slot] for slot in range(start, start + 8)]))
            for start in range(0, sum(window.batches), 8)
        ]

    assert set(groups(make())) == {2}
    assert set(groups(make(spread=True))) == {1}


def damaged(photos, folder, change):
    copy = shutil.copytree(photos, folder)
    change(copy / "class3/photo0013.jpg")
    return copy


def other_picture(path):
    Image.new("RGB", (64, 48), "red").save(path)


DAMAGE = {
    "corrupt": (lambda path: path.write_bytes(path.read_bytes()[:300]), "digest differs"),
    "another picture": (other_picture, "digest differs"),
    "another size": (lambda path: Image.new("RGB", (30, 20)).save(path), "digest differs"),
    "missing": (lambda path: path.unlink(), None),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", DAMAGE)
def test_an_image_that_cannot_be_used(make, photos, tmp_path, name, num_workers):
    change, message = DAMAGE[name]
    images = damaged(photos, tmp_path / "photos", change)
    if message is None:
        with pytest.raises(LabelSetError, match=r"1 of 20 labelled images are missing.*'class3/photo0013'"):
            make(images=images)
    else:
        loader = make(images=images, num_workers=num_workers)
        with pytest.raises(LoaderError, match=rf"'class3/photo0013' \(shard 0 .*{message}"):
            list(loader)
    loader = make(images=images, num_workers=num_workers, on_error="skip")
    with pytest.warns(UserWarning, match="'class3/photo0013' .*another image of the epoch takes its place"):
        sizes = [len(batch) for batch, targets in loader if len(batch) == len(targets)]
    assert sizes == [8] * 5 and loader.skipped == 1


def test_an_image_is_compared_when_it_is_first_read_in_whatever_epoch(make, photos, tmp_path):
    loader = make(images=damaged(photos, tmp_path / "other", other_picture))
    loader.set_epoch(5)
    with pytest.raises(LoaderError, match="digest differs"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_image_is_left_out_in_every_epoch_and_after_a_resume(make, photos, tmp_path, num_workers):
    settings = {"on_error": "skip", "num_workers": num_workers, "crops_per_image": 1, "batch_size": 4}
    with pytest.warns(UserWarning, match="'class3/photo0013'"):
        loader = make(images=damaged(photos, tmp_path / "other", other_picture), **settings)
        for epoch in range(3):
            seen = [(images.clone(), loader.state_dict()) for images, _ in loader]
            assert loader.skipped == epoch + 1
            assert not any((images[:, 0] > 200).flatten(1).all(1).any() for images, _ in seen), "red"
        again = make(images=tmp_path / "other", **settings)
        again.load_state_dict(seen[0][1])
        assert len(list(again)) == 4
        list(again)
        assert 1 <= again.skipped <= 2


def test_an_image_is_hashed_once(make, monkeypatch):
    hashed = []

    def count(data):
        hashed.append(data)
        return image_digest(data)

    monkeypatch.setattr("ferkd_data.loader.batch_maker.image_digest", count)
    loader = make()
    for verify, expected in (("first_epoch", 20), ("always", 40), ("never", 0)):
        hashed.clear()
        loader = make(verify_images=verify)
        for _ in range(2):
            list(loader)
        assert len(hashed) == expected, verify


def test_without_digests_a_corrupt_image_is_still_found(make, photos, tmp_path):
    for name, message in {"corrupt": "truncated", "another size": "30x20 pixels, 64x48 were labelled"}.items():
        images = damaged(photos, tmp_path / name, DAMAGE[name][0])
        with pytest.raises(LoaderError, match=message):
            list(make(images=images, verify_images="never"))
    images = damaged(photos, tmp_path / "other", other_picture)
    assert len(list(make(images=images, verify_images="never"))) == 5


def test_a_truncated_shard_names_itself(make, label_set, tmp_path):
    copy = shutil.copytree(label_set, tmp_path / "copy")
    loader = make(labels=copy)
    shard = copy / "labels/00001-000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(fd.FerkdError, match=r"00001-000.parquet: \d+ bytes, the manifest says"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_left_early_disturbs_nothing(make, num_workers):
    loader = make(batch_size=4, num_workers=num_workers)
    held = next(iter(loader))
    loader.set_epoch(1)
    list(loader)
    loader.set_epoch(0)
    batches = contents(loader)
    expected = contents(make(batch_size=4))
    assert same(batches, expected)
    assert same(contents([held]), expected[:1])


def test_a_second_iteration_ends_the_first(make):
    loader = make(batch_size=4)
    first = iter(loader)
    next(first)
    next(iter(loader))
    with pytest.raises(LoaderError, match="another one over the same loader"):
        next(first)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_a_copy_goes_on_as_the_loader_would(make, copied, num_workers):
    """Also one made while an iteration is under way, as launchers that spawn processes make them."""
    loader, untouched = make(num_workers=num_workers, keys=True), list(make(keys=True, seed=0))
    batches = iter(loader)
    next(batches)
    other = copied(loader)
    assert [targets.keys for _, targets in batches] == [targets.keys for _, targets in untouched[1:]]
    assert same(contents(other), contents(loader))
    if copied is copy.deepcopy:
        del loader, batches
        gc.collect()
        # In the process, a copy may outlive its original.
        assert len(list(other)) == 5


def test_a_copy_without_its_original_says_so(make, tmp_path):
    for changes in ({}, {"keys": True}):
        loader = make(**changes)
        pickled = pickle.dumps(loader)
        del loader
        gc.collect()
        with pytest.raises(LoaderError, match="A copy works only as long as the original exists"):
            next(iter(pickle.loads(pickled)))


def test_an_iterator_that_lives_to_the_end_of_the_program_is_silent(label_set, photos, tmp_path):
    # What builtins hold goes last, when nothing can be imported any more.
    program = (
        "import builtins, sys, ferkd_data as fd\n"
        "labels, photos, cache = sys.argv[1:]\n"
        "loader = fd.CropLoader(fd.open_labels(labels), images=photos, batch_size=4, size=16, cache_dir=cache)\n"
        "len(loader)\n"
        "builtins.kept = iter(loader)\n"
        "next(builtins.kept)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, label_set, photos, tmp_path / "cache"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and not done.stderr


def test_a_default_device_is_no_place_for_batches(make):
    """Users set CUDA as the default; "meta" stands in for it, and holds no pixels at all."""
    settings = [{"selfmix": fd.SelfMix(prob=1, mode=mode), "keys": True} for mode in ("cutmix", "mixup")]
    settings += [{"decode_device": "cpu"}, {"targets": "dense"}, {"num_workers": 1}]
    expected = [list(make(**changes)) for changes in settings]
    torch.set_default_device("meta")
    try:
        found = [list(make(**changes)) for changes in settings]
        for changes, batches, wanted in zip(settings, found, expected, strict=True):
            for (images, targets), (pixels, soft) in zip(batches, wanted, strict=True):
                assert torch.equal(images, pixels) and torch.equal(fd.normalize(images), fd.normalize(pixels))
                if changes.get("targets") == "dense":
                    assert torch.equal(targets, soft)
                    continue
                assert targets.hard_share.device.type == "cpu" and targets[[1, 0]].keys == soft[[1, 0]].keys
                mixed, other = (
                    fd.Mixup()(x, t, rng=np.random.default_rng(0)) for x, t in ((images, targets), (pixels, soft))
                )
                assert torch.equal(mixed[0], other[0]) and torch.equal(mixed[1].dense(), other[1].dense())
    finally:
        torch.set_default_device(None)


def test_blocks_are_unpacked_once_and_dropped(make, tmp_path):
    loader = make(crops_per_image=4)

    def blocks():
        return sorted(path.name for path in (tmp_path / "cache").rglob("block-*.npy"))

    list(loader)
    assert blocks() == ["block-000.npy"]
    first = next((tmp_path / "cache").rglob("block-000.npy")).stat().st_ino
    list(make(crops_per_image=4))
    assert next((tmp_path / "cache").rglob("block-000.npy")).stat().st_ino == first
    loader.set_epoch(1)
    list(loader)
    assert blocks() == ["block-001.npy"]
    loader.set_epoch(2)
    list(loader)
    assert blocks() == ["block-000.npy", "block-002.npy"]


def test_a_damaged_cache_is_made_again(make, tmp_path):
    expected = contents(make())
    cached = next((tmp_path / "cache").rglob("block-000.npy"))
    for rubbish in (b"", b"rubbish", cached.read_bytes()[:-100]):
        cached.write_bytes(rubbish)
        assert same(contents(make()), expected)


def test_images_from_tars_and_parquet_are_the_same(make, photos, tmp_path, tar_label_set):
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = contents(make())
    assert same(contents(make(images=str(tar_label_set / "shards/*.tar"))), expected)
    files = sorted(photos.rglob("*.jpg"))
    keys = [file.relative_to(photos).with_suffix("").as_posix() for file in files]
    table = pa.table({"key": keys, "image": [{"bytes": file.read_bytes()} for file in files]})
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=6)
    assert same(contents(make(images=tmp_path / "images.parquet")), expected)


def test_fewer_crops_than_were_labelled(make, label_set):
    loader = make(labels=fd.open_labels(label_set, crops=6), crops_per_image=2)
    seen = set()
    for epoch in range(3):
        loader.set_epoch(epoch)
        seen |= {image.tobytes() for images, _ in loader for image in images.numpy()}
    assert 110 <= len(seen) <= 120


def test_a_schedule_changes_the_targets(make):
    loader = make(calibration=hard_at_first)
    first = contents(loader)
    loader.set_epoch(1)
    second = contents(loader)
    assert all((targets.max(1).values == 1).all() for _, targets in first)
    assert not all((targets.max(1).values == 1).all() for _, targets in second)


def hard_at_first(epoch):
    return fd.Calibration(
        extreme_hard="keep", moderate_hard="keep", recovery="hard" if epoch == 0 else "smooth", all_discarded="keep"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, "must be a multiple of crops_per_image"),
        ({"batch_size": 1000}, "make no batch of 1000"),
        ({"size": 0}, "size must be"),
        ({"interpolation": "nearest"}, "bilinear, bicubic"),
        ({"spread": 3, "crops_per_image": 4}, "at least that many"),
        ({"spread": True, "selfmix": fd.SelfMix()}, "side by side"),
        ({"crops_per_image": 1, "selfmix": fd.SelfMix()}, "side by side"),
        ({"rank": 2, "world_size": 2}, r"rank must be 0\.\.1"),
        ({"order": "random"}, "order must be"),
        ({"verify_images": "sometimes"}, "verify_images"),
        ({"calibration": "ferdk"}, "fkd, ferkd or blend"),
        ({"calibration": 3}, "fkd, ferkd or blend; got 3"),
        ({"calibration": lambda epoch: None}, "must return a Calibration for every epoch; for 0 it gave None"),
        ({"selfmix": True}, "selfmix must be a SelfMix"),
        ({"size": 32.0}, r"size must be a whole number \(a side in pixels: crops are square\), got 32\.0"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"prefetch_factor": 0}, "prefetch_factor must be at least 1"),
        ({"images": None}, "holds no images"),
    ],
)
def test_settings_that_cannot_be_right(make, changes, message):
    with pytest.raises(UsageError, match=message):
        make(**changes)


def test_labels_that_nobody_opened(photos):
    with pytest.raises(UsageError, match=r"as fd.open_labels\('labels'\) opens it"):
        fd.CropLoader("labels", images=photos, batch_size=8)


@pytest.mark.parametrize(("root", "theirs"), [(".", "photos/class0/photo0000"), ("photos/class0", "photo0000")])
def test_images_of_another_root(make, photos, tmp_path, root, theirs):
    shutil.copytree(photos, tmp_path / "root/photos")
    shutil.copytree(photos / "class1", tmp_path / "root/zebra")
    with pytest.raises(
        LabelSetError, match=rf"no image of folder .*'class0/photo0000'\); keys there look like .*'{theirs}'"
    ):
        make(images=tmp_path / "root" / root)


def test_a_cache_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").touch()
    for order in ("global", "shards"):
        with pytest.raises(LoaderError, match=r"cannot be kept there .*; give cache_dir=, or set FERKD_DATA_CACHE"):
            next(iter(make(cache_dir=tmp_path / "file", order=order)))


def test_images_of_another_data_set(make, make_photos, tmp_path):
    other = make_photos(tmp_path / "other", 3)
    (other / "class0").rename(other / "renamed")
    (other / "class1").rename(other / "renamed1")
    (other / "class2").rename(other / "renamed2")
    with pytest.raises(LabelSetError, match=r"no image of folder other has a key.*class0/photo0000"):
        make(images=other)


# All but crops that the teachers give to one class with probability 1.
EVERYTHING = fd.Thresholds(low=1.0, mid=1.0, top=1.0)


@pytest.mark.parametrize(
    "more", [{}, {"num_workers": 1}, {"decode_device": "cpu"}, {"calibration": lambda epoch: discarding(EVERYTHING)}]
)
def test_a_calibration_that_discards_everything_is_warned_of_once(make, more):
    """All targets would be the smoothed ground truth: a training without soft labels that looks like another one."""
    loader = make(**({"calibration": discarding(EVERYTHING)} | more))
    with pytest.warns(UserWarning, match=r"^9\d% of the crops so far are of images whose crops are all") as said:
        for _ in range(2):
            list(loader)
    assert len(said) == 1


def test_crops_that_are_discarded_and_drawn_are_counted(make, label_set):
    p_max = np.sort(np.concatenate([image.class_prob[:, 0] for image in fd.open_labels(label_set)])).astype(float)
    most = make(calibration=discarding(fd.Thresholds(low=p_max[len(p_max) * 3 // 4], mid=1.0, top=1.0)))
    with pytest.warns(UserWarning, match=r"of the crops so far are of images whose crops are all discarded"):
        given = sum(int((targets.bucket == 0).sum()) for _, targets in most)
    assert 0 < given == most._discarded.discarded < most._discarded.crops == 40
    # A crop is discarded, and its image has others in use: nothing to say.
    one = make(calibration=discarding(fd.Thresholds(low=p_max[1], mid=1.0, top=1.0)))
    assert not any((targets.bucket == 0).any() for _, targets in one) and one._discarded.discarded == 0


def discarding(thresholds):
    return fd.Calibration(extreme_hard="discard", thresholds=thresholds)


def test_images_and_targets_are_page_locked(make, monkeypatch):
    """There is no page-locked memory without a GPU, so the calls are counted here."""
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tuple(tensor.shape)), tensor)[1])
    images, targets = next(iter(make(pin_memory=True)))
    fields = [getattr(targets, name) for name in TENSORS]
    assert pinned == [tuple(part.shape) for part in (images, *fields) if part is not None]
    pinned.clear()
    images, dense = next(iter(make(pin_memory=True, targets="dense")))
    assert pinned == [tuple(images.shape), tuple(dense.shape)]
    pinned.clear()
    # A batch of a window at a time.
    images, _ = next(iter(make(pin_memory=True, spread=True)))
    assert pinned[0] == tuple(images.shape)
