"""Recognise out-of-memory errors of PyTorch, CUDA's libraries and ONNX Runtime.

Restrict a GPU to kernels of the stated precision, chosen the same way every time.

The protocol of all teachers, and the one implementation for teachers that are an `nn.Module`.

Legend: B crops, C classes, S input size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ferkd_data.errors import FerkdError, TeacherError
from ferkd_data.normalization import scaled
from ferkd_data.replay import INTERPOLATIONS
from ferkd_data.teachers.digest import with_choices
from ferkd_data.teachers.outputs import LogitsOnly, check_activation, check_shape, pick_output
from ferkd_data.teachers.spec import CENTRE_SHARE, Preprocessing, TeacherSpec, Triple, triple

SAYINGS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to allocate memory",
)
"""Texts of PyTorch (within a compiler's error), the driver, cuBLAS, cuDNN and ONNX Runtime."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, so that a smaller batch may fit; such errors do not share a class."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(saying in str(error) for saying in SAYINGS)


BF16_SINCE = (8, 0)
"""NVIDIA's compute capability with bfloat16 in hardware; before that PyTorch imitates it, slowly."""


@contextmanager
def faithful_kernels(precision: str) -> Iterator[None]:
    """Use kernels that give the same labels on the same kind of machine, whatever the process has set.

    cuDNN does not try out which kernel is the fastest today, and float32 is not rounded to TF32, which has the 10 bits
    of float16 and is PyTorch's default in convolutions.
    """
    with ExitStack() as kept:
        _set(kept, torch.backends.cudnn, "benchmark", False)
        if precision == "fp32":
            _whole_float32(kept)
        yield


def check_precision(teacher: str, device: torch.device, precision: str) -> None:
    """Raises TeacherError for a precision that the device has not got."""
    if device.type != "cuda" or precision != "bf16":
        return
    if torch.cuda.get_device_capability(device) < BF16_SINCE:
        name = torch.cuda.get_device_name(device)
        raise TeacherError(f"teacher {teacher}: {name} has no bfloat16; use --precision fp16 or fp32")


def _whole_float32(kept: ExitStack) -> None:
    """Set float32 by both of PyTorch's ways: the newer (2.9) decides, the older cannot be read while the two differ."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    places: list[Any] = [getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None), matmul]
    newer = [place for place in places if hasattr(place, "fp32_precision")]
    # Last in, first out: what the older way writes back is written over by the newer.
    for place in newer:
        kept.callback(setattr, place, "fp32_precision", place.fp32_precision)
    _set(kept, cudnn, "allow_tf32", False)
    _change(kept, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
    for place in newer:
        place.fp32_precision = "ieee"


def _set(kept: ExitStack, place: Any, name: str, value: Any) -> None:
    _change(kept, lambda: getattr(place, name), lambda value: setattr(place, name, value), value)


def _change(kept: ExitStack, read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> None:
    """Set a value until `kept` is left. A value that cannot be read is left alone."""
    try:
        before = read()
    except RuntimeError:
        return
    kept.callback(write, before)
    write(value)


Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE_ERRORS: tuple[type[Exception], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))
"""A GPU that failed, which is not the teacher's doing; PyTorch before 2.8 raises a plain RuntimeError."""


class Teacher(Protocol):
    """A frozen classifier that is ready to run."""

    spec: TeacherSpec
    preprocessing: Preprocessing
    num_classes: int
    digest: str
    """SHA-256 over everything that decides its answers: see ferkd_data.teachers.digest. 64 hex digits."""
    precision: Precision
    class_names: tuple[str, ...] | None
    published_top1: float | None
    """Accuracy in 0..1 on ImageNet-1k where the library that brought the model knows it."""
    hints: tuple[str, ...]
    """Remarks for its user, such as why it is slow; they decide nothing."""

    def logits(self, images_BCSS: Tensor) -> Tensor:
        """Logits (B, C) float32 of uint8 RGB images (B, 3, S, S), on the device of the images."""

    def renormalised(self, mean: Triple, std: Triple) -> Teacher:
        """The same weights fed with another normalisation, to find out which one is right."""


class ModuleTeacher:
    """An `nn.Module` from normalised float (B, 3, S, S) to logits (B, C), or to several outputs with logits among them.

    It is run once on a picture when it is made. Raises TeacherError where that fails or gives no class logits.
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
        """Also on a CPU, where it is never slower and up to 1.7 times as fast: see docs/decisions.md."""
        try:
            ready = _ready(module, self.device, self.memory_format)
        except torch.cuda.OutOfMemoryError as error:
            raise TeacherError(
                f"teacher {spec}: {device} has too little memory for its weights; end what else runs there, or use "
                "fewer --workers or teachers"
            ) from error
        self.module: Callable[[Tensor], Tensor] = ready
        self.scale, self.shift = normalisation(preprocessing, self.device)
        # With autocast, the dtype that it would make of the images anyway, so that they are written once.
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
            if is_out_of_memory(error) or isinstance(error, DEVICE_ERRORS):
                raise
            # The model's own code, which may raise anything.
            raise TeacherError(f"teacher {self.spec}: failed on {len(images_BCSS)} crops: {reason(error)}") from error
        if logits.shape != (len(images_BCSS), self.num_classes):
            check_shape(logits, len(images_BCSS), self.spec)
            raise TeacherError(
                f"teacher {self.spec}: gave {logits.shape[1]} classes, after {self.num_classes} at its start"
            )
        answer: Tensor = logits.float()
        return answer

    def renormalised(self, mean: Triple, std: Triple) -> ModuleTeacher:
        other = copy.copy(self)
        other.preprocessing = replace(self.preprocessing, mean=mean, std=std)
        other.scale, other.shift = normalisation(other.preprocessing, self.device)
        return other

    def _answer(self, images_BCSS: Tensor) -> Any:
        """Whatever the module returns."""
        pixels = images_BCSS.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
        normalised = scaled(pixels, self.scale, self.shift, self.input_dtype)
        with (
            faithful_kernels(self.precision) if self.device.type == "cuda" else nullcontext(),
            torch.autocast(self.device.type, AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST),
        ):
            return self.module(normalised)

    @torch.inference_mode()
    def _first_answer(self, module: nn.Module) -> int:
        """The number of classes; from here on `module` gives logits and nothing else."""
        size = self.preprocessing.size
        pictures = two_pictures(size)[1:]
        try:
            result = self._answer(pictures)
        except FerkdError:
            raise
        except Exception as error:
            # Also AssertionError, KeyError and the like: the model's own code may raise anything.
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


def _dtype_of(module: nn.Module) -> torch.dtype:
    """The type of the weights, for modules that were made in float16 or float64."""
    dtypes = (weight.dtype for weight in module.parameters() if weight.is_floating_point())
    return next(dtypes, torch.float32)


def two_pictures(size: int) -> Tensor:
    """uint8 (2, 3, S, S): a gradient and noise, the same every time."""
    gradient = torch.linspace(0, 255, size).view(1, 1, size).expand(3, size, size)
    noise = torch.rand((3, size, size), generator=torch.Generator().manual_seed(0)) * 255
    return torch.stack([gradient, noise]).to(torch.uint8)


def reason(error: BaseException) -> str:
    """The type and the first line of an error, for a message of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _ready(module: nn.Module, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        return module.eval().to(device)
    # In one go, which the annotations do not know of: the weights are copied once.
    moved: nn.Module = module.eval().to(device, memory_format=memory_format)  # type: ignore[call-overload]
    return moved


def normalisation(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """scale and shift (1, 3, 1, 1) such that shift + pixel * scale = (pixel / 255 - mean) / std."""
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, dtype=torch.float64).view(1, 3, 1, 1)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def preprocessing_of(
    spec: TeacherSpec,
    *,
    size: int | None = None,
    interpolation: str | None = None,
    mean: object = None,
    std: object = None,
    crop_pct: float | None = None,
) -> Preprocessing:
    """The options of the spec, else what is known of the model.

    Raises TeacherError for what neither says, and for a known interpolation that crops cannot be cut with.
    """
    values: dict[str, Any] = {}
    for name, value, example in (
        ("size", size, "224"),
        ("mean", mean, "0.485,0.456,0.406"),
        ("std", std, "0.229,0.224,0.225"),
    ):
        chosen = getattr(spec, name) if getattr(spec, name) is not None else value
        if chosen is None:
            raise TeacherError(f"teacher {spec}: its {name} is not known; add the option, such as ?{name}={example}")
        try:
            values[name] = _side(chosen) if name == "size" else triple(_numbers(chosen))
        except (TypeError, ValueError) as error:
            raise TeacherError(f"teacher {spec}: its {name} cannot be {chosen!r}: {error}") from error
    chosen_filter = spec.interpolation or interpolation or "bilinear"
    if chosen_filter not in INTERPOLATIONS:
        raise TeacherError(
            f"teacher {spec}: its images are resized with {chosen_filter}, and crops are cut with "
            f"{' or '.join(INTERPOLATIONS)} only; choose one, such as ?interpolation=bicubic"
        )
    values["crop_pct"] = spec.crop_pct or crop_pct or CENTRE_SHARE
    return Preprocessing(interpolation=chosen_filter, **values)


def _side(value: Any) -> int:
    """224, or the pair 224, 224."""
    sides = {int(side) for side in (value if isinstance(value, (list, tuple)) else [value])}
    if len(sides) != 1:
        raise ValueError("only square images are supported")
    return sides.pop()


def _numbers(value: Any) -> list[float]:
    return [float(x) for x in (value if isinstance(value, Iterable) else [value])]
