"""`loader.stats()`: the times add up, the bottleneck is the part that was made slow, and measuring changes nothing."""

from __future__ import annotations

import logging
import pickle
import time
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from servers import serve

import ferkd_data as fd
from ferkd_data.errors import LoaderError
from ferkd_data.images import open_source
from ferkd_data.loader import clocks
from ferkd_data.loader.clocks import STAGES
from ferkd_data.loader.kinds import KindOfBatch
from ferkd_data.loader.settings import LoaderSettings
from ferkd_data.loader.stats import ADVICE, Setup, _setup, cores_of_rank, judge

SETUP = Setup(num_workers=2, crops_per_image=4, spread=False, decode_device=False, cuda=False, cores=8)


@pytest.fixture
def make(label_set, photos, tmp_path):
    def make_(labels=label_set, **changes):
        settings = {"batch_size": 4, "crops_per_image": 2, "size": 32, "calibration": "fkd", "images": photos}
        loader = fd.CropLoader(fd.open_labels(labels), **(settings | {"cache_dir": tmp_path / "cache"} | changes))
        if loader.settings.num_workers:
            loader._open_workers().wait()
        return loader

    return make_


class Now:
    """A clock that stands still but for `pass_`."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def pass_(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def now(monkeypatch):
    now = Now()
    for module in (clocks,):
        monkeypatch.setattr(module, "perf_counter", now)
    return now


class Slow:
    """Images that take their time, and say so to whoever counts it."""

    def __init__(self, folder, wait) -> None:
        self.source, self.wait = open_source(folder), wait
        self.description, self.class_names = "slow images", None
        self.list_images, self.read = self.source.list_images, self.source.read

    def read_one(self, ref):
        self.wait()
        return self.source.read_one(ref)


def run(loader, step=lambda: None):
    for _ in loader:
        step()
    return loader.stats()


def test_times_and_counts_are_exact(make, photos, now):
    loader = make(images=Slow(photos, lambda: now.pass_(2)))
    found = run(loader, lambda: now.pass_(3))
    assert (found.epoch, found.batches, found.of_batches, found.images, found.crops) == (0, 10, 10, 20, 40)
    assert (found.wait_seconds, found.step_seconds, found.hand_over_seconds) == (40, 30, 0)
    assert found.stage_seconds == dict.fromkeys(STAGES, 0) | {"read": 40}
    assert (found.images_per_second, found.crops_per_second) == (20 / 70, 40 / 70)
    assert found.wait_share == 4 / 7 and found.stage_shares["read"] == 1
    assert found.bottleneck == "read" and "num_workers" in found.advice


def test_a_slow_step_is_the_bottleneck(make, photos, now):
    found = run(make(images=Slow(photos, lambda: now.pass_(0.01))), lambda: now.pass_(1))
    assert (found.bottleneck, found.step_seconds) == ("your step", 10)


def test_a_slow_to_batch_is_the_bottleneck(make, now):
    def to_batch(images, targets):
        now.pass_(1)
        return images, targets

    found = run(make(to_batch=to_batch))
    assert (found.bottleneck, found.hand_over_seconds) == ("hand-over", 10) and "to_batch" in found.advice


def test_a_slow_transform_is_the_bottleneck(make, now):
    def transform(crop):
        now.pass_(1)
        return crop

    loader = make(transform=transform)
    now.seconds = 0.0
    found = run(loader)
    assert found.bottleneck == "transform" and found.stage_seconds["transform"] == found.wait_seconds == 40


def test_unpacking_labels_is_told_apart(make, now, monkeypatch):
    loader = make()
    monkeypatch.setattr(loader._maker, "prepare_blocks", lambda epoch: now.pass_(5))
    found = run(loader, lambda: now.pass_(1))
    assert (found.prepare_seconds, found.seconds) == (5, 10) and "5.0 s to unpack labels" in str(found)


def test_time_after_a_loop_was_left_is_nobodys(make, now):
    loader = make()
    for number, _ in enumerate(loader):
        now.pass_(1)
        if number == 2:
            assert loader.stats().step_seconds == 3, "with the step that is under way"
            break
    now.pass_(100)
    found = loader.stats()
    assert (found.batches, found.of_batches, found.step_seconds) == (3, 10, 3)
    assert "3 of 10 batches" in str(found) and "3 of 10 batches" in found.line()


def test_each_iteration_begins_anew(make, now):
    loader = make()
    assert "no batch yet" in str(loader.stats()) and "no batch yet" in loader.stats().line()
    assert loader.stats().bottleneck == "unknown"
    first = run(loader, lambda: now.pass_(1))
    second = run(loader, lambda: now.pass_(2))
    assert (first.epoch, first.step_seconds) == (0, 10) and (second.epoch, second.step_seconds) == (1, 20)


def test_a_failed_iteration_leaves_nothing_behind(make, photos, now):
    def fail():
        now.pass_(50)
        if now.seconds > 200:
            raise OSError("gone")

    loader = make(images=Slow(photos, fail))
    with pytest.raises((OSError, LoaderError)):
        list(loader)
    loader._maker.images.source.wait = lambda: None
    assert sum(run(loader).stage_seconds.values()) == 0


def test_an_older_iteration_does_not_disturb(make, now):
    loader = make()
    old = iter(loader)
    next(old)
    new = iter(loader)
    next(new)
    now.pass_(3)
    with pytest.raises(LoaderError, match="ended when another one"):
        next(old)
    assert loader.stats().epoch == 1 and loader.stats().step_seconds == 3


def test_the_rest_of_an_epoch(make):
    loader = make()
    stream = iter(loader)
    for _ in range(4):
        next(stream)
    state = loader.state_dict()
    assert state == loader.state_dict(), "no clock in it"
    again = make()
    again.load_state_dict(state)
    found = run(again)
    assert (found.epoch, found.batches, found.of_batches, found.crops) == (0, 6, 6, 24)


def test_asking_does_not_move_the_loader(make):
    import torch

    expected = [images.clone() for images, _ in make()]
    loader = make()
    for (images, _), wanted in zip(loader, expected, strict=True):
        assert torch.equal(images, wanted)
        loader.stats()
    assert loader.epoch == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_workers": 2},
        {"num_workers": 2, "order": "shards"},
        {"num_workers": 1, "decode_device": "cpu"},
        {"decode_device": "cpu"},
        {"num_workers": 2, "spread": True},
        {"targets": "dense", "drop_last": False, "batch_size": 6},
    ],
)
def test_real_times_add_up(make, changes):
    """Of all stages; nothing is counted twice where one process does it all."""
    selfmix = None if changes.get("spread") else fd.SelfMix(prob=1.0)
    loader = make(selfmix=selfmix, **changes)
    begun = time.perf_counter()
    for epoch in range(2):
        found = run(loader)
        assert found.epoch == epoch and found.images == 20 and found.crops == 40
    elapsed = time.perf_counter() - begun
    expected = {"read", "decode", "cut", "label"} | ({"mix"} if selfmix else set())
    assert {stage for stage in ("read", "decode", "cut", "label", "mix") if found.stage_seconds[stage]} >= expected
    assert found.stage_seconds["transform"] == 0
    assert found.seconds + found.prepare_seconds <= elapsed
    total = sum(found.stage_seconds.values())
    if loader.num_workers == 0:
        assert 0.2 * found.wait_seconds < total <= found.wait_seconds
        assert found.here_share == 1 and found.stage_seconds["send"] == 0
    else:
        assert found.stage_seconds["send"] > 0, "of both epochs, which the second one includes"
    assert pickle.loads(pickle.dumps(found)) == found


def sleep_long():
    time.sleep(0.05)


@pytest.mark.parametrize("changes", [{}, {"decode_device": "cpu"}])
def test_workers_that_wait_for_a_disk(make, photos, changes):
    loader = make(images=Slow(photos, sleep_long), num_workers=2, batch_size=2, **changes)
    loader.set_epoch(1)
    found = run(loader)
    assert found.here_share < 0.5 and found.num_workers == 2
    assert found.stage_shares["read"] > 0.5 and found.stage_seconds["read"] >= 20 * 0.05
    assert found.bottleneck == "read" and "num_workers (now 2)" in found.advice


def test_workers_beside_a_slow_step(make, now):
    """The training's clock stands still while it waits; that of the workers is a real one."""
    found = run(make(num_workers=2), lambda: now.pass_(1))
    assert (found.bottleneck, found.step_seconds, found.wait_seconds) == ("your step", 10, 0)
    assert found.stage_seconds["decode"] > 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_slow_server_is_named_as_read(make, label_set, num_workers):
    with serve(label_set) as server:
        server.before_body = lambda name: time.sleep(1.0 if name.endswith(".parquet") else 0.0)
        found = run(make(server.url, order="shards", num_workers=num_workers, batch_size=8))
    assert found.stage_shares["read"] > 0.5 and found.bottleneck == "read"


