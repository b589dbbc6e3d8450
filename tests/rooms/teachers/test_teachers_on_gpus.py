"""Settings that teachers make on a GPU, as far as they can be tested without one."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ferkd_data.builder.labelling.forwards import current_device
from ferkd_data.errors import DeviceFailedError, TeacherError
from ferkd_data.teachers import Preprocessing, TeacherSpec, load_teacher, module_teacher, onnx_models
from ferkd_data.teachers.module_teacher import ModuleTeacher, check_precision, faithful_kernels

CUDNN, MATMUL = torch.backends.cudnn, torch.backends.cuda.matmul


def tf32():
    """Tell whether convolutions and matrix products may use TF32."""
    newer = getattr(CUDNN, "conv", None)
    if newer is None:
        return CUDNN.allow_tf32, MATMUL.allow_tf32
    return newer.fp32_precision == "tf32", MATMUL.fp32_precision == "tf32"


@pytest.fixture
def as_before():
    """Set TF32 without checks: a user may have set contradictory values."""
    before = CUDNN.benchmark, torch.get_float32_matmul_precision()
    newer = [place for place in (getattr(CUDNN, "conv", None), MATMUL) if hasattr(place, "fp32_precision")]
    values = [place.fp32_precision for place in newer]
    yield
    CUDNN.benchmark = before[0]
    torch.set_float32_matmul_precision(before[1])
    for place, value in zip(newer, values, strict=True):
        place.fp32_precision = value


def by_the_older_way():
    torch.set_float32_matmul_precision("high")


def by_the_newer_way():
    CUDNN.conv.fp32_precision = "tf32"
    MATMUL.fp32_precision = "tf32"


def by_both_at_odds():
    torch.set_float32_matmul_precision("high")
    MATMUL.fp32_precision = "ieee"
    CUDNN.conv.fp32_precision = "ieee"


@pytest.mark.parametrize("set_by_the_user", [lambda: None, by_the_older_way, by_the_newer_way, by_both_at_odds])
def test_float32_is_float32_and_the_users_settings_come_back(as_before, set_by_the_user):
    if set_by_the_user is not by_the_older_way and not hasattr(CUDNN, "conv"):
        pytest.skip("this PyTorch has the older way alone")
    CUDNN.benchmark = True
    set_by_the_user()
    before = tf32()
    with faithful_kernels():
        assert tf32() == (False, False) and not CUDNN.benchmark
        if set_by_the_user is not by_both_at_odds:
            # PyTorch's compiler still looks at these, and would be told to make up its mind.
            assert not CUDNN.allow_tf32 and not MATMUL.allow_tf32
    assert tf32() == before and CUDNN.benchmark


REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
SPLIT_K = tuple(f"{name}_split_k" for name in REDUCTIONS)


def half_precision():
    """Read the settings of a process on which answers in half precision depend."""
    names = (*REDUCTIONS, *SPLIT_K, "allow_fp16_accumulation")
    found = {name: getattr(MATMUL, name) for name in names if hasattr(MATMUL, name)}
    return {**found, "benchmark": CUDNN.benchmark, "deterministic": CUDNN.deterministic}


@pytest.fixture
def half_precision_as_before(as_before):
    before = half_precision()
    yield
    CUDNN.deterministic = before["deterministic"]
    for name, split_k in zip(REDUCTIONS, SPLIT_K, strict=True):
        setattr(MATMUL, name, (before[name], before[split_k]) if split_k in before else before[name])
    if "allow_fp16_accumulation" in before:
        MATMUL.allow_fp16_accumulation = before["allow_fp16_accumulation"]


@pytest.mark.parametrize(("allowed", "split_k"), [(True, True), (False, True), (False, False)])
def test_half_precision_does_not_depend_on_what_the_process_has_set(half_precision_as_before, allowed, split_k):
    CUDNN.benchmark, CUDNN.deterministic = allowed, not allowed
    for name in REDUCTIONS:
        setattr(MATMUL, name, (allowed, split_k) if hasattr(MATMUL, SPLIT_K[0]) else allowed)
    if hasattr(MATMUL, "allow_fp16_accumulation"):
        MATMUL.allow_fp16_accumulation = allowed
    before = half_precision()
    with faithful_kernels():
        inside = half_precision()
    assert half_precision() == before and before["benchmark"] == allowed
    assert inside.pop("deterministic") and {inside.pop(name, True) for name in SPLIT_K} == {True}
    assert set(inside.values()) == {False} and len(inside) >= 3


def test_a_scripted_teacher_is_not_fused_after_its_first_calls():
    """On a CPU without LLVM, a fused network would raise; on a GPU it would give other answers."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10), torch.nn.Sigmoid(), torch.nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        # Two of them, since a network is compiled when it runs for the second time, and once.
        whole, part = torch.jit.script(net.eval()), torch.jit.script(net.eval())
    teachers = [make(whole), make(torch.nn.Sequential(part, torch.nn.Identity()))]
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    before = [getattr(torch._C, read)() for read, _ in module_teacher.FUSERS]
    try:
        for _, write in module_teacher.FUSERS[:3]:
            getattr(torch._C, write)(True)
        switched_on = [getattr(torch._C, read)() for read, _ in module_teacher.FUSERS]
        for teacher in teachers:
            assert len({teacher.logits(images).numpy().tobytes() for _ in range(5)}) == 1
        assert [getattr(torch._C, read)() for read, _ in module_teacher.FUSERS] == switched_on
    finally:
        for (_, write), value in zip(module_teacher.FUSERS, before, strict=True):
            getattr(torch._C, write)(value)


