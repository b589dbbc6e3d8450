"""Teachers whose model is an `nn.Module`, and the GPU settings under which they give the same labels every time.

Legend: B crops, C classes, S input size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ferkd_data.errors import FerkdError, TeacherError
from ferkd_data.normalization import scaled
from ferkd_data.teachers.digest import with_choices
from ferkd_data.teachers.outputs import LogitsOnly, check_activation, check_shape, pick_output
from ferkd_data.teachers.spec import Preprocessing, TeacherSpec, Triple
from ferkd_data.teachers.teacher import Precision, is_out_of_memory, reason, refuse_failed_device

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
FUSERS = (
    ("_jit_texpr_fuser_enabled", "_jit_set_texpr_fuser_enabled"),
    ("_jit_can_fuse_on_gpu", "_jit_override_can_fuse_on_gpu"),
    ("_jit_can_fuse_on_cpu", "_jit_override_can_fuse_on_cpu"),
    ("_jit_llga_enabled", "_jit_set_llga_enabled"),
)
"""Functions of torch._C that read and write the switches of TorchScript's fusers."""
BF16_SINCE = (8, 0)
"""First compute capability with bfloat16 in hardware; PyTorch emulates it, slowly, on older GPUs."""


MORE_MEMORY = "end other programs there, or use fewer --workers or teachers"


class ModuleTeacher:
    """Wrap an `nn.Module` that maps normalised float images (B, 3, S, S) to logits (B, C), or to outputs with logits.

    The module runs once on a test picture at construction. Raises TeacherError where that fails, or gives no logits.
    """

    hints: tuple[str, ...] = ()

    def __init__(
        self,
        module: nn.Module,
        spec: TeacherSpec,
        preprocessing: Preprocessing,
        *,
        digest: str,
        device: str,
        precision: Precision,
        class_names: tuple[str, ...] | None = None,
        published_top1: float | None = None,
    ) -> None:
        self.spec = spec
        self.preprocessing = preprocessing
        self.digest = with_choices(digest, spec)
        self.precision = precision
        self.published_top1 = published_top1
        self.device = torch.device(device)
        check_precision(str(spec), self.device, precision)
        self.memory_format = torch.channels_last
        """Used on a CPU too, where it is never slower and up to 1.7 times as fast: see docs/decisions.md."""
        try:
            ready = _ready(module, self.device, self.memory_format)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise weights_do_not_fit(spec, device) from error
            refuse_failed_device(device, error, spec)
            raise TeacherError(f"teacher {spec}: cannot be moved to {device}: {reason(error)}") from error
        self.module: Callable[[Tensor], Tensor] = ready
        self.scripted = any(isinstance(part, torch.jit.ScriptModule) for part in ready.modules())
        self.scale, self.shift = normalisation(preprocessing, self.device)
        # Autocast would convert the images to its dtype anyway: written in it at once, they are written once.
        self.input_dtype = AUTOCAST.get(precision) or _dtype_of(ready)
        self.num_classes = self._first_answer(ready)
        self.class_names = class_names if class_names and len(class_names) == self.num_classes else None

    @torch.inference_mode()
    def logits(self, images_BCSS: Tensor) -> Tensor:
        try:
            logits = self._answer(images_BCSS)
        except FerkdError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            refuse_failed_device(self.device, error, self.spec)
            # The model's own code may raise anything.
            raise TeacherError(f"teacher {self.spec}: failed on {len(images_BCSS)} crops: {reason(error)}") from error
        if logits.shape != (len(images_BCSS), self.num_classes):
            check_shape(logits, len(images_BCSS), self.spec)
            raise TeacherError(
                f"teacher {self.spec}: returned {logits.shape[1]} classes, after {self.num_classes} in its first run"
            )
        # Out of autocast's half precision before anything is computed from them.
        answer: Tensor = logits.float()
        return answer

    def renormalised(self, mean: Triple, std: Triple) -> ModuleTeacher:
        # Shares the module: only the constants of the input differ.
        other = copy.copy(self)
        other.preprocessing = replace(self.preprocessing, mean=mean, std=std)
        other.scale, other.shift = normalisation(other.preprocessing, self.device)
        return other

    def _answer(self, images_BCSS: Tensor) -> Any:
        """Normalise the images and run the module; return whatever it returns."""
        pixels = images_BCSS.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
        # One kernel from uint8 to the input dtype; the module then runs under autocast where precision asks for it.
        normalised = scaled(pixels, self.scale, self.shift, self.input_dtype)
        with (
            faithful_kernels() if self.device.type == "cuda" else nullcontext(),
            unfused() if self.scripted else nullcontext(),
            torch.autocast(self.device.type, AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST),
        ):
            return self.module(normalised)

    @torch.inference_mode()
    def _first_answer(self, module: nn.Module) -> int:
        """Run a test picture and return the number of classes. Makes `self.module` return logits alone."""
        size = self.preprocessing.size
        # Only the noise: every model takes a batch of one, and it fits into memory where a larger one may not.
        pictures = two_pictures(size)[1:]
        try:
            result = self._answer(pictures)
        except FerkdError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise TeacherError(
                    f"teacher {self.spec}: {self.device} has too little memory for one {size}x{size} image beside its "
                    f"weights ({reason(error)}); {MORE_MEMORY}"
                ) from error
            refuse_failed_device(self.device, error, self.spec)
            # The model's own code may raise anything, AssertionError and KeyError included.
            raise TeacherError(
                f"teacher {self.spec}: cannot run on one {size}x{size} image: {reason(error)}; the option size sets "
                "another size"
            ) from error
        output = pick_output(result, self.spec)
        check_shape(output, len(pictures), self.spec)
        check_activation(output, self.spec)
        if output is not result or self.spec.activation is not None:
            self.module = LogitsOnly(module, self.spec)
        return int(output.shape[1])


