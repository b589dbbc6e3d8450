"""Loaders of several crop kinds: `kinds={"global": 2, "local": 3}`."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from servers import serve

import ferkd_data as fd
from ferkd_data.errors import LoaderError, StateMismatchError, UsageError
from ferkd_data.images import decode_rgb
from ferkd_data.loader import batch_maker
from ferkd_data.loader.crops_and_targets import draw_seed
from ferkd_data.replay import replay

GLOBAL, LOCAL = "global:scale=0.25..1,size=40,n=4", "local:scale=0.05..0.25,size=24,n=6"
M = {"global": 2, "local": 3}
SIZES = {"global": 40, "local": 24}


@pytest.fixture(scope="module")
def built(tmp_path_factory, photos, tiny_teachers):
    """By layout: 20 images in 3 shards, 4 global crops and 6 local ones."""
    folder = tmp_path_factory.mktemp("kinds")
    few = {"top_k": 4, "images_per_shard": 8, "device": "cpu", "crops_per_block": 4}
    for layout in ("parquet", "webdataset"):
        fd.build(photos, folder / layout, teachers=[tiny_teachers], crop_kinds=[GLOBAL, LOCAL], layout=layout, **few)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(built, photos, cache):
    def make_(layout="parquet", labels=None, **changes):
        labels = labels or fd.open_labels(built / layout)
        images = photos if layout == "parquet" else None
        return fd.CropLoader(
            labels, **{"images": images, "batch_size": 8, "kinds": M, "cache_dir": cache, "seed": 3, **changes}
        )

    return make_


@pytest.fixture
def alone(make, built):
    """A loader of one kind, with the same images in its batches."""

    def alone_(kind, layout="parquet", images_of_batch=4, crops=None, size=None, **changes):
        labels = fd.open_labels(built / layout).crop_kind(kind)
        crops = crops or M[kind]
        changes = {"size": size or SIZES[kind], **changes}
        return make(layout, labels, kinds=None, crops_per_image=crops, batch_size=images_of_batch * crops, **changes)

    return alone_


def plain(targets):
    return targets.numpy() if isinstance(targets, torch.Tensor) else targets.dense().numpy()


def contents(loader, kind=None):
    """All batches of an epoch as arrays, of one kind where it is given."""
    batches = [(images, targets) for images, targets in loader]
    if kind is not None:
        batches = [(images[kind], targets[kind]) for images, targets in batches]
    return [(images.numpy().copy(), plain(targets)) for images, targets in batches]


def everything(loader):
    return [
        {kind: (images[kind].numpy().copy(), plain(targets[kind])) for kind in images} for images, targets in loader
    ]


def same(a, b):
    return len(a) == len(b) > 0 and all(np.array_equal(x, y) for one, two in zip(a, b, strict=True)
                                        for x, y in zip(one, two, strict=True))  # fmt: skip


def same_kinds(a, b):
    return len(a) == len(b) > 0 and all(
        list(x) == list(y) and same(list(x.values()), list(y.values())) for x, y in zip(a, b, strict=True)
    )


def test_one_kind_shares_its_blocks_with_a_loader_of_its_view(make, alone, tmp_path):
    def blocks():
        return {path for path in tmp_path.rglob("*") if path.is_file()}

    plain_batches = contents(alone("global", cache_dir=tmp_path))
    unpacked = blocks()
    assert same(contents(make(kinds={"global": 2}, cache_dir=tmp_path), "global"), plain_batches)
    assert unpacked and blocks() == unpacked


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
@pytest.mark.parametrize("order", ["global", "shards", "sequential"])
def test_a_batch_has_crops_of_each_kind(make, layout, order):
    loader = make(layout, order=order)
    assert len(loader) == 5
    for images, targets in loader:
        assert list(images) == list(targets) == ["global", "local"]
        assert images["global"].shape == (8, 3, 40, 40) and images["local"].shape == (12, 3, 24, 24)
        assert images["global"].dtype == torch.uint8
        assert images["local"].is_contiguous(memory_format=torch.channels_last)
        assert len(targets["global"]) == 8 and len(targets["local"]) == 12
        # The crops of image i lie side by side, in both.
        rows = [targets[kind].rows.reshape(4, M[kind]) for kind in M]
        assert (rows[0] == rows[0][:, :1]).all() and (rows[0][:, :1] == rows[1]).all()


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_the_crops_are_the_builder_s(make, built, photos, layout):
    """Each crop is one of those that were labelled of its image, to the pixel, with that crop's soft label."""
    labels = fd.open_labels(built / layout)
    loader = make(layout, calibration="fkd")
    for images, targets in loader:
        for kind in M:
            stored = labels.crop_kind(kind)
            for crop, row, target in zip(images[kind], targets[kind].rows, targets[kind].dense(), strict=True):
                image = stored[int(row)]
                pixels = decode_rgb((photos / f"{image.key}.jpg").read_bytes(), max_pixels=10**6)
                cut = replay(pixels, image.crops, size=SIZES[kind])
                found = [n for n in range(len(cut)) if torch.equal(cut[n], crop)]
                assert found, f"no {kind} crop of {image.key} looks like this"
                top = torch.from_numpy(image.class_prob[found].astype(np.float32))
                expected = target[torch.from_numpy(image.class_index[found].astype(np.int64))]
                assert torch.isclose(top, expected, atol=1e-3).all(dim=1).any()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.tuples(st.integers(1, 5), st.integers(1, 7)),
    sizes=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    images=st.integers(1, 5),
    order=st.sampled_from(["global", "shards", "sequential"]),
    layout=st.sampled_from(["parquet", "webdataset"]),
    epoch=st.integers(0, 9),
    turned=st.booleans(),
)
def test_each_kind_is_what_a_loader_of_it_alone_gives(make, alone, m, sizes, images, order, layout, epoch, turned):
    """So its crops, targets and order do not depend on the kinds beside it, nor on how many crops these have."""
    names = ["local", "global"] if turned else ["global", "local"]
    kinds, size = dict(zip(names, m, strict=True)), dict(zip(names, sizes, strict=True))
    loader = make(layout, kinds=kinds, size=size, batch_size=images * m[0], order=order)
    loader.set_epoch(epoch)
    whole = everything(loader)
    for name in names:
        single = alone(name, layout, images, crops=kinds[name], size=size[name], order=order)
        single.set_epoch(epoch)
        assert same([batch[name] for batch in whole], contents(single))


