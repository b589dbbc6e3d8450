"""Extract class logits from what a model returns: pick the output, check its shape, and undo an activation.

Legend: B crops, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ferkd_data.errors import TeacherError
from ferkd_data.teachers.spec import Activation, TeacherSpec

LOGITS = "logits"
"""Entry of a result that transformers and others fill with class logits."""
ROW_SUM_TOLERANCE = 0.02
"""Half-precision softmaxes of 1,000 classes miss 1 by up to 0.01."""
TELLING_ROWS = 4
TELLING_CLASSES = 8
"""Rows, or classes in a row, from which values within 0..1 with sum 1 are not taken for chance."""
TELLING_NUMBERS = 64
"""Numbers from which values that are all within 0..1 are not taken for chance."""
SIGMOID_EPS = 1e-7
"""Distance from 0 and 1 that outputs of a sigmoid are clamped to, so that their logits are finite."""
NAMES_SHOWN = 12


class LogitsOnly(nn.Module):
    """Wrap a module that returns several outputs, or activations, so that `forward` returns class logits (B, C)."""

    def __init__(self, module: nn.Module, spec: TeacherSpec) -> None:
        super().__init__()
        self.module = module
        self.spec = spec

    def forward(self, images: Tensor) -> Tensor:
        return to_logits(pick_output(self.module(images), self.spec), self.spec.activation)


def pick_output(result: Any, spec: TeacherSpec) -> Tensor:
    """Pick the tensor with one row per image from a model's result.

    `result` is a tensor, or a tuple, list, mapping or dataclass, of which `spec.output` names the entry. Without
    `spec.output`, the only entry or the entry `logits` is taken. Raises TeacherError that lists the entries.
    """
    if isinstance(result, Tensor):
        if spec.output is not None:
            raise TeacherError(f"teacher {spec}: its model returns a single tensor; drop the option output")
        return _rows(result, spec)
    entries = _entries(result)
    if not entries:
        raise TeacherError(
            f"teacher {spec}: its model returns {_article(result)}, expected a tensor of logits (B, classes)"
        )
    if spec.output is not None:
        if spec.output not in entries:
            raise TeacherError(f"teacher {spec}: has no output {spec.output!r}; its outputs are {_listed(entries)}")
        chosen = entries[spec.output]
    elif len(entries) == 1:
        (chosen,) = entries.values()
    elif LOGITS in entries:
        chosen = entries[LOGITS]
    else:
        raise TeacherError(
            f"teacher {spec}: has {len(entries)} outputs: {_listed(entries)}; say which holds the logits with the "
            f"option output, such as ?output={next(reversed(entries))}"
        )
    if not isinstance(chosen, Tensor):
        raise TeacherError(f"teacher {spec}: the output it takes for logits is {_article(chosen)}, not a tensor")
    return _rows(chosen, spec)


def to_logits(output_BC: Tensor, activation: Activation | None) -> Tensor:
    """Invert the activation: return logits (B, C) whose softmax (for `sigmoid`: logistic function) is the output.

    Probabilities become their logarithms: softmax(log p) = p. Those of percentages are larger by a constant, which the
    softmax takes away.
    """
    if activation == "probabilities":
        # A probability that was rounded to 0 gets a finite logarithm, -87: the checks refuse infinite logits.
        return output_BC.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    if activation == "sigmoid":
        return torch.logit(output_BC.float(), eps=SIGMOID_EPS)
    return output_BC


def looks_like(output_BC: Tensor) -> Activation:
    """Guess the kind of numbers in an output (B, C): logits are hardly ever all positive with equal sums, or in 0..1.

    Numbers from 0 on are probabilities, or percentages, where all rows have the same sum; other numbers within 0..1 are
    outputs of a sigmoid. Too few numbers to tell are taken for logits.
    """
    values = output_BC.detach().float()
    if not torch.isfinite(values).all() or values.min() < 0:
        return "logits"
    rows, classes = values.shape
    if _have_one_sum(values):
        # One row, or several equal ones, have the same sum: 1 tells something, another sum does not.
        sums_to_1 = abs(float(values.sum(dim=1)[0]) - 1) < ROW_SUM_TOLERANCE
        differ = bool((values != values[:1]).any())
        telling = (rows >= TELLING_ROWS and (sums_to_1 or differ)) or (sums_to_1 and classes >= TELLING_CLASSES)
        return "probabilities" if telling else "logits"
    if values.max() > 1 + ROW_SUM_TOLERANCE:
        return "logits"
    # Equal values for every class allow no guess; `probe.check_answers` refuses such a model.
    same = bool((values == values[:, :1]).all())
    return "logits" if same or values.numel() < TELLING_NUMBERS else "sigmoid"


def check_activation(output_BC: Tensor, spec: TeacherSpec) -> None:
    """Raise TeacherError where the output contradicts the spec's activation, or is probabilities without one."""
    sums = output_BC.float().sum(dim=1)
    if spec.activation is None and looks_like(output_BC) == "probabilities":
        raise TeacherError(
            f"teacher {spec}: gives probabilities (no number below 0, and rows that all sum to {float(sums[0]):.3g}), "
            "not logits, and a softmax over them would give other ones; add the option ?activation=probabilities"
        )
    if spec.activation == "probabilities" and (output_BC.min() < 0 or not _have_one_sum(output_BC.float())):
        raise TeacherError(
            f"teacher {spec}: is declared to give probabilities, but its rows are not numbers from 0 on with one sum "
            f"(row sums {_range(sums)}, values {_range(output_BC)}); drop the option activation"
        )
    if spec.activation == "sigmoid" and (output_BC.min() < 0 or output_BC.max() > 1):
        raise TeacherError(
            f"teacher {spec}: is declared to give outputs of a sigmoid, but its values are {_range(output_BC)}; drop "
            "the option activation"
        )


