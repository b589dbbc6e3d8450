"""The next batch as a page: it shows what the loader gives, and the loader does not move."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import ferkd_data as fd
from ferkd_data.errors import LoaderError, UsageError
from ferkd_data.report.preview import _Batch, _labelled, _made


@pytest.fixture
def loader(label_set, photos, tmp_path):
    def make(**settings):
        settings = {"batch_size": 8, "crops_per_image": 4, "size": 32, "cache_dir": tmp_path / "cache", **settings}
        return fd.CropLoader(fd.open_labels(label_set), images=photos, **settings)

    return make


def same_batches(ours, theirs) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1].dense(), b[1].dense()) for a, b in pairs)


@pytest.mark.parametrize(
    "settings",
    [{}, {"selfmix": fd.SelfMix(prob=1.0)}, {"order": "shards"}, {"spread": True}, {"num_workers": 1}],
    ids=["plain", "selfmix", "shards", "spread", "worker"],
)
def test_the_loader_does_not_move(loader, tmp_path, settings):
    fresh = loader(**settings)
    undisturbed = [list(fresh) for _ in range(2)]
    looked_at = loader(**settings)
    fd.preview(looked_at, tmp_path / "first.html")
    state = looked_at.state_dict()
    epochs = []
    for _ in range(2):
        epoch = []
        for number, batch in enumerate(looked_at):
            epoch.append(batch)
            if number == 1:
                before = looked_at.state_dict()
                fd.preview(looked_at, tmp_path / "inside.html")
                assert looked_at.state_dict() == before
        epochs.append(epoch)
    assert loader(**settings).state_dict() == state
    assert all(same_batches(ours, theirs) for ours, theirs in zip(epochs, undisturbed, strict=True))


@pytest.mark.parametrize("mode", ["cutmix", "mixup"])
def test_it_shows_the_batch_that_comes_next(loader, mode):
    one = loader(selfmix=fd.SelfMix(prob=1.0, mode=mode))
    batches = iter(one)
    next(batches)
    maker, window = one.next_window()
    images, targets = _made(maker, window, 32)
    expected_images, expected = next(batches)
    assert torch.equal(images[:8], expected_images)
    assert torch.equal(targets[:8].dense(), expected.dense())


def test_partners_and_shares_are_those_that_were_mixed(loader):

    one = loader(selfmix=fd.SelfMix(prob=1.0))
    maker, window = one.next_window()
    plain = maker.alone(selfmix=None)
    after, before = _made(maker, window, 32), _made(plain, window, 32)
    batch = _Batch(one, maker, window, _labelled(plain, window), after, before)
    cards = [batch.card(slot) for slot in range(8)]
    mixed = [card for card in cards if card["partner"] is not None]
    assert len(mixed) >= 4
    dense_before, dense_after = before[1].dense().numpy(), after[1].dense().numpy()
    for card in mixed:
        slot, partner = card["number"], card["partner"]
        share = batch._partner(slot)[1]
        again = share * dense_before[slot] + (1 - share) * dense_before[partner]
        np.testing.assert_allclose(again, dense_after[slot], atol=1e-3)
        assert slot // 4 == partner // 4 and slot != partner


def test_the_page_says_what_calibration_did(label_set, photos, tmp_path):
    labels = fd.open_labels(label_set)
    thresholds = fd.Thresholds(low=0.2, mid=0.5, top=0.6)
    calibration = fd.Calibration(thresholds=thresholds, epsilon=0.2, easy_positive="thin(0.5)")
    loader = fd.CropLoader(
        labels, images=photos, batch_size=40, crops_per_image=2, size=32, calibration=calibration,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    text = fd.preview(loader, tmp_path / "page.html", crops=40).read_text(encoding="utf-8")
    assert "softened ground truth, epsilon 0.2" in text and "moderate hard" in text
    assert "50% of such crops are in use" in text
    assert "script-src &#39;none&#39;" in text and "<script" not in text
    _, targets = next(iter(loader))
    dense = targets.dense()
    shown = [float(value) for value in re.findall(r"target after calibration.*?class=.num.>([\d.]+)", text, re.DOTALL)]
    np.testing.assert_allclose(shown, dense.max(dim=1).values.numpy(), atol=6e-4)


def test_hostile_keys_are_text(hostile_labels, hostile_photos, tmp_path, browser):
    labels = fd.open_labels(hostile_labels)
    loader = fd.CropLoader(
        labels, images=hostile_photos, batch_size=62, crops_per_image=2, cache_dir=tmp_path / "cache"
    )
    page = fd.preview(loader, tmp_path / "page.html", crops=62)
    browser.open(page, width=360)
    assert browser.complaints() == [] and browser.run("return window.hacked") is None
    assert "<script>window.hacked=1" in browser.run("return document.body.textContent")
    assert browser.run("return document.documentElement.scrollWidth") <= 360


def test_errors_are_those_of_the_loader(loader, photos, tmp_path):
    with pytest.raises(UsageError, match="crops must be"):
        fd.preview(loader(), tmp_path / "page.html", crops=0)
    import shutil

    other = shutil.copytree(photos, tmp_path / "photos")
    one = fd.CropLoader(loader().labels, images=other, batch_size=80, cache_dir=tmp_path / "cache")
    shutil.copyfile(other / "class1/photo0001.jpg", other / "class0/photo0000.jpg")
    with pytest.raises(LoaderError, match="class0/photo0000"):
        fd.preview(one, tmp_path / "page.html")