def test_kinds_are_drawn_independently(built, label_set):
    labels = fd.open_labels(built / "parquet")
    seeds = {draw_seed(labels.crop_kind(kind), seed) for kind in M for seed in (3, 4)} | {3, 4}
    assert len(seeds) == 6 and draw_seed(fd.open_labels(label_set), 3) == 3


def test_one_kind_of_several(make, alone):
    loader = make(kinds={"local": 3}, batch_size=12)
    batches = list(loader)
    assert list(batches[0][0]) == ["local"]
    assert same(contents(make(kinds={"local": 3}, batch_size=12), "local"), contents(alone("local")))
    assert [kind.name for kind in loader.labels.crop_kinds] == ["local"]


@pytest.mark.parametrize("order", ["global", "shards"])
def test_labels_on_a_server(make, built, tmp_path, order):
    with serve(built / "parquet") as server:
        labels = fd.open_labels(server.url, cache_dir=tmp_path / "shards")
        assert same_kinds(everything(make(labels=labels, order=order)), everything(make(order=order)))
        two = fd.open_labels(server.url, cache_dir=tmp_path / "others")
        before = dict(server.sent)
        # Into a cache of its own: blocks that are there already are not fetched.
        next(iter(make(labels=two, order=order, kinds={"local": 2}, cache_dir=tmp_path / "cache")))
        asked = [name for name in server.sent if server.sent[name] > before.get(name, 0) and name.startswith("labels/")]
    assert asked and not [name for name in asked if name.endswith("-000.parquet")]


