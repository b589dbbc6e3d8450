"""Teachers that run out of memory, or raise."""

from __future__ import annotations

import re

import pytest
import torch
from label_sets import SMALL, same_files, same_label_sets

import ferkd_data as fd
from ferkd_data.builder.labelling.forwards import Forwards
from ferkd_data.errors import DeviceFailedError, TeacherError
from ferkd_data.evaluate import evaluate
from ferkd_data.labels.soft_labels import check_logits
from ferkd_data.teachers import TeacherSpec, load_teachers
from ferkd_data.teachers.teacher import is_device_failure


@pytest.fixture
def greedy(tiny_teachers):
    return "python:greedy_teachers:greedy"


class Heard:
    def __init__(self):
        self.halvings = []

    def asking(self, teachers):
        pass

    def answered(self):
        pass

    def halved(self, teacher, crops):
        self.halvings.append((teacher, crops))


def test_out_of_memory_halves_the_batch_and_the_labels_are_the_same(photos, greedy, tiny_teachers, tmp_path):
    for name, teacher in (("greedy", greedy), ("modest", tiny_teachers)):
        fd.build(photos, tmp_path / name, teachers=[teacher], **SMALL)
    assert same_label_sets(tmp_path / "greedy", tmp_path / "modest")


def test_the_smaller_batch_is_remembered_for_each_teacher(greedy, tiny_teachers):
    heard = Heard()
    forwards = Forwards(observer=heard)
    hungry, modest = load_teachers([greedy, tiny_teachers])
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    for _ in range(2):
        for teacher in (hungry, modest):
            assert forwards.logits(teacher, images).shape == (32, 10)
    torch.testing.assert_close(forwards.logits(hungry, images), forwards.logits(modest, images))
    assert heard.halvings == [(greedy, 16), (greedy, 8), (greedy, 4)]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "FIND was unable to find an engine to execute this computation",
        "GET was unable to find an engine to execute this computation",
        "cuFFT error: CUFFT_ALLOC_FAILED",
        "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 939524096",
        "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc(&p, size);",
    ],
)
def test_memory_that_runs_out_in_other_words(greedy, message, monkeypatch):
    (teacher,) = load_teachers([greedy])
    monkeypatch.setattr(torch, "OutOfMemoryError", lambda text: RuntimeError(message))
    assert Forwards().logits(teacher, torch.zeros((9, 3, 32, 32), dtype=torch.uint8)).shape == (9, 10)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0",
        "CUDA failure 700: an illegal memory access was encountered ; GPU=0",
    ],
)
@pytest.mark.parametrize("raised_by", ["a module teacher", "another teacher"])
def test_a_gpu_that_fails_is_not_blamed_on_the_teacher(greedy, message, raised_by, monkeypatch):
    (teacher,) = load_teachers([greedy])
    monkeypatch.setattr(torch, "OutOfMemoryError", lambda text: RuntimeError(message))
    if raised_by == "another teacher":
        monkeypatch.setattr(teacher, "logits", lambda images: teacher.module(images.float()))
    # The teacher may have caused it all the same, such as by an index that is out of range.
    first_line = re.escape(f"({message.splitlines()[0]})")
    with pytest.raises(
        DeviceFailedError, match=rf"^device cpu failed while it ran teacher {greedy} {first_line}; only"
    ):
        Forwards().logits(teacher, torch.zeros((9, 3, 32, 32), dtype=torch.uint8))


UNSUITABLE = [
    "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be asynchronous",
    "CUDA error: invalid device ordinal\nCompile with TORCH_USE_CUDA_DSA",
    "CUDA failure 209: no kernel image is available for execution on the device ; GPU=0",
]


@pytest.mark.parametrize("message", UNSUITABLE)
@pytest.mark.parametrize("raised_by", ["a module teacher", "another teacher"])
def test_an_error_that_returns_in_every_process_names_the_teacher(greedy, message, raised_by, monkeypatch):
    (teacher,) = load_teachers([greedy])
    monkeypatch.setattr(
        torch, "OutOfMemoryError", lambda text: getattr(torch, "AcceleratorError", RuntimeError)(message)
    )
    if raised_by == "another teacher":
        monkeypatch.setattr(teacher, "logits", lambda images: teacher.module(images.float()))
    with pytest.raises(TeacherError, match=rf"^teacher {greedy}: failed on 9 crops: .*{message.splitlines()[0]}"):
        Forwards().logits(teacher, torch.zeros((9, 3, 32, 32), dtype=torch.uint8))


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="PyTorch 2.8 has the class")
def test_what_is_a_gpus_failure():
    assert is_device_failure(torch.AcceleratorError("anything"))
    assert not is_device_failure(torch.OutOfMemoryError("anything")), "a subclass of AcceleratorError"
    assert not is_device_failure(RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling cublasSgemm"))
    assert not is_device_failure(RuntimeError("CUDA error: out of memory"))


@pytest.fixture
def default_device():
    """Make a program's default for new tensors a device that has no values. Ends with the test, whatever happens."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


def test_a_programs_default_device_changes_nothing(photos, tiny_teachers, tmp_path, default_device):
    """Neither teachers nor labels may depend on what the calling program has set; on a GPU, devices would be mixed."""
    exported = fd.export_teacher(tiny_teachers, tmp_path / "tiny.onnx")
    teachers = [exported, "python:odd_teachers:made_on_the_cpu"]
    fd.build(photos, tmp_path / "before", teachers=teachers, compile=True, **SMALL)
    found = evaluate(photos, teachers=teachers)
    default_device()
    fd.build(photos, tmp_path / "after", teachers=teachers, compile=True, **SMALL)
    assert evaluate(photos, teachers=teachers) == found
    fd.bench_teachers(teachers[1:], batch_sizes=[2], threads=[1], seconds=0.002, compiled=False)
    assert same_files(tmp_path / "before", tmp_path / "after")


def test_memory_too_small_for_one_crop_is_an_error(greedy):
    (teacher,) = load_teachers([greedy])
    teacher.module.most = 0
    with pytest.raises(TeacherError, match=r"greedy: the device has too little memory for a single crop \(OutOfMem"):
        Forwards().logits(teacher, torch.zeros((4, 3, 32, 32), dtype=torch.uint8))


def test_a_teacher_that_raises_is_named(photos, greedy, tmp_path):
    with pytest.raises(TeacherError, match="greedy_teachers:raising: failed on 8 crops: KeyError: 'no such layer'"):
        fd.build(photos, tmp_path / "out", teachers=["python:greedy_teachers:raising"], **SMALL)


@pytest.mark.parametrize(
    ("row", "temperature"),
    [
        ([1.0, float("nan"), 0.0], 1.0),
        ([1.0, float("-inf"), 0.0], 1.0),
        ([1e38, 0.0, 1.0], 0.001),
        ([2.0, 2.0, 2.0], 1.0),
        ([0.0, 1e-12, -1e-12], 1.0),
        ([0.0, 1.0, 2.0], 1e12),
    ],
)
def test_what_cannot_be_right(row, temperature):
    assert check_logits(torch.tensor([row, row]), temperature)


def test_what_can_be_right():
    assert not check_logits(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]))
    assert not check_logits(torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]]))
    assert not check_logits(torch.tensor([[0.0, 0.0, 0.0]]))


def test_a_temperature_that_empties_a_teacher_stops_the_build(photos, tiny_teachers, tmp_path):
    spec = str(TeacherSpec.parse(tiny_teachers + "?temperature=1e30"))
    with pytest.raises(TeacherError, match="the same for every class"):
        fd.build(photos, tmp_path / "out", teachers=[spec], **SMALL)
