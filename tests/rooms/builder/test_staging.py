"""The loop as it runs on a GPU, on tensors of the CPU: what is asked for before it is there, is wrong here too."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from fake_gpu import StreamRecorder
from label_sets import SMALL

import ferkd_data as fd
from ferkd_data import replay
from ferkd_data.builder.labelling import crop_batches
from ferkd_data.builder.labelling.forwards import CudaStaging, Fetched
from ferkd_data.builder.labelling.job import open_tools
from ferkd_data.errors import BuildError, DeviceFailedError


class LateDevice:
    """A device whose answers come when they are waited for, and whose crops may be used when they were joined."""

    on_device = True

    def __init__(self):
        self.inside = threading.local()
        self.marked, self.joined, self.waits = [], [], 0

    @contextmanager
    def cutting(self):
        self.inside.yes = True
        yield
        self.inside.yes = False

    def upload(self, array):
        return torch.from_numpy(array.copy())

    def mark(self):
        assert self.inside.yes
        self.marked.append(object())
        return self.marked[-1]

    def join(self, moment, tensors):
        assert moment in self.marked and moment not in self.joined and all(len(crops) for crops in tensors)
        self.joined.append(moment)

    def fetch(self, tensors):
        copies = [torch.full_like(tensor, -7 if tensor.dtype != torch.bool else True) for tensor in tensors]
        real = [tensor.clone() for tensor in tensors]

        @torch.inference_mode()
        def wait():
            self.waits += 1
            for copy, tensor in zip(copies, real, strict=True):
                copy.copy_(tensor)

        return Fetched(copies, wait)


@pytest.fixture
def late(monkeypatch):
    device, opened = LateDevice(), []
    device.opened = opened
    monkeypatch.setattr("ferkd_data.builder.labelling.job.open_staging", lambda name: opened.append(name) or device)
    return device


@pytest.mark.parametrize("cut_bytes", [2**30, 2**17])
def test_the_loop_of_a_device_gives_the_labels_of_the_cpu(
    photos, tiny_teachers, tmp_path, label_set, late, monkeypatch, cut_bytes
):
    monkeypatch.setattr(crop_batches, "CUT_BYTES", cut_bytes)
    teachers = [tiny_teachers, "python:ferkd_tiny_teachers:second"]
    fd.build(photos, tmp_path / "out", teachers=teachers, batch_size=16, **SMALL)
    assert late.opened == ["cpu"], "one for all shards: every new stream would get memory of its own"
    assert late.waits == len(late.joined) == len(late.marked) == 13, "20 x 10 crops in batches of 16, in 3 shards"
    same_but_for_the_cutter(tmp_path / "out", label_set)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cuda", "all"])
def test_a_real_gpu_gives_the_labels_of_the_cpu(photos, tiny_teachers, tmp_path, label_set, device):
    teachers = [tiny_teachers, "python:ferkd_tiny_teachers:second"]
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        fd.build(photos, out, teachers=teachers, batch_size=16, **{**SMALL, "device": device, "precision": precision})
        same_but_for_the_cutter(out, label_set, more=0.0 if precision == "fp32" else 0.03)


def same_but_for_the_cutter(a, b, more=0.0):
    ours, theirs = fd.open_labels(a), fd.open_labels(b)
    for image, other in zip(ours, theirs, strict=True):
        assert np.array_equal(image.boxes, other.boxes)
        # Two levels of 255 in a crop, and no more, may differ.
        np.testing.assert_allclose(image.target_prob, other.target_prob, atol=0.02 + more)
    first, second = ours.statistics, theirs.statistics
    assert first.teacher_top1_matches_target == pytest.approx(second.teacher_top1_matches_target, abs=2 + 200 * more)
    assert first.crops == second.crops == 200


def test_no_memory_for_cutting_means_smaller_steps(photos, tiny_teachers, tmp_path, late, monkeypatch):
    resized, sizes = replay._resized, []

    def small(image, pixel, weight):
        sizes.append(pixel.shape[1])
        if sizes[-1] > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return resized(image, pixel, weight)

    monkeypatch.setattr(replay, "_resized", small)
    monkeypatch.setattr(crop_batches, "CUT_BYTES", 8 * 200_000)
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **SMALL)
    assert max(sizes) == 8 and fd.open_labels(tmp_path / "out").statistics.crops == 200


def test_no_memory_for_a_single_crop_is_an_error_that_says_so(photos, tiny_teachers, tmp_path, late, monkeypatch):
    def full(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(crop_batches, "replay_on_device", full)
    with pytest.raises(BuildError, match="too little memory to cut crops"):
        fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **SMALL)


def test_what_goes_wrong_in_cutting_is_not_taken_for_a_lack_of_memory(
    photos, tiny_teachers, tmp_path, late, monkeypatch
):
    def broken(*args, **options):
        raise RuntimeError("expected scalar type Half but found Float")

    monkeypatch.setattr(crop_batches, "replay_on_device", broken)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **SMALL)


def test_a_device_that_fails_is_named(photos, tiny_teachers, tmp_path, late, monkeypatch):
    def wait():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(late, "fetch", lambda tensors: Fetched(list(tensors), wait))
    with pytest.raises(
        DeviceFailedError, match=r"device cpu failed .*\(CUDA error: an illegal memory access was encountered\)"
    ):
        fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **SMALL)


@pytest.mark.parametrize("step", ["crop_batches.replay_on_device", "label_shard.combine"])
@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("CUDA error: unspecified launch failure\nmore", DeviceFailedError, r"device cpu failed .*unspecified launch"),
        ("CUDA error: out of memory", BuildError, "too little memory"),
    ],
)
def test_a_device_that_fails_beside_the_teachers(
    photos, tiny_teachers, tmp_path, late, monkeypatch, step, said, kind, words
):
    def broken(*args, **options):
        raise RuntimeError(said)

    monkeypatch.setattr(f"ferkd_data.builder.labelling.{step}", broken)
    with pytest.raises(kind, match=words):
        fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], **SMALL)


@pytest.mark.parametrize(("device", "expected"), [("cuda", [3, 3]), ("cuda:3", [3, 3]), ("cpu", [])])
def test_the_threads_that_cut_use_the_gpu_of_the_teachers(monkeypatch, job, late, device, expected):
    """A new thread's current GPU is the first: pinned memory would be taken there by every worker."""
    current, chosen = threading.local(), []

    @contextmanager
    def using(name):
        current.number = 3
        yield

    monkeypatch.setattr(torch.cuda, "device", using)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "number", 0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    both_wait = threading.Barrier(2)
    with open_tools(replace(job, resources=replace(job.resources, threads=2)), device, [mock.Mock()]) as tools:
        wait([tools.executor.submit(both_wait.wait) for _ in range(2)])
    assert chosen == expected