def test_a_gpu_without_bfloat16_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(TeacherError, match="teacher timm:x: Tesla T4 has no bfloat16; use --precision fp16 or fp32"):
        check_precision("timm:x", torch.device("cuda:1"), "bf16")
    check_precision("timm:x", torch.device("cuda:1"), "fp16")
    check_precision("timm:x", torch.device("cpu"), "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_precision("timm:x", torch.device("cuda:1"), "bf16")


FULL = [
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
]


def make(module):
    preprocessing = Preprocessing(size=8, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    spec = TeacherSpec.parse("timm:x")
    return ModuleTeacher(module, spec, preprocessing, digest="", device="cpu", precision="fp32")


def raising(error):
    def raise_(*args, **options):
        raise error

    return raise_


@pytest.mark.parametrize("error", FULL, ids=str)
def test_weights_that_do_not_fit(tmp_path, monkeypatch, error):
    (tmp_path / "x.pt").touch()
    monkeypatch.setattr(torch.nn.Module, "to", raising(error))
    monkeypatch.setattr(torch.jit, "load", raising(error))
    too_little = "cpu has too little memory for its weights; end other programs"
    with pytest.raises(TeacherError, match=f"teacher timm:x: {too_little}"):
        make(torch.nn.Flatten())
    with pytest.raises(TeacherError, match=f"x.pt: {too_little}"):
        load_teacher(TeacherSpec.parse(f"torchscript:{tmp_path / 'x.pt'}"))


@pytest.mark.parametrize("error", FULL, ids=str)
def test_memory_too_small_for_a_first_image_is_not_said_to_be_its_size(error):
    module = torch.nn.Flatten()
    module.forward = raising(error)
    with pytest.raises(TeacherError, match=r"timm:x: cpu has too little memory for one 8x8 image beside its weights"):
        make(module)


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (
            "Cannot copy out of meta tensor",
            TeacherError,
            "^teacher timm:x: cannot be moved to cpu: .*: Cannot copy out",
        ),
        ("CUDA error: invalid device ordinal", TeacherError, "^teacher timm:x: cannot be moved to cpu: .*ordinal"),
        (
            "CUDA error: unspecified launch failure",
            DeviceFailedError,
            r"^device cpu failed while it ran teacher timm:x \(CUDA error: unspec",
        ),
    ],
)
def test_other_faults_while_weights_are_moved(monkeypatch, said, kind, words):
    monkeypatch.setattr(torch.nn.Module, "to", raising(RuntimeError(said)))
    with pytest.raises(kind, match=words):
        make(torch.nn.Flatten())


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (
            "no kernel image is available for execution",
            TeacherError,
            "^teacher timm:x: cannot run on one 8x8 image: .*no",
        ),
        (
            "device-side assert triggered",
            DeviceFailedError,
            r"^device cpu failed while it ran teacher timm:x \(.*assert",
        ),
    ],
)
def test_a_gpu_that_cannot_run_the_first_image(said, kind, words):
    module = torch.nn.Flatten()
    module.forward = raising(RuntimeError(f"CUDA error: {said}"))
    with pytest.raises(kind, match=words):
        make(module)