def test_a_line_for_each_epoch(make, caplog):
    loader = make(log_stats=True)
    with caplog.at_level(logging.INFO, "ferkd_data.loader"):
        run(loader)
        next(iter(loader))
        run(loader)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" in ")[0] for line in lines] == [
        "epoch 0: 10 batches",
        "epoch 1: 1 of 10 batches",
        "epoch 2: 10 batches",
    ]
    assert all("images/s" in line and "bottleneck: " in line and "\n" not in line for line in lines)
    assert "log_stats=True" in repr(loader)


def test_ranks_say_which_they_are(make, caplog):
    with caplog.at_level(logging.INFO, "ferkd_data.loader"):
        run(make(log_stats=True, rank=1, world_size=2))
    assert caplog.messages[0].startswith("rank 1 of 2, epoch 0: 5 batches in")


def test_a_line_that_nobody_would_see_is_warned_of(make, caplog):
    with (
        caplog.at_level(logging.WARNING, "ferkd_data.loader"),
        pytest.warns(UserWarning, match="basicConfig"),
    ):
        run(make(log_stats=True))
    assert not caplog.messages


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_workers": 8},
        {"num_workers": 8, "cuda": True},
        {"num_workers": 8, "crops_per_image": 1},
        {"num_workers": 8, "crops_per_image": 1, "kinds": True},
        {"num_workers": 8, "cuda": True, "kinds": True},
        {"num_workers": 8, "cuda": True, "transform": True},
        {"num_workers": 8, "cuda": True, "decode_scale": True},
        {"num_workers": 8, "spread": True},
        {"decode_device": True, "cuda": True},
        {"num_workers": 0},
        {"num_workers": 0, "cores": 1},
    ],
)
def test_advice_is_one_line_that_fits_the_setup(stage, changes):
    setup = replace(SETUP, **changes)
    times = dict.fromkeys(STAGES, 1.0) | {stage: 5.0}
    bottleneck, advice = judge(setup, wait=9, hand_over=0, step=1, stages=times, here_share=0)
    assert bottleneck == stage and "\n" not in advice and 20 < len(advice) < 200
    if setup.num_workers == 0:
        assert f"num_workers={setup.cores}" in advice and stage in advice
    if setup.decode_device and stage in ("decode", "cut"):
        assert "decode_device" in advice
    # What the loader's settings would refuse beside each other.
    if setup.kinds or setup.transform or setup.decode_scale:
        assert "decode_device" not in advice
    if setup.kinds:
        assert "spread=True" not in advice
    if setup.decode_scale:
        assert "decode_scale" not in advice, "it is set"
    if not setup.free_cores:
        assert "raise num_workers from" not in advice, "there are no more cores"