def test_what_is_said_to_streams_and_events(monkeypatch):
    log = []
    names = iter(("side", "back"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: StreamRecorder(next(names), log))
    monkeypatch.setattr(
        torch.cuda, "Event", lambda *, blocking: StreamRecorder("blocking" if blocking else "busy", log)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: StreamRecorder("teachers", log))

    @contextmanager
    def stream(recorder):
        log.append(("enter", recorder.name))
        yield
        log.append(("leave", recorder.name))

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (log.append(("pin",)), tensor)[1])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, other: log.append(("keep for", other.name)))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device, pin_memory: torch.zeros(tensor.shape))
    staging = CudaStaging("cpu")
    with staging.cutting():
        crops = staging.upload(np.ones((2, 3), np.float32))
        moment = staging.mark()
    staging.join(moment, [crops])
    copies, wait = staging.fetch([crops])
    wait()
    assert torch.equal(copies[0], crops)
    assert log == [
        ("enter", "side"),
        ("pin",),
        ("side", "record_event"),
        ("leave", "side"),
        ("teachers", "wait_event", "event of side"),
        ("keep for", "teachers"),
        ("back", "wait_stream", "teachers"),
        ("enter", "back"),
        ("keep for", "back"),
        ("back", "record_event", "blocking"),
        ("leave", "back"),
        ("blocking", "synchronize"),
    ]