def check_shape(output: Tensor, num_images: int, spec: TeacherSpec) -> None:
    """Raise TeacherError unless the output is (num_images, C), with C = `spec.classes` where that is given."""
    if output.ndim != 2:
        raise TeacherError(
            f"teacher {spec}: gives a tensor of shape {tuple(output.shape)}, expected (B, classes); if these are "
            "features, add the classifier"
        )
    if len(output) != num_images:
        raise TeacherError(
            f"teacher {spec}: gives {len(output)} rows for {num_images} images, expected one row for each; does it "
            "average over its batch, or was it traced for one image?"
        )
    if output.shape[1] < 2:
        raise TeacherError(f"teacher {spec}: gives {output.shape[1]} number for each image, expected one per class")
    if spec.classes is not None and output.shape[1] != spec.classes:
        raise TeacherError(
            f"teacher {spec}: gives {output.shape[1]} numbers for each image, expected {spec.classes} classes"
        )


def _have_one_sum(values_BC: Tensor) -> bool:
    """Return whether all rows have the same sum, above 0."""
    sums = values_BC.sum(dim=1)
    return bool(sums.min() > 0 and sums.max() - sums.min() < ROW_SUM_TOLERANCE * sums.mean())


def _rows(output: Tensor, spec: TeacherSpec) -> Tensor:
    """Drop axes of size 1, which fully convolutional heads leave: (B, C, 1, 1) becomes (B, C).

    Raises TeacherError for integers, such as the number of the best class or quantised probabilities.
    """
    if not output.is_floating_point():
        raise TeacherError(f"teacher {spec}: its output is of type {output.dtype}, expected logits, which are floats")
    if output.ndim > 2 and sum(side != 1 for side in output.shape[1:]) <= 1:
        return output.flatten(1)
    return output


def _entries(result: Any) -> dict[str, Any]:
    """List the outputs of a result by name, or by number; those that are None are left out."""
    if isinstance(result, Mapping):
        entries = {str(name): value for name, value in result.items()}
    elif is_dataclass(result) and not isinstance(result, type):
        entries = {field.name: getattr(result, field.name) for field in fields(result)}
    # A named tuple, whose names are more useful in a message than numbers.
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        entries = dict(zip(result._fields, result, strict=True))
    elif isinstance(result, Sequence) and not isinstance(result, (str, bytes)):
        entries = {str(number): value for number, value in enumerate(result)}
    else:
        return {}
    return {name: value for name, value in entries.items() if value is not None}


def _listed(entries: Mapping[str, Any]) -> str:
    texts = [
        f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{name} ({type(value).__name__})"
        for name, value in list(entries.items())[:NAMES_SHOWN]
    ]
    return ", ".join(texts) + (", …" if len(entries) > NAMES_SHOWN else "")


def _article(value: Any) -> str:
    return f"an object of type {type(value).__name__}"


def _range(values: Tensor) -> str:
    return f"{float(values.min()):.3g}..{float(values.max()):.3g}"