def test_sizes_are_the_kinds_own_unless_said_otherwise(make):
    images, _ = next(iter(make(size={"global": 32})))
    assert images["global"].shape[-1] == 32 and images["local"].shape[-1] == 24


def test_workers_change_nothing(make):
    expected = everything(make()) + everything(make())
    loader = make(num_workers=2)
    loader._open_workers().wait()
    found = everything(loader)
    loader.set_epoch(0)
    assert same_kinds(found + everything(loader), expected)


def test_batches_that_are_kept_are_not_overwritten(make):
    """Their memory is used again only when no kind of the batch is held any more."""
    loader = make(num_workers=1, prefetch_factor=1)
    loader._open_workers().wait()
    kept, copies = [], []
    for epoch in range(4):
        loader.set_epoch(epoch)
        for images, _ in loader:
            kept.append(images["local"] if len(kept) % 2 else images["global"][2:])
            copies.append(kept[-1].clone())
    assert len(kept) == 20 and all(map(torch.equal, kept, copies))
    slots = loader._workers._buffers
    del kept, images
    assert len(slots._free) == 1 * 1 + 3


def test_a_saved_kind_does_not_take_the_others_along(make):
    images, _ = next(iter(make()))
    stream = io.BytesIO()
    torch.save(images["local"], stream)
    assert len(stream.getvalue()) < images["local"].numel() + 2000


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resume_goes_on_with_the_next_batch(make, num_workers):
    whole = [batch for epoch in range(3) for batch in everything(make_at(make, epoch))]
    for stop in (1, 5, 7):
        loader = make(num_workers=num_workers)
        for _ in range(stop // 5):
            everything(loader)
        for _ in zip(range(stop % 5), loader, strict=False):
            pass
        state = json.loads(json.dumps(loader.state_dict()))
        again = make(num_workers=num_workers)
        again.load_state_dict(state)
        rest = everything(again) + everything(again)
        assert same_kinds(rest, whole[stop : stop + len(rest)])


def make_at(make, epoch):
    loader = make()
    loader.set_epoch(epoch)
    return loader


@pytest.mark.parametrize(
    "changes",
    [{"kinds": {"global": 2, "local": 4}}, {"kinds": {"global": 2}}, {"size": {"local": 32}},
     {"kinds": {"local": 3, "global": 2}, "batch_size": 12}],
)  # fmt: skip
def test_a_state_of_other_kinds_is_refused(make, changes):
    state = make().state_dict()
    with pytest.raises(StateMismatchError, match=r"saved by another loader: .*(kinds|labels)"):
        make(**changes).load_state_dict(state)


def test_a_state_of_a_loader_without_kinds_is_refused(make, alone):
    with pytest.raises(StateMismatchError, match="kinds"):
        make(kinds={"local": 3}, batch_size=12).load_state_dict(alone("local").state_dict())


def test_ranks_get_different_images_of_all_kinds(make):
    rows = [
        [sorted(set(targets[kind].rows.tolist())) for _, targets in make(rank=rank, world_size=2) for kind in M]
        for rank in (0, 1)
    ]
    assert all(one == other for one, other in zip(rows[0][::2], rows[0][1::2], strict=True))
    assert not set().union(*rows[0]) & set().union(*rows[1])


def test_the_last_batch_may_be_short(make):
    batches = list(make(batch_size=12, drop_last=False))
    assert [len(images["global"]) for images, _ in batches] == [12, 12, 12, 4]
    assert [len(targets["local"]) for _, targets in batches] == [18, 18, 18, 6]
    assert Counter(torch.cat([targets["local"].rows for _, targets in batches]).tolist()) == dict.fromkeys(range(20), 3)


def test_an_image_is_read_and_decoded_once(make, monkeypatch):
    decoded, read = [], []
    loader = make(order="sequential")
    monkeypatch.setattr(
        batch_maker, "decode_checked", lambda *args, old=batch_maker.decode_checked: decoded.append(1) or old(*args)
    )
    old = loader._maker.images.read
    monkeypatch.setattr(loader._maker.images, "read", lambda *args: read.append(1) or old(*args))
    assert len(list(loader)) == 5
    assert len(decoded) == len(read) == 20
    stats = loader.stats()
    assert (stats.images, stats.crops) == (20, 20 * 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"selfmix": fd.SelfMix(prob=1.0)},
        {"selfmix": fd.SelfMix(prob=0.5, mode="mixup", per="sample")},
        {"calibration": fd.Calibration(moderate_hard="blend", hard_positive="soften")},
        {"calibration": lambda epoch: fd.Calibration.fkd()},
        {"targets": "dense"},
        {"interpolation": "bicubic"},
        {"transform": lambda crop: crop.flip(2) if random.random() < 0.5 else crop + torch.randint(9, ()).byte()},
    ],
    ids=["cutmix", "mixup", "calibration", "schedule", "dense", "bicubic", "transform"],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_settings_hold_for_each_kind(make, alone, changes, num_workers):
    loader = make(num_workers=num_workers, **changes)
    if num_workers:
        loader._open_workers().wait()
    whole = everything(loader)
    for kind in M:
        assert same([batch[kind] for batch in whole], contents(alone(kind, **changes)))