def test_advice_by_stage():
    full = replace(SETUP, num_workers=8)

    def advice(stage, setup=SETUP):
        return ADVICE[stage](setup)

    assert set(ADVICE) == set(STAGES)
    assert "from 2 to 8" in advice("decode") and "from 2 to 8" in advice("cut")
    assert "spread=True" in advice("decode", replace(full, crops_per_image=1))
    assert "decode_device='cuda'" in advice("decode", replace(full, cuda=True))
    assert "decode_scale" in advice("decode", full)
    assert "disk" in advice("read") and "spread or batch_size" in advice("send", replace(SETUP, spread=True))


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, {}),
        ({"transform": lambda crop: crop}, {"transform": True}),
        ({"decode_scale": "auto"}, {"decode_scale": True}),
        ({"decode_device": "cpu"}, {"decode_device": True}),
        ({"kinds": (KindOfBatch("large", 2, 32), KindOfBatch("small", 6, 16))}, {"kinds": True}),
    ],
)
def test_the_setup_is_that_of_the_loader(monkeypatch, changes, known):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = LoaderSettings(**{"batch_size": 4, "crops_per_image": 2, "size": 32, **changes})
    plain = replace(SETUP, num_workers=0, crops_per_image=2, cuda=True, cores=cores_of_rank())
    assert _setup(settings, epoch=0) == replace(plain, **known)


def test_too_early_to_say():
    times = dict.fromkeys(STAGES, 1.0)
    bottleneck, advice = judge(SETUP, wait=9, hand_over=0, step=1, stages=times, here_share=0.9)
    assert bottleneck == "unknown" and "too early" in advice
    alone = replace(SETUP, num_workers=0)
    assert judge(alone, wait=9, hand_over=0, step=1, stages=times, here_share=1)[0] != "unknown"


def test_ranks_of_a_machine_share_its_cores():
    alone = cores_of_rank({})
    assert alone >= 1
    assert cores_of_rank({"LOCAL_WORLD_SIZE": "2"}) == max(1, alone // 2)
    assert cores_of_rank({"LOCAL_WORLD_SIZE": "100000"}) == 1
    assert cores_of_rank({"LOCAL_WORLD_SIZE": "none"}) == cores_of_rank({"LOCAL_WORLD_SIZE": "0"}) == alone


seconds = st.floats(0, 1e7)
counts = st.integers(0, 10**9)


@given(
    st.builds(
        fd.LoaderStats,
        epoch=counts,
        batches=counts,
        of_batches=counts,
        images=counts,
        crops=counts,
        prepare_seconds=seconds,
        wait_seconds=seconds,
        hand_over_seconds=seconds,
        step_seconds=seconds,
        stage_seconds=st.fixed_dictionaries(dict.fromkeys(STAGES, seconds)),
        num_workers=st.integers(0, 1000),
        here_share=st.floats(0, 1),
        bottleneck=st.sampled_from(("your step", "unknown", *STAGES)),
        advice=st.just(ADVICE["decode"](SETUP)),
    )
)
def test_any_figures_can_be_shown(found):
    assert all(len(line) < 80 and line == line.rstrip() for line in str(found).splitlines())
    assert repr(found) == str(found) and "\n" not in found.line()
    assert 0 <= found.wait_share <= 1 and all(0 <= share <= 1 for share in found.stage_shares.values())
    assert sum(found.stage_shares.values()) == pytest.approx(1 if sum(found.stage_seconds.values()) else 0)
    assert found._repr_html_().startswith("<table>") and asdict(found)["stage_seconds"] == found.stage_seconds