def _ready(module: nn.Module, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        return module.eval().to(device)
    # In one call, so that the weights are copied once; PyTorch's annotations do not know this form.
    moved: nn.Module = module.eval().to(device, memory_format=memory_format)  # type: ignore[call-overload]
    return moved


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of the weights: float16 or float64 where a module was made so."""
    dtypes = (weight.dtype for weight in module.parameters() if weight.is_floating_point())
    return next(dtypes, torch.float32)


def two_pictures(size: int) -> Tensor:
    """Make the test pictures, uint8 (2, 3, S, S) on the CPU: a gradient and noise, the same every time."""
    # The device is named here and elsewhere, since a program may have set another default for new tensors.
    gradient = torch.linspace(0, 255, size, device="cpu").view(1, 1, size).expand(3, size, size)
    noise = torch.rand((3, size, size), generator=torch.Generator("cpu").manual_seed(0), device="cpu") * 255
    return torch.stack([gradient, noise]).to(torch.uint8)


def normalisation(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Fold a normalisation into one multiply-add: scale and shift, float32 (1, 3, 1, 1).

    (pixel / 255 - mean) / std = pixel * scale + shift, with scale = 1 / (255 std) and shift = -mean / std.
    """
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64, device="cpu").view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, dtype=torch.float64, device="cpu").view(1, 3, 1, 1)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


@contextmanager
def faithful_kernels() -> Iterator[None]:
    """Restrict a GPU to kernels that give the same labels on every machine of its kind, whatever the process has set.

    cuDNN does not time kernels to choose one, and takes deterministic ones. Float32 is not rounded to TF32, which has
    float16's 10 bits of mantissa and is PyTorch's default in convolutions. Products of half precision are summed in
    float32. The former settings come back at the end. The choice among PyTorch's attention kernels is left as it is.
    """
    with ExitStack() as kept:
        _set(kept, torch.backends.cudnn, "benchmark", False)
        _set(kept, torch.backends.cudnn, "deterministic", True)
        _half_summed_in_float32(kept)
        # In half precision too: a module may keep some layers out of autocast.
        _whole_float32(kept)
        yield


@contextmanager
def unfused() -> Iterator[None]:
    """Turn off TorchScript's fusers, which compile a network after it has run a few times: its answers would change.

    `torch.jit.fuser("none")` does the same, and prints a warning of a fuser that is no more.
    """
    with ExitStack() as kept:
        for read, write in FUSERS:
            if hasattr(torch._C, read) and hasattr(torch._C, write):
                _change(kept, getattr(torch._C, read), getattr(torch._C, write), False)
        yield


def weights_do_not_fit(spec: TeacherSpec, device: str) -> TeacherError:
    """Return the error for a device that has too little memory for a teacher's weights."""
    return TeacherError(f"teacher {spec}: {device} has too little memory for its weights; {MORE_MEMORY}")


def check_precision(teacher: str, device: torch.device, precision: str) -> None:
    """Raise TeacherError for a precision that the device does not support."""
    if device.type != "cuda" or precision != "bf16":
        return
    if torch.cuda.get_device_capability(device) < BF16_SINCE:
        name = torch.cuda.get_device_name(device)
        raise TeacherError(f"teacher {teacher}: {name} has no bfloat16; use --precision fp16 or fp32")


def _half_summed_in_float32(kept: ExitStack) -> None:
    matmul: Any = torch.backends.cuda.matmul
    for dtype in ("fp16", "bf16"):
        name = f"allow_{dtype}_reduced_precision_reduction"
        split_k = getattr(matmul, f"{name}_split_k", None)
        if split_k is not None:
            # Newer versions of PyTorch take this second setting together with the first; without it they write True.
            kept.callback(setattr, matmul, name, (getattr(matmul, name), split_k))
        _set(kept, matmul, name, False)
    if hasattr(matmul, "allow_fp16_accumulation"):  # PyTorch 2.7
        _set(kept, matmul, "allow_fp16_accumulation", False)


def _whole_float32(kept: ExitStack) -> None:
    """Turn TF32 off by both of PyTorch's APIs.

    The newer one (2.9) decides; the older one raises when it is read while the two differ.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    backends: list[Any] = [getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None), matmul]
    newer = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    # Callbacks run last in, first out: the newer API is restored last, over what restoring the older one wrote.
    for backend in newer:
        kept.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
    _set(kept, cudnn, "allow_tf32", False)
    _change(kept, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
    for backend in newer:
        backend.fp32_precision = "ieee"


def _set(kept: ExitStack, backend: Any, name: str, value: Any) -> None:
    _change(kept, lambda: getattr(backend, name), lambda value: setattr(backend, name, value), value)


def _change(kept: ExitStack, read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> None:
    """Write a value, and restore the former one when `kept` ends. A value that cannot be read stays."""
    try:
        before = read()
    except RuntimeError:
        return
    kept.callback(write, before)
    write(value)
