"""Teachers from ONNX files, `onnx:FILE`, run by ONNX Runtime; `export_onnx` writes such a file.

On a CPU, ONNX Runtime runs many convolutional networks several times as fast as eager PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ferkd_data import extras
from ferkd_data.errors import TeacherError
from ferkd_data.storage import expanded, write_atomically
from ferkd_data.teachers.digest import onnx_digest, with_choices
from ferkd_data.teachers.module_teacher import MORE_MEMORY, normalisation, two_pictures
from ferkd_data.teachers.outputs import check_activation, check_shape, to_logits
from ferkd_data.teachers.spec import Preprocessing, TeacherSpec, Triple, preprocessing_of
from ferkd_data.teachers.teacher import Precision, is_out_of_memory, reason, refuse_failed_device

PREPROCESSING_FIELD = "ferkd_data.preprocessing"
"""Key in the model's metadata under which `export_onnx` stores the preprocessing as JSON."""
CUDA_PROVIDER = "CUDAExecutionProvider"
INPUT_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
AS_THEY_ARE = {"mean": (0.0,), "std": (1 / 255,)}
"""A normalisation that leaves pixel values as they are: (pixel / 255 - 0) / (1 / 255) = pixel."""
WARNINGS_AND_UP = 3


class OnnxTeacher:
    """A teacher made of an ONNX file. It runs once at construction. Raises TeacherError, MissingExtraError."""

    published_top1: float | None = None
    class_names: tuple[str, ...] | None = None

    def __init__(self, spec: TeacherSpec, *, device: str, precision: Precision) -> None:
        runtime = extras.require("onnxruntime", extra="onnx", what_for=f"teacher {spec}")
        path = expanded(spec.name)
        if not path.is_file():
            raise TeacherError(f"teacher {spec}: no such file")
        if precision != "fp32":
            raise TeacherError(f"teacher {spec}: an ONNX file has its own precision; use --precision fp32")
        self.spec = spec
        self.precision: Precision = precision
        self.device = device
        self.session = self._open(runtime, path, device)
        self.digest = with_choices(onnx_digest(path, spec), spec)
        self.input = self._input()
        self.input_name = self.input.name
        self.output_names = self._outputs()
        self.fixed_batch = self.input.batch
        self.preprocessing = self._preprocessing()
        self.scale, self.shift = normalisation(self.preprocessing, torch.device("cpu"))
        self.num_classes = self._first_answer()
        one_by_one = "takes one image at a time, which is slow; export it with an open batch size"
        self.hints: tuple[str, ...] = (one_by_one,) if self.fixed_batch == 1 else ()

    def logits(self, images_BCSS: Tensor) -> Tensor:
        output = self._answer(images_BCSS)
        if output.shape[1] != self.num_classes:
            raise TeacherError(
                f"teacher {self.spec}: returned {output.shape[1]} classes, after {self.num_classes} in its first run"
            )
        return to_logits(output, self.spec.activation).to(images_BCSS.device, non_blocking=True)

    def renormalised(self, mean: Triple, std: Triple) -> OnnxTeacher:
        other = copy.copy(self)
        other.preprocessing = replace(self.preprocessing, mean=mean, std=std)
        other.scale, other.shift = normalisation(other.preprocessing, torch.device("cpu"))
        return other

    def _answer(self, images_BCSS: Tensor) -> Tensor:
        """Run the model; return its output (B, C) as float32 on the CPU."""
        # One pass converts to float32 and to planar channels, which ONNX expects; two more work in place.
        # From a GPU, uint8 is fetched: a quarter of the bytes of float32.
        planes = torch.empty(images_BCSS.shape, dtype=torch.float32, device="cpu").copy_(images_BCSS.cpu())
        normalised = self.input.arranged(planes.mul_(self.scale).add_(self.shift))
        steps = self.fixed_batch or len(normalised)
        parts = [self._run(normalised[start : start + steps]) for start in range(0, len(normalised), steps)]
        return torch.from_numpy(np.concatenate(parts))

    def _run(self, batch: Any) -> Any:
        short = 0 if self.fixed_batch is None else self.fixed_batch - len(batch)
        # Copies of the last image fill up a fixed batch; their rows are cut off again below.
        padded = np.concatenate([batch, np.repeat(batch[-1:], short, axis=0)]) if short else batch
        try:
            output = self.session.run(self.output_names, {self.input_name: padded})[0]
        except Exception as error:
            # ONNX Runtime's exceptions share no base class but Exception.
            if "onnxruntime" not in type(error).__module__:
                raise
            if is_out_of_memory(error):
                raise torch.cuda.OutOfMemoryError(str(error)) from error
            refuse_failed_device(self.device, error, self.spec)
            raise TeacherError(f"teacher {self.spec}: cannot run on {padded.shape}: {error}") from error
        if not isinstance(output, np.ndarray) or output.dtype.kind != "f":
            kind = output.dtype if isinstance(output, np.ndarray) else type(output).__name__
            raise TeacherError(f"teacher {self.spec}: its output is of type {kind}, expected logits, which are floats")
        # (B, C, 1, 1), as fully convolutional heads give it, to (B, C).
        output = output.reshape(len(output), -1) if sum(side != 1 for side in output.shape[1:]) <= 1 else output
        check_shape(torch.from_numpy(output), len(padded), self.spec)
        return output[: len(batch)].astype(np.float32, copy=False)

    def _open(self, runtime: Any, path: Path, device: str) -> Any:
        on_cuda = device.startswith("cuda")
        providers: list[Any] = ["CPUExecutionProvider"]
        if on_cuda:
            if CUDA_PROVIDER not in runtime.get_available_providers():
                raise TeacherError(
                    f"teacher {self.spec}: this ONNX Runtime has no CUDA; install onnxruntime-gpu, or use --device cpu"
                )
            providers.insert(0, (CUDA_PROVIDER, cuda_options(torch.device(device))))
        options = runtime.SessionOptions()
        # As many threads as PyTorch has in this worker; by default ONNX Runtime takes one for each core of the machine.
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = WARNINGS_AND_UP
        # Idle threads that spin would take cores from the threads that decode the next images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            if "onnxruntime" not in type(error).__module__:
                raise
            raise TeacherError(f"teacher {self.spec}: ONNX Runtime cannot load it: {error}") from error
        # Where one of CUDA's libraries is missing, ONNX Runtime only logs it and falls back to the CPU.
        if on_cuda and CUDA_PROVIDER not in session.get_providers():
            raise TeacherError(
                f"teacher {self.spec}: ONNX Runtime cannot use CUDA here (its reason is printed above); install the "
                "CUDA and cuDNN that it was built for, or use --device cpu"
            )
        # Nor may it go over to the CPU in the middle of a build, as it does after an error of the GPU.
        session.disable_fallback()
        return session

    def _input(self) -> OnnxInput:
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            named = ", ".join(f"{each.name} {each.shape}" for each in inputs)
            raise TeacherError(f"teacher {self.spec}: has {len(inputs)} inputs ({named}), expected one, the images")
        shape, dtype = inputs[0].shape, INPUT_TYPES.get(inputs[0].type)
        if dtype is None:
            raise TeacherError(f"teacher {self.spec}: takes {inputs[0].type}; expected {', '.join(INPUT_TYPES)}")
        if len(shape) != 4 or not (_is_rgb(shape, 1) or _is_rgb(shape, 3)):
            raise TeacherError(f"teacher {self.spec}: takes input {shape}; expected (B, 3, S, S) or (B, S, S, 3)")
        found = OnnxInput(name=inputs[0].name, shape=tuple(shape), dtype=dtype, channels_last=not _is_rgb(shape, 1))
        if len(found.fixed_sides) > 1:
            raise TeacherError(f"teacher {self.spec}: takes input {shape}; only square images are supported")
        return found

    def _outputs(self) -> list[str]:
        """Choose the one output to compute. Raises TeacherError where the choice is not clear."""
        shapes = {each.name: each.shape for each in self.session.get_outputs()}
        wanted = self.spec.output
        if wanted is None and len(shapes) > 1:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise TeacherError(
                f"teacher {self.spec}: has {len(shapes)} outputs: {listed}; say which holds the logits with the "
                f"option output, such as ?output={next(reversed(shapes))}"
            )
        if wanted is not None and wanted not in shapes:
            raise TeacherError(f"teacher {self.spec}: has no output {wanted!r}; its outputs are {', '.join(shapes)}")
        return [wanted or next(iter(shapes))]

    def _preprocessing(self) -> Preprocessing:
        stored = self.session.get_modelmeta().custom_metadata_map.get(PREPROCESSING_FIELD, "{}")
        known = json.loads(stored)
        fixed = next(iter(self.input.fixed_sides), None)
        if fixed is not None:
            known.setdefault("size", fixed)
        if self.input.dtype == np.uint8:
            known = {**AS_THEY_ARE, **known}
        chosen = preprocessing_of(self.spec, **known)
        # uint8 holds no other values than pixels.
        if self.input.dtype == np.uint8 and (chosen.mean, chosen.std) != (
            AS_THEY_ARE["mean"] * 3,
            AS_THEY_ARE["std"] * 3,
        ):
            raise TeacherError(
                f"teacher {self.spec}: takes uint8 images, so it normalises them itself; drop the options mean and std"
            )
        if fixed is not None and chosen.size != fixed:
            raise TeacherError(f"teacher {self.spec}: takes {fixed}x{fixed} images and no other size")
        return chosen

    def _first_answer(self) -> int:
        """Run two test pictures and return the number of classes; falls back to batches of one picture."""
        pictures = two_pictures(self.preprocessing.size)
        try:
            try:
                output = self._answer(pictures)
            except TeacherError:
                if self.fixed_batch is not None:
                    raise
                # Some graphs fix the batch size to 1 inside, although their input declares an open one.
                self.fixed_batch = 1
                output = self._answer(pictures)
        except torch.cuda.OutOfMemoryError as error:
            raise TeacherError(
                f"teacher {self.spec}: {self.device} has too little memory for a batch of "
                f"{self.fixed_batch or len(pictures)} beside its weights ({reason(error)}); {MORE_MEMORY}"
            ) from error
        check_activation(output, self.spec)
        return int(output.shape[1])


