"""Training targets, kept as a sparse vector plus a uniform floor; dense (B, C) only where a user asks for it.

Legend: B crops, K sparse entries, C classes, k stored classes. The target of row b is `floor[b]` on each of the C
classes, plus `weight[b, j]` at class `index[b, j]`. Entries of one class add up; padding has weight 0.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.errors import UsageError
from ferkd_data.html_tables import html_table

Recovery: TypeAlias = Literal["smooth", "renorm", "hard", "label_smoothing"]
RECOVERIES: tuple[Recovery, ...] = get_args(Recovery)
Floats: TypeAlias = npt.NDArray[np.float32]
ROWS_IN_HTML, CLASSES_IN_HTML = 8, 3
"""Rows, and classes of each, that a notebook shows of targets."""
Number: TypeAlias = float
"""`float`, where `SoftTargets.float` hides it."""


# Not frozen: Lightning's precision plugins set the fields of a batch's dataclasses anew, and refuse frozen ones.
@dataclass(kw_only=True, eq=False)
class SoftTargets:
    """Soft targets of B crops over C classes, and what else a loader knows of each crop.

    The target of crop b is `floor[b]` on each of the C classes, plus `weight[b, j]` at class `index[b, j]`: FKD's
    recovery of a distribution from its top k (Shen and Xing, ECCV 2022) without an array (B, C). Losses take it as it
    is; `dense()` makes the array.

    The fields from `hard` on are None unless a loader filled them in. After mixing, `hard`, `bucket`, `rows` and `keys`
    are those of the crop with the larger share; on a tie, of the crop that was mixed into.

    >>> import torch
    >>> index, weight = torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.1]])
    >>> targets = fd.SoftTargets(index=index, weight=weight, floor=torch.tensor([0.05]), num_classes=4)
    >>> targets
    SoftTargets(1 rows, 4 classes, 2 sparse entries, float32 on cpu)
    >>> targets.dense()
    tensor([[0.1500, 0.0500, 0.7500, 0.0500]])
    """

    index: Tensor
    """(B, K) int64"""
    weight: Tensor
    """(B, K) float32"""
    floor: Tensor
    """(B,) float32"""
    num_classes: int
    hard: Tensor | None = None
    """(B,) int64: ground-truth classes, -1 where unknown (for torch's cross_entropy: ignore_index=-1)."""
    hard_partner: Tensor | None = None
    """(B,) int64: ground truth of the crop that was mixed in; that of `hard` where none was."""
    hard_share: Tensor | None = None
    """(B,) float32: share of `hard` in the last mixing, 0.5 to 1. 1 where both ground truths are the same."""
    bucket: Tensor | None = None
    """(B,) uint8: difficulty codes (see `buckets.BUCKETS`), for the thresholds of the calibration."""
    rows: Tensor | None = None
    """(B,) int64: each crop's row in the loader's label set, `loader.labels`."""
    keys: tuple[str, ...] | None = None
    """Each crop's image key, where the loader was asked for them (`keys=True`)."""

    def __len__(self) -> int:
        return len(self.floor)

    def __repr__(self) -> str:
        known = [name for name in ("hard", "hard_partner", "bucket", "rows", "keys") if getattr(self, name) is not None]
        more = f", with {', '.join(known)}" if known else ""
        return (
            f"SoftTargets({len(self)} rows, {self.num_classes} classes, {self.index.shape[1]} sparse entries, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}{more})"
        )

    def _repr_html_(self) -> str:
        """Show the most probable classes of the first rows, for notebooks."""
        shown = self[:ROWS_IN_HTML].to("cpu")
        dense = shown.dense()
        count = min(CLASSES_IN_HTML, self.num_classes)
        best = dense.topk(count, dim=1)
        rows = []
        for number, (probs, classes) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            named = ", ".join(f"class {index}: {prob:.3f}" for index, prob in zip(classes, probs, strict=True))
            name = shown.keys[number] if shown.keys is not None else str(number)
            truth = "" if shown.hard is None or int(shown.hard[number]) < 0 else f"class {int(shown.hard[number])}"
            rows.append((name, named, truth))
        more = f", the first {len(rows)}" if len(self) > len(rows) else ""
        title = f"SoftTargets of {len(self):,} crops and {self.num_classes:,} classes{more}"
        return html_table(title, rows, head=("crop", f"the {count} largest", "ground truth"))

    def __getitem__(self, rows: int | slice | Sequence[int] | npt.NDArray[Any] | Tensor) -> SoftTargets:
        """Select some crops, by a slice, a list, array or tensor of numbers, or a bool mask; a number selects one crop.

        Raises IndexError for a number beyond the last crop.
        """
        selected = rows if isinstance(rows, (slice, Tensor)) else torch.as_tensor(rows, device="cpu")
        if isinstance(selected, Tensor) and not selected.numel() and selected.dtype != torch.bool:
            # PyTorch takes an empty list for one of floats.
            selected = selected.to(torch.int64)
        if isinstance(selected, Tensor) and not selected.dim():
            # Not a row without its axis, as a tensor gives it: that would be no targets, and could not be printed.
            row = range(len(self))[operator.index(selected)]
            selected = slice(row, row + 1)
        keys = None
        if self.keys is not None:
            # Keys are a tuple, which PyTorch's indices do not select from: numbers of rows stand in for them.
            numbers = torch.arange(len(self), device="cpu")
            chosen = numbers[selected if isinstance(selected, slice) else selected.cpu()]
            keys = tuple(self.keys[row] for row in chosen.tolist())
        return replace(self._map(lambda tensor: tensor[selected]), keys=keys)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of `weight` and `floor`."""
        return self.weight.dtype

    def to(self, *args: Any, **kwargs: Any) -> SoftTargets:
        """Convert to another device or floating-point type; called as `torch.Tensor.to` is.

        `to("cuda")`, `to(torch.float16)`, `to("cuda", torch.float16, non_blocking=True)`, `to(other)` with a tensor or
        other targets. A type changes weights, floor and shares; class indices, rows and bucket codes stay integers.

        Raises UsageError for a type that is not floating-point.
        """
        args = tuple(arg.weight if isinstance(arg, SoftTargets) else arg for arg in args)
        kwargs = {name: arg.weight if isinstance(arg, SoftTargets) else arg for name, arg in kwargs.items()}
        # Asked of PyTorch with an empty tensor: the same arguments mean the same as for `Tensor.to`, whatever they are.
        probe = self.weight[:0].to(*args, **kwargs)
        if not probe.is_floating_point():
            raise UsageError(f"targets hold probabilities: their type must be floating-point, got {probe.dtype}")

        def change(tensor: Tensor) -> Tensor:
            # Another tensor of the wanted type and device, since a type must not be asked of integers.
            like = probe if tensor.is_floating_point() else probe.to(tensor.dtype)
            # non_blocking and copy given by position. Device and type are those of `like`.
            given = tuple(arg for arg in args if isinstance(arg, bool))
            options = {name: arg for name, arg in kwargs.items() if name in ("non_blocking", "copy")}
            return tensor.to(like, *given, **options)

        return self._map(change)

    def half(self) -> SoftTargets:
        return self.to(torch.float16)

    def bfloat16(self) -> SoftTargets:
        return self.to(torch.bfloat16)

    def float(self) -> SoftTargets:
        return self.to(torch.float32)

    def double(self) -> SoftTargets:
        return self.to(torch.float64)

    def cpu(self) -> SoftTargets:
        return self.to("cpu")

    def cuda(self, device: torch.device | str | int | None = None, non_blocking: bool = False) -> SoftTargets:
        """Move to a GPU, by default the current one; called as `torch.Tensor.cuda` is.

        Raises UsageError for a device that is no GPU.
        """
        where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
        if where.type != "cuda":
            raise UsageError(f"cuda moves targets to a GPU, got {str(where)!r}; to({str(where)!r}) moves them there")
        return self.to(where, non_blocking=non_blocking)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory from being used again until `stream` has done its present work, as a tensor's method does.

        A loop that moves batches on a stream of its own calls it with the stream that works on them.
        """
        for name in TENSORS:
            tensor = getattr(self, name)
            if tensor is not None:
                tensor.record_stream(stream)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Refuse functions of PyTorch, such as losses that a training loop calls, and say what takes these targets."""
        raise UsageError(
            f"{getattr(func, '__name__', func)} takes tensors, and these are SoftTargets: use fd.soft_cross_entropy or "
            'fd.SoftTargetLoss, or take tensors (B, C) from a loader with targets="dense" or from targets.dense()'
        )

    def pin_memory(self) -> SoftTargets:
        return self._map(lambda tensor: tensor.pin_memory())

    def dense(self) -> Tensor:
        """Return plain targets (B, C), none below 0, in the type of `weight` (float32 from a loader)."""
        target = self.floor[:, None].repeat(1, self.num_classes)
        # A class stored as 0 has the weight -floor; rounding must not leave -1e-12 of it, of which a log is NaN.
        return target.scatter_add_(1, self.index, self.weight).clamp_(min=0)

    def tempered(self, temperature: Number) -> SoftTargets:
        """Apply a temperature T to each target: every probability becomes p^(1/T), divided by the sum of all.

        T above 1 makes targets softer. This is what a teacher's softmax at temperature T gives, as far as the stored
        probabilities tell: the classes under the floor are taken to be equally probable. Entries of one class are
        added up first. Raises UsageError for a temperature that is not positive and finite.
        """
        check_positive("temperature", temperature)
        if temperature == 1:
            return self
        index, prob = self.merged()
        # Relative to the largest, so that no power takes a whole row to 0.
        peak = torch.maximum(prob.amax(dim=1), self.floor)
        powers = (prob / peak[:, None]).pow(1 / temperature)
        floor = (self.floor.clamp(min=0) / peak).pow(1 / temperature)
        # The other C - K classes have the floor alone. Entries of one class were merged, so K columns are K classes.
        total = powers.sum(dim=1) + (self.num_classes - prob.shape[1]) * floor
        floor = floor / total
        return replace(self, index=index, weight=powers / total[:, None] - floor[:, None], floor=floor)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return class indices and whole probabilities (B, K), with the entries of one class added up in one of them.

        An entry left over stands for a class that has the floor alone, and has the index of another entry.
        """
        index, order = self.index.sort(dim=1)
        # Sorted, equal classes are neighbours: the running count of changes numbers the distinct ones from 0.
        new_class = (index.diff(dim=1, prepend=index[:, :1]) != 0).cumsum(dim=1)
        weight = torch.zeros_like(self.weight).scatter_add_(1, new_class, self.weight.gather(1, order))
        # A class stored as 0 has the weight -floor; rounding must not leave less than nothing of it.
        return index.scatter(1, new_class, index), (weight + self.floor[:, None]).clamp_(min=0)

    def total(self) -> Tensor:
        """Return the sum (B,) of each target: 1, but for rounding."""
        return self.weight.sum(dim=1) + self.floor * self.num_classes

    def mix(self, partner: Tensor, share: Tensor) -> SoftTargets:
        """Mix targets: target b becomes share[b] of itself and 1 - share[b] of target partner[b]. K doubles.

        `partner` is int64 (B,), `share` float32 (B,), both on the targets' device.
        """
        # Sparse entries of both, side by side: no class has to be looked for, since entries of one class add up.
        own = share[:, None]
        mixed = SoftTargets(
            index=torch.cat([self.index, self.index[partner]], dim=1),
            weight=torch.cat([self.weight * own, self.weight[partner] * (1 - own)], dim=1),
            floor=self.floor * share + self.floor[partner] * (1 - share),
            num_classes=self.num_classes,
        )
        if self.hard is None and self.bucket is None and self.rows is None and self.keys is None:
            return mixed
        own_row = torch.arange(len(self), device=self.device)
        larger = torch.where(share >= 0.5, own_row, partner)
        known: dict[str, Any] = {
            name: tensor[larger] for name in ("hard", "bucket", "rows") if (tensor := getattr(self, name)) is not None
        }
        if self.hard is not None:
            other = self.hard[torch.where(share >= 0.5, partner, own_row)]
            # Nothing was mixed in: the partner's ground truth says nothing of this crop.
            other = torch.where((share <= 0) | (share >= 1), known["hard"], other)
            # Two crops of one class, such as SelfMix's: their shares add up to the whole.
            same = other == known["hard"]
            known |= {"hard_partner": other, "hard_share": torch.maximum(share, 1 - share).masked_fill(same, 1)}
        if self.keys is not None:
            known["keys"] = tuple(self.keys[row] for row in larger.tolist())
        return replace(mixed, **known)

    def _map(self, change: Callable[[Tensor], Tensor]) -> SoftTargets:
        """Apply `change` to every tensor."""
        changed: dict[str, Any] = {
            name: change(tensor) for name in TENSORS if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **changed)

    @classmethod
    def cat(cls, parts: list[SoftTargets]) -> SoftTargets:
        """Join targets of the same classes, one after the other, with the fields that all of them have.

        Raises UsageError where there are none, or their numbers of classes differ.
        """
        classes = sorted({part.num_classes for part in parts})
        if len(classes) != 1:
            raise UsageError(
                f"targets of {' and '.join(map(str, classes))} classes cannot be joined: class numbers would change "
                "their meaning; map_classes gives label sets the same classes"
                if classes
                else "there are no targets to join"
            )
        # K differs where calibrations do, as between the epochs of a schedule.
        width = max(part.index.shape[1] for part in parts)
        parts = [part._padded(width) for part in parts]
        joined: dict[str, Any] = {}
        for name in (*TENSORS, "keys"):
            values = [getattr(part, name) for part in parts]
            # A field that one of them lacks would have fewer rows than the others.
            if all(value is not None for value in values):
                joined[name] = sum(values, ()) if name == "keys" else torch.cat(values)
        return cls(num_classes=classes[0], **joined)

    def _padded(self, width: int) -> SoftTargets:
        """Return the same targets with K = `width` entries, those added having weight 0."""
        missing = width - self.index.shape[1]
        if not missing:
            return self
        index, weight = (torch.nn.functional.pad(tensor, (0, missing)) for tensor in (self.index, self.weight))
        return replace(self, index=index, weight=weight)


TENSORS = ("index", "weight", "floor", "hard", "hard_partner", "hard_share", "bucket", "rows")
"""The fields of `SoftTargets` that are tensors with a leading axis B."""


def check_positive(name: str, value: float) -> None:
    """Raise UsageError unless the value is positive and finite."""
    if not 0 < value < math.inf:
        raise UsageError(f"{name} must be positive and finite, got {value}")


def recover(
    class_prob: npt.NDArray[Any], *, num_classes: int, mode: Recovery = "smooth", temperature: float = 1.0
) -> tuple[Floats, Floats]:
    """Recover distributions over all classes from their stored top k (B, k), after FKD: weights (B, k), floor (B,).

    smooth: the missing mass is spread evenly over the other C - k classes. renorm: the top-k are rescaled to sum to 1.
    hard: all mass on the first class. label_smoothing: the first probability is kept, the rest spread evenly over the
    other C - 1 classes.

    With a temperature T, every probability of the recovered distribution becomes p^(1/T), normalised again. Every row
    sums to 1, also where float16 rounding took the stored sum above it.

    Raises UsageError for an unknown mode or a temperature that is not positive and finite.
    """
    check_positive("temperature", temperature)
    # A copy, also of float32: modes below write into it.
    prob = class_prob.astype(np.float32)
    kept = prob.shape[1]
    if mode == "hard":
        prob = np.zeros_like(prob)
        prob[:, 0] = 1
        return prob, np.zeros(len(prob), np.float32)
    if mode == "label_smoothing":
        prob[:, 1:] = 0
        kept = 1
    elif mode not in ("smooth", "renorm"):
        raise UsageError(f"recovery must be one of {', '.join(RECOVERIES)}, got {mode!r}")
    others = num_classes - kept
    total = prob.sum(axis=1)
    # Not negative, where float16 took the sum above 1; `norm` brings it back to 1 then.
    missing = np.maximum(1 - total, 0) if mode != "renorm" and others else np.zeros_like(total)
    floor = missing / max(others, 1)
    if temperature != 1:
        # Relative to the largest, so that no power takes a whole row to 0.
        peak = np.maximum(prob.max(axis=1), floor)
        prob, floor = np.power(prob / peak[:, None], 1 / temperature), np.power(floor / peak, 1 / temperature)
    norm = prob.sum(axis=1) + others * floor
    prob, floor = prob / norm[:, None], floor / norm
    weight = prob.copy()
    # A stored class has its probability as a whole, and the floor is added to every class: so its weight is less by
    # that.
    weight[:, :kept] -= floor[:, None]
    return weight, floor.astype(np.float32)