def test_a_gpu_that_fails_while_a_torchscript_file_is_read(tmp_path, monkeypatch):
    (tmp_path / "x.pt").touch()
    monkeypatch.setattr(torch.jit, "load", raising(RuntimeError("CUDA error: unspecified launch failure")))
    with pytest.raises(DeviceFailedError, match=r"x\.pt \(CUDA error: unspecified launch failure\)"):
        load_teacher(TeacherSpec.parse(f"torchscript:{tmp_path / 'x.pt'}"))


def test_the_current_device_is_the_workers(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", contextmanager(lambda device: iter([entered.append(device)])))
    with current_device("cpu"), current_device("cuda:1"):
        pass
    assert entered == ["cuda:1"]


class Runtime:
    """Stand in for ONNX Runtime with CUDA, with a session that reports its providers."""

    def __init__(self, works: bool) -> None:
        self.works = works
        self.asked: list[object] = []
        self.called: list[str] = []

    def get_available_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def SessionOptions(self):
        return SimpleNamespace(add_session_config_entry=lambda name, value: None)

    def InferenceSession(self, path, options, providers):
        self.asked = providers
        used = ["CUDAExecutionProvider"] if self.works else []
        return SimpleNamespace(
            get_providers=lambda: [*used, "CPUExecutionProvider"], disable_fallback=lambda: self.called.append("stay")
        )


@pytest.mark.parametrize(("device", "number"), [("cuda:2", "2"), ("cuda", "5")])
def test_an_onnx_teacher_runs_on_the_gpu_that_was_asked_for(tmp_path, monkeypatch, device, number):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    runtime = Runtime(works=True)
    self = SimpleNamespace(spec="onnx:x.onnx")
    onnx_models.OnnxTeacher._open(self, runtime, tmp_path / "x.onnx", device)
    (name, options), last = runtime.asked
    assert (name, last) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["device_id"] == number and options["use_tf32"] == "0"
    assert options["cudnn_conv_algo_search"] != "EXHAUSTIVE"
    assert runtime.called == ["stay"]


def test_an_onnx_teacher_that_would_run_on_the_cpu_instead_is_an_error(tmp_path):
    self = SimpleNamespace(spec="onnx:x.onnx")
    with pytest.raises(TeacherError, match="ONNX Runtime cannot use CUDA here"):
        onnx_models.OnnxTeacher._open(self, Runtime(works=False), tmp_path / "x.onnx", "cuda:0")


def test_onnx_runtime_running_out_of_memory_is_not_the_teachers_fault(tmp_path):
    class Full(Exception):
        __module__ = "onnxruntime.capi"

    def run(names, inputs):
        raise Full("bfc_arena.cc Failed to allocate memory for requested buffer of size 939524096")

    session = SimpleNamespace(run=run)
    teacher = SimpleNamespace(spec="onnx:x.onnx", fixed_batch=None, input_name="x", output_names=["y"], session=session)
    teacher.device = "cuda:0"
    with pytest.raises(torch.cuda.OutOfMemoryError):
        onnx_models.OnnxTeacher._run(teacher, torch.zeros(2, 3, 4, 4).numpy())