@dataclass(frozen=True, kw_only=True)
class OnnxInput:
    """The input of a model. A size in `shape` is a number where it is fixed, else a name or None."""

    name: str
    shape: tuple[Any, ...]
    dtype: Any
    channels_last: bool
    """The layout is (B, S, S, 3), as in TensorFlow, rather than (B, 3, S, S)."""

    @property
    def batch(self) -> int | None:
        return self.shape[0] if isinstance(self.shape[0], int) and self.shape[0] > 0 else None

    @property
    def fixed_sides(self) -> set[int]:
        """Height and width, as far as they are fixed."""
        sides = self.shape[1:3] if self.channels_last else self.shape[2:]
        return {side for side in sides if isinstance(side, int) and side > 0}

    def arranged(self, planes_BCSS: Tensor) -> Any:
        """Convert images (B, 3, S, S) to an array of the model's layout and dtype."""
        ordered = planes_BCSS.permute(0, 2, 3, 1).contiguous() if self.channels_last else planes_BCSS
        array = ordered.numpy()
        return (array.round() if self.dtype == np.uint8 else array).astype(self.dtype, copy=False)


def _is_rgb(shape: Sequence[Any], axis: int) -> bool:
    """Tell whether an axis can be the channels: its size is 3, or it is axis 1 of open size and the last is not 3."""
    return shape[axis] in (3, "3") or (axis == 1 and not isinstance(shape[1], int) and shape[3] not in (3, "3"))


