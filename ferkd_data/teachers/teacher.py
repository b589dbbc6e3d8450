"""What every teacher can do, and the one implementation for teachers that are an `nn.Module`.

Legend: B crops, C classes, S input size.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ferkd_data.errors import TeacherError
from ferkd_data.normalization import scaled
from ferkd_data.teachers.kernels import check_precision, faithful_kernels
from ferkd_data.teachers.spec import Preprocessing, TeacherSpec, Triple

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(Protocol):
    spec: TeacherSpec
    preprocessing: Preprocessing
    num_classes: int
    digest: str
    """SHA-256 of the weights, 64 hex digits."""
    precision: Precision
    class_names: tuple[str, ...] | None
    published_top1: float | None
    """Accuracy in 0..1 on ImageNet-1k where the library that brought the model knows it."""

    def logits(self, images_BCSS: Tensor) -> Tensor:
        """Logits (B, C) float32 of uint8 RGB images (B, 3, S, S), on the device of the images."""

    def renormalised(self, mean: Triple, std: Triple) -> Teacher:
        """The same weights fed with another normalisation, to find out which one is right."""


class ModuleTeacher:
    """An `nn.Module` from normalised float (B, 3, S, S) to logits (B, C)."""

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
        self.digest = digest
        self.precision = precision
        self.class_names = class_names
        self.published_top1 = published_top1
        self.device = torch.device(device)
        check_precision(str(spec), self.device, precision)
        self.memory_format = torch.channels_last
        """Also on a CPU, where it is never slower and up to 1.7 times as fast: see docs/decisions.md."""
        try:
            self.module: Callable[[Tensor], Tensor] = _ready(module, self.device, self.memory_format)
        except torch.cuda.OutOfMemoryError as error:
            raise TeacherError(
                f"teacher {spec}: {device} has too little memory for its weights; end what else runs there, or use "
                "fewer --processes or teachers"
            ) from error
        self.scale, self.shift = normalisation(preprocessing, self.device)
        self.num_classes = self._probe()

    @torch.inference_mode()
    def logits(self, images_BCSS: Tensor) -> Tensor:
        pixels = images_BCSS.to(self.device, non_blocking=True).contiguous(memory_format=self.memory_format)
        # In the dtype that autocast would make of it anyway, so that it is written once.
        normalised = scaled(pixels, self.scale, self.shift, AUTOCAST.get(self.precision, torch.float32))
        with (
            faithful_kernels(self.precision) if self.device.type == "cuda" else nullcontext(),
            torch.autocast(self.device.type, AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST),
        ):
            return self.module(normalised).float()

    def renormalised(self, mean: Triple, std: Triple) -> ModuleTeacher:
        other = copy.copy(self)
        other.preprocessing = replace(self.preprocessing, mean=mean, std=std)
        other.scale, other.shift = normalisation(other.preprocessing, self.device)
        return other

    def _probe(self) -> int:
        size = self.preprocessing.size
        try:
            output = self.logits(torch.zeros((1, 3, size, size), dtype=torch.uint8))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise TeacherError(f"teacher {self.spec}: cannot run on one {size}x{size} image: {error}") from error
        if output.ndim != 2:
            raise TeacherError(
                f"teacher {self.spec}: gives a tensor of shape {tuple(output.shape)}, expected (B, classes)"
            )
        return int(output.shape[1])


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


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in the order of the names: the same wherever they came from."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def preprocessing_of(
    spec: TeacherSpec,
    *,
    size: int | None = None,
    interpolation: str | None = None,
    mean: object = None,
    std: object = None,
) -> Preprocessing:
    """What the spec says, else what is known of the model. Raises TeacherError for what neither says."""
    known = {"size": size, "mean": mean, "std": std}
    values: dict[str, object] = {}
    for name, value in known.items():
        chosen = getattr(spec, name) if getattr(spec, name) is not None else value
        if chosen is None:
            example = "224" if name == "size" else "0.485,0.456,0.406" if name == "mean" else "0.229,0.224,0.225"
            raise TeacherError(f"teacher {spec}: its {name} is not known; add the option, such as ?{name}={example}")
        values[name] = chosen
    for name in ("mean", "std"):
        numbers = [float(x) for x in values[name]]  # type: ignore[attr-defined]
        values[name] = tuple(numbers * 3 if len(numbers) == 1 else numbers)
    chosen_filter = spec.interpolation or interpolation or "bilinear"
    return Preprocessing(interpolation=chosen_filter, **values)  # type: ignore[arg-type]