def test_selfmix_stays_within_a_kind_and_an_image(make):
    for _, targets in make(selfmix=fd.SelfMix(prob=1.0)):
        for kind in M:
            assert torch.equal(targets[kind].hard, targets[kind].hard_partner)


def test_keys_and_to_batch(make, built):
    keys = list(fd.open_labels(built / "parquet").keys())
    loader = make(keys=True, to_batch=lambda images, targets: {"x": images, "y": targets})
    for batch in loader:
        for kind, targets in batch["y"].items():
            assert list(targets.keys) == [keys[row] for row in targets.rows.tolist()]
            assert len(batch["x"][kind]) == len(targets)


def test_other_classes_and_some_images(make, built):
    labels = fd.open_labels(built / "parquet").select(rows=range(12)).map_classes({0: "a", 1: "b"}, keep_images=True)
    for images, targets in make(labels=labels, calibration="fkd"):
        assert targets["local"].dense().shape == (12, 2) and len(images["local"]) == 12


def test_an_ensemble_of_sets_with_kinds(make, built):
    labels = fd.open_labels([built / "parquet", built / "parquet"])
    assert same_kinds(everything(make(labels=labels, calibration="fkd"))[:1], everything(make(calibration="fkd"))[:1])


@pytest.fixture
def damaged(photos, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "photos")
    for name in ("class3/photo0003.jpg", "class7/photo0017.jpg"):
        (copy / name).write_bytes((copy / name).read_bytes()[:300])
    return copy


def test_an_image_that_cannot_be_used(make, damaged):
    with pytest.raises(LoaderError, match=r"class[37]/photo00[01][37]"):
        list(make(images=damaged))
    with pytest.warns(UserWarning, match="left out, and another image"):
        loader = make(images=damaged, on_error="skip")
        batches = list(loader)
    assert loader.skipped == 2 and len(batches) == 5
    for _, targets in batches:
        assert torch.equal(targets["global"].rows[::2], targets["local"].rows[::3])


def test_images_that_are_missing(make, damaged):
    (damaged / "class3/photo0003.jpg").unlink()
    with pytest.warns(UserWarning, match="1 of 20 labelled images are missing"):
        loader = make(images=damaged, images_missing="drop", on_error="skip")
    assert len(loader.labels) == 19 and [kind.name for kind in loader.labels.crop_kinds] == ["global", "local"]
    with pytest.warns(UserWarning, match="left out, and another image"):
        rows = [(targets["global"].rows[::2], targets["local"].rows[::3]) for _, targets in loader]
    assert len(rows) == 4 and all(torch.equal(one, other) for one, other in rows)