def cuda_options(device: torch.device) -> dict[str, str]:
    """Make ONNX Runtime's options for one GPU: float32 without TF32, and kernels chosen without timing them."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return {"device_id": str(index), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


def load(spec: TeacherSpec, *, device: str, precision: Precision) -> OnnxTeacher:
    """Load an ONNX file. Raises TeacherError, MissingExtraError."""
    return OnnxTeacher(spec, device=device, precision=precision)


def export_onnx(module: nn.Module, path: Path, *, preprocessing: Preprocessing) -> None:
    """Write `module` (normalised float (B, 3, S, S) to logits) as an ONNX file that includes its preprocessing.

    Raises MissingExtraError without the packages onnx and onnxscript.
    """
    onnx = extras.require("onnx", extra="demo", what_for="exporting to ONNX")
    extras.require("onnxscript", extra="demo", what_for="exporting to ONNX")
    example = torch.zeros((2, 3, preprocessing.size, preprocessing.size), device="cpu")
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    with (
        write_atomically(path) as aside,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        quiet.setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                module.eval(),
                (example,),
                str(aside),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
        finally:
            quiet.setLevel(level)
        model = onnx.load(str(aside))
        fields = ("size", "interpolation", "mean", "std")
        known = {name: getattr(preprocessing, name) for name in fields}
        onnx.helper.set_model_props(model, {PREPROCESSING_FIELD: json.dumps(known)})
        # Metadata goes into the file itself, so that the preprocessing cannot be lost beside it.
        onnx.save(model, str(aside))
