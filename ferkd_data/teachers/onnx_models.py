"""Teachers from ONNX files: `onnx:FILE`, run by ONNX Runtime; and how to write such a file.

On a CPU, ONNX Runtime runs many convolutional networks several times faster than eager PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ferkd_data import extras
from ferkd_data.errors import TeacherError
from ferkd_data.storage import sha256_file, write_atomically
from ferkd_data.teachers.memory import is_out_of_memory
from ferkd_data.teachers.spec import Preprocessing, TeacherSpec, Triple
from ferkd_data.teachers.teacher import Precision, normalisation, preprocessing_of

PREPROCESSING_FIELD = "ferkd_data.preprocessing"
"""Key in the model's metadata under which `export_onnx` keeps the preprocessing as JSON."""
CUDA_PROVIDER = "CUDAExecutionProvider"
WARNINGS_AND_UP = 3


class OnnxTeacher:
    published_top1: float | None = None
    class_names: tuple[str, ...] | None = None

    def __init__(self, spec: TeacherSpec, *, device: str, precision: Precision) -> None:
        runtime = extras.require("onnxruntime", extra="onnx", what_for=f"teacher {spec}")
        path = Path(spec.name)
        if not path.is_file():
            raise TeacherError(f"teacher {spec}: no such file")
        if precision != "fp32":
            raise TeacherError(f"teacher {spec}: an ONNX file has its own precision; use --precision fp32")
        self.spec = spec
        self.precision: Precision = precision
        self.digest = sha256_file(path)
        self.session = self._open(runtime, path, device)
        source = self.session.get_inputs()[0]
        self.input_name = source.name
        self.fixed_batch = source.shape[0] if isinstance(source.shape[0], int) else None
        self.preprocessing = self._preprocessing(source.shape)
        self.scale, self.shift = normalisation(self.preprocessing, torch.device("cpu"))
        size = self.preprocessing.size
        self.num_classes = int(self.logits(torch.zeros((1, 3, size, size), dtype=torch.uint8)).shape[1])

    def logits(self, images_BCSS: Tensor) -> Tensor:
        # One pass that converts and makes the channels planes, which ONNX wants, then two in place.
        # From a GPU the bytes are fetched as they are, a quarter of what the same numbers take as float32.
        planes = torch.empty(images_BCSS.shape, dtype=torch.float32).copy_(images_BCSS.cpu())
        normalised = planes.mul_(self.scale).add_(self.shift).numpy()
        steps = self.fixed_batch or len(normalised)
        parts = [self._run(normalised[start : start + steps]) for start in range(0, len(normalised), steps)]
        return torch.from_numpy(np.concatenate(parts)).to(images_BCSS.device, non_blocking=True)

    def renormalised(self, mean: Triple, std: Triple) -> OnnxTeacher:
        other = copy.copy(self)
        other.preprocessing = replace(self.preprocessing, mean=mean, std=std)
        other.scale, other.shift = normalisation(other.preprocessing, torch.device("cpu"))
        return other

    def _run(self, batch: Any) -> Any:
        short = 0 if self.fixed_batch is None else self.fixed_batch - len(batch)
        padded = np.concatenate([batch, np.repeat(batch[-1:], short, axis=0)]) if short else batch
        try:
            output = self.session.run(None, {self.input_name: padded})[0]
        except Exception as error:
            # ONNX Runtime's own exceptions share no base but Exception.
            if "onnxruntime" not in type(error).__module__:
                raise
            if is_out_of_memory(error):
                raise torch.cuda.OutOfMemoryError(str(error)) from error
            raise TeacherError(f"teacher {self.spec}: cannot run on {padded.shape}: {error}") from error
        if output.ndim != 2:
            raise TeacherError(f"teacher {self.spec}: gives shape {output.shape}, expected (B, classes)")
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
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = WARNINGS_AND_UP
        # Idle threads that spin would take the cores that decode the next images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            if "onnxruntime" not in type(error).__module__:
                raise
            raise TeacherError(f"teacher {self.spec}: ONNX Runtime cannot load it: {error}") from error
        # Where a library of CUDA's is missing it says so in its log, and goes on with the CPU.
        if on_cuda and CUDA_PROVIDER not in session.get_providers():
            raise TeacherError(
                f"teacher {self.spec}: ONNX Runtime cannot use CUDA here (its reason is printed above); install the "
                "CUDA and cuDNN that it was built for, or use --device cpu"
            )
        return session

    def _preprocessing(self, shape: list[Any]) -> Preprocessing:
        known = json.loads(self.session.get_modelmeta().custom_metadata_map.get(PREPROCESSING_FIELD, "{}"))
        if isinstance(shape[-1], int):
            known.setdefault("size", shape[-1])
        if len(shape) != 4 or shape[1] not in (3, "3") or shape[-1] != shape[-2]:
            raise TeacherError(f"teacher {self.spec}: takes input {shape}; expected (B, 3, S, S)")
        return preprocessing_of(self.spec, **known)


def cuda_options(device: torch.device) -> dict[str, str]:
    """On the GPU that was asked for, in float32 indeed, and with kernels that are chosen without measuring."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return {"device_id": str(index), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}


def load(spec: TeacherSpec, *, device: str, precision: Precision) -> OnnxTeacher:
    return OnnxTeacher(spec, device=device, precision=precision)


def export_onnx(module: nn.Module, path: Path, *, preprocessing: Preprocessing) -> None:
    """Write `module` (normalised float (B, 3, S, S) to logits) as an ONNX file that knows its preprocessing.

    Raises MissingExtraError without the packages onnx and onnxscript.
    """
    onnx = extras.require("onnx", extra="demo", what_for="exporting to ONNX")
    extras.require("onnxscript", extra="demo", what_for="exporting to ONNX")
    example = torch.zeros((2, 3, preprocessing.size, preprocessing.size))
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
        onnx.save(model, str(aside))