def test_large_photos_are_decoded_smaller_only_where_all_kinds_allow_it(tiny_teachers, tmp_path, cache):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(noise).resize((1600, 1600), Image.Resampling.BICUBIC).save(tmp_path / "photos/a.jpg")
    kinds = ["big:scale=0.9..1,size=32,n=2,hflip=0", "small:scale=0.01..0.011,size=96,n=2"]
    fd.build(tmp_path / "photos", tmp_path / "out", teachers=[tiny_teachers], crop_kinds=kinds, top_k=2, device="cpu")
    labels = fd.open_labels(tmp_path / "out")

    def images(kinds, scale):
        given_ = {"images": tmp_path / "photos", "cache_dir": cache, "decode_scale": scale}
        return next(iter(fd.CropLoader(labels, kinds=kinds, batch_size=2, **given_)))[0]

    exact, reduced = images({"big": 2}, "exact"), images({"big": 2}, "auto")
    assert not torch.equal(exact["big"], reduced["big"])
    apart = (exact["big"].float() - reduced["big"].float()).abs()
    assert apart.mean() < 2
    both, whole = images({"big": 2, "small": 2}, "auto"), images({"big": 2, "small": 2}, "exact")
    assert torch.equal(both["small"], whole["small"]) and torch.equal(both["big"], whole["big"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crops_per_image": 4}, "crops_per_image and kinds exclude each other"),
        ({"kinds": {}}, "kinds is a dict"),
        ({"kinds": ["global", "local"]}, "kinds is a dict"),
        ({"kinds": 4}, "kinds is a dict"),
        ({"kinds": {"globl": 2}}, "kinds names the crop kind 'globl'; there are global, local"),
        ({"kinds": {"global": 0}}, r"kinds\['global'\] must be a whole number"),
        ({"kinds": {"global": True}}, r"kinds\['global'\] must be a whole number"),
        ({"kinds": {"global": 2.0}}, r"kinds\['global'\] must be a whole number"),
        ({"kinds": {"global": lambda epoch: 2}}, r"kinds\['global'\] must be a whole number"),
        ({"size": 160}, "with kinds, size is a dict by kind"),
        ({"size": lambda epoch: 160}, "with kinds, size is a dict by kind"),
        ({"size": {"globl": 160}}, "size names the crop kind 'globl'"),
        ({"kinds": {"global": 2}, "size": {"local": 160}}, "size names the crop kind 'local'; there are global"),
        ({"size": {"global": 0}}, r"size\['global'\] must be a whole number"),
        ({"batch_size": 9}, "batch_size 9 must be a multiple"),
        ({"spread": True}, "spread does not go with kinds"),
        ({"spread": 4}, "spread does not go with kinds"),
        ({"epoch": "crops"}, "epoch does not go with kinds"),
        ({"decode_device": "cpu"}, "decode_device does not go with kinds"),
        ({"kinds": {"global": 2, "local": 1}, "selfmix": fd.SelfMix()}, "at least 2 crops of 'local'"),
    ],
)
def test_what_cannot_be_is_refused_at_once(make, changes, words):
    with pytest.raises(UsageError, match=words):
        make(**changes)


def test_a_set_without_kinds(label_set, photos, cache):
    with pytest.raises(UsageError, match="was built without crop kinds"):
        fd.CropLoader(fd.open_labels(label_set), images=photos, batch_size=4, kinds={"global": 2}, cache_dir=cache)


def test_a_set_with_kinds_and_a_loader_without(make):
    with pytest.raises(UsageError, match=r"crop_kind\('global'\), or on several with CropLoader\(kinds="):
        make(kinds=None)


def test_no_preview(make, tmp_path):
    with pytest.raises(UsageError, match="make a loader of one kind"):
        fd.preview(make(), tmp_path / "batch.html")


def test_what_the_loader_says_of_itself(make):
    text = repr(make(size={"global": 32}))
    assert "4 images with 2 global of 32 px, 3 local of 24 px each" in text and "10 labelled crops" in text
