"""Calibration: turn a stored soft label into the training target, by the bucket of its crop (FerKD, ICCV 2023).

Legend: B crops, k stored classes, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ferkd_data.class_map import ClassMap
from ferkd_data.errors import UsageError
from ferkd_data.labels.buckets import BUCKETS, Thresholds, buckets_of
from ferkd_data.labels.rows import UNKNOWN_TARGET
from ferkd_data.targets import RECOVERIES, Floats, Recovery, SoftTargets, check_positive, recover

PolicyKind: TypeAlias = Literal["discard", "soften", "blend", "keep", "thin"]
THIN = re.compile(r"thin\((\d*\.?\d+)\)")


@dataclass(frozen=True)
class Policy:
    """A policy for the crops of a bucket."""

    kind: PolicyKind
    share: float = 1.0
    """For `thin`: the share of crops that stay in use."""

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read `discard`, `soften`, `blend`, `keep` or `thin(P)`. Raises UsageError for anything else."""
        if text in ("discard", "soften", "blend", "keep"):
            return cls(text)  # type: ignore[arg-type]
        # P above 0: thin(0) would be a second word for discard.
        match = THIN.fullmatch(text.replace(" ", ""))
        if match and 0 < float(match[1]) <= 1:
            return cls("thin", float(match[1]))
        raise UsageError(f"a bucket's policy is discard, soften, blend, keep or thin(P) with 0 < P <= 1, got {text!r}")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One policy for each difficulty bucket, and the settings of targets (FerKD: Shen, ICCV 2023).

    A policy is one of:

    - "keep": the soft label.
    - "soften": the smoothed ground truth: 1 - epsilon on its class, epsilon spread evenly over the others (with a class
      map to a single class, which has no others: 1 on it).
    - "blend": `blend_weight` of the soft label, and the rest of the smoothed ground truth.
    - "discard": the crop is not drawn.
    - "thin(P)": the soft label; a share P of these crops is in use, drawn anew for each pass over an image's crops.

    The default policies are our reading of FerKD, `Calibration.ferkd()`. Where the ground truth is unknown, soften and
    blend keep the soft label. Raises UsageError for an unknown policy or a value out of range.

    >>> mine = fd.Calibration(moderate_hard="blend", blend_weight=0.7, easy_positive="thin(0.5)")
    >>> mine.extreme_hard, mine.moderate_hard
    ('discard', 'blend')
    """

    extreme_hard: str = "discard"
    moderate_hard: str = "soften"
    hard_positive: str = "keep"
    easy_positive: str = "keep"
    confident_but_wrong: str | None = None
    """Policy for crops of the two positive buckets whose most probable class is not the ground truth; None: that of
    their bucket."""
    all_discarded: Literal["soften", "keep"] = "soften"
    """Policy for the crops of an image none of whose crops in a crop block is in use: they are drawn anyway."""
    thresholds: Thresholds | None = None
    """None: the buckets as stored or, where a class map merges or drops classes, as it assigns them. Otherwise buckets
    are derived anew from the stored (and mapped) probabilities, as they are read; no file changes."""
    epsilon: float = 0.1
    """Softened ground truth: 1 - epsilon on the class, epsilon spread evenly over the others."""
    blend_weight: float = 0.5
    """Share of the soft label in a blend with the softened ground truth."""
    recovery: Recovery = "smooth"
    """Rule by which classes that were not stored get their probability (see `targets.recover`)."""
    temperature: float = 1.0
    """Temperature of the recovered soft label."""

    def __post_init__(self) -> None:
        # Parsed once to refuse bad words here; the texts stay, as they are what a saved state compares.
        for name in BUCKETS:
            Policy.parse(getattr(self, name))
        if self.confident_but_wrong is not None:
            Policy.parse(self.confident_but_wrong)
        if self.all_discarded not in ("soften", "keep"):
            raise UsageError(f"all_discarded must be soften or keep, got {self.all_discarded!r}")
        for name in ("epsilon", "blend_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if self.recovery not in RECOVERIES:
            raise UsageError(f"recovery must be one of {', '.join(RECOVERIES)}, got {self.recovery!r}")
        check_positive("temperature", self.temperature)
        if self.thresholds is not None and not isinstance(self.thresholds, Thresholds):
            raise UsageError(
                f"thresholds must be Thresholds, got {self.thresholds!r}; shares of the crops become Thresholds in a "
                "build, and ferkd-data report shows what share of the crops lies below which value"
            )

    @classmethod
    def fkd(cls) -> Calibration:
        """FKD (ECCV 2022): every crop keeps its soft label."""
        return cls(extreme_hard="keep", moderate_hard="keep", all_discarded="keep")

    @classmethod
    def ferkd(cls) -> Calibration:
        """FerKD: extreme hard crops are discarded, moderate hard ones get the softened ground truth."""
        return cls()

    @classmethod
    def blend(cls) -> Calibration:
        """Halve every soft label with the softened ground truth and discard no crop: for teachers that are often wrong.

        The ground truth is then the largest class of a target unless the soft label puts more than 0.9 on another one.
        """
        return cls(extreme_hard="blend", moderate_hard="blend", hard_positive="blend", easy_positive="blend")

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policies by bucket code."""
        return tuple(Policy.parse(getattr(self, name)) for name in BUCKETS)

    @property
    def needs_target(self) -> bool:
        """Whether a target may contain the ground truth, which takes one sparse entry more."""
        texts = (*(getattr(self, name) for name in BUCKETS), self.confident_but_wrong)
        # Discarding alone may end in a softened target: for an image whose crops are all discarded.
        discards = any(text == "discard" for text in texts)
        return any(text in ("soften", "blend") for text in texts) or (discards and self.all_discarded == "soften")


CalibrationSetting: TypeAlias = "Calibration | str | Callable[[int], Calibration]"

PRESETS = {"fkd": Calibration.fkd, "ferkd": Calibration.ferkd, "blend": Calibration.blend}
"""Calibrations by the names that users may give."""


def calibration_at(setting: CalibrationSetting, epoch: int) -> Calibration:
    """Return the calibration of an epoch, from a Calibration, a preset's name, or a function of the epoch.

    Raises UsageError for an unknown name, and where the function returns something else.
    """
    if isinstance(setting, Calibration):
        return setting
    if callable(setting):
        given: object = setting(epoch)
        if not isinstance(given, Calibration):
            raise UsageError(f"calibration must return a Calibration for every epoch; for {epoch} it gave {given!r}")
        return given
    if setting not in PRESETS:
        raise UsageError(
            f"calibration must be a Calibration, a function of the epoch, fkd, ferkd or blend; got {setting!r}"
        )
    return PRESETS[setting]()


def crop_buckets(
    calibration: Calibration,
    bucket: npt.NDArray[np.uint8],
    class_prob: npt.NDArray[np.float16],
    target_prob: npt.NDArray[np.float16],
) -> npt.NDArray[np.uint8]:
    """Return buckets (...,) as stored, or by the calibration's own thresholds; class_prob is (..., k)."""
    if calibration.thresholds is None:
        return bucket
    return buckets_of(class_prob, target_prob, calibration.thresholds)


def crop_policies(
    calibration: Calibration,
    bucket: npt.NDArray[np.uint8],
    top1: npt.NDArray[Any],
    target: npt.NDArray[np.integer[Any]],
) -> npt.NDArray[np.uint8]:
    """Return each crop's policy: codes (...,) into `policy_table`. `target` broadcasts against `bucket` and `top1`."""
    if calibration.confident_but_wrong is None:
        return bucket
    # Buckets 2 and 3 are the positive ones.
    wrong = (bucket >= 2) & (target != UNKNOWN_TARGET) & (top1.astype(np.int64) != target)
    # The code after the last bucket's, as in `policy_table`.
    return np.where(wrong, len(BUCKETS), bucket).astype(np.uint8)


def policy_table(calibration: Calibration) -> tuple[Policy, ...]:
    """Policies by code: the four buckets, then confident but wrong."""
    extra = calibration.confident_but_wrong
    return (*calibration.policies, *((Policy.parse(extra),) if extra is not None else ()))


def use_probability(calibration: Calibration, codes: npt.NDArray[np.uint8]) -> Floats:
    """Return each crop's probability of being in use: 0 where discarded, P where thinned out, else 1."""
    in_use = [0.0 if a.kind == "discard" else a.share for a in policy_table(calibration)]
    return np.array(in_use, np.float32)[codes]


class Judged(NamedTuple):
    """A calibration's verdict on stored crops, each field of the same shape (..., N)."""

    bucket: npt.NDArray[np.uint8]
    """Difficulty codes (see `buckets.BUCKETS`)."""
    codes: npt.NDArray[np.uint8]
    """Policy codes (see `policy_table`)."""
    use: Floats
    """Probability of being in use."""


def judge_crops(
    calibration: Calibration,
    *,
    bucket: npt.NDArray[np.uint8],
    top1: npt.NDArray[Any],
    class_prob: npt.NDArray[np.float16],
    target: npt.NDArray[np.integer[Any]],
    target_prob: npt.NDArray[np.float16],
) -> Judged:
    """Judge stored crops: their bucket, policy and probability of being in use, before any is drawn.

    `bucket`, `top1` and `target_prob` are (..., N), `class_prob` (..., N, k); `target` broadcasts against them.
    """
    bucket = crop_buckets(calibration, bucket, class_prob, target_prob)
    codes = crop_policies(calibration, bucket, top1, target)
    return Judged(bucket, codes, use_probability(calibration, codes))


def calibrate(
    calibration: Calibration,
    *,
    class_index: npt.NDArray[Any],
    class_prob: npt.NDArray[np.float16],
    codes: npt.NDArray[np.uint8],
    target: npt.NDArray[np.integer[Any]],
    num_classes: int,
    class_map: ClassMap | None = None,
) -> SoftTargets:
    """Make targets from class_index and class_prob (B, k), policy codes (B,) and target (B,), -1 where unknown.

    class_index and num_classes are the teacher's, as stored. With a class map, soft labels are recovered over
    the teacher's classes and then mapped; `target` and the targets returned are of the new classes.

    A crop whose policy is `discard` was drawn because its image has none in use in this block: `all_discarded` decides.
    Where the ground truth is unknown, `soften` and `blend` keep the soft label.
    """
    # These look at the first class alone, which the class map may have dropped.
    if class_map is not None and calibration.recovery in ("hard", "label_smoothing"):
        class_index, class_prob = class_map.first_kept(class_index, class_prob)
    weight, floor = recover(
        class_prob, num_classes=num_classes, mode=calibration.recovery, temperature=calibration.temperature
    )
    index = class_index.astype(np.int64)
    if class_map is not None:
        # After recovery: mapped to k columns first, the missing mass would be spread over another number of classes.
        index, weight, floor = class_map.distributions(index, weight, floor)
        num_classes = class_map.num_classes
    # Decided by the calibration and not by the batch, so that K is the same for all batches and they can be joined.
    if calibration.needs_target:
        share = _soft_share(calibration)[codes]
        # The whole soft label: there is no ground truth to soften.
        share = np.where(target == UNKNOWN_TARGET, np.float32(1), share)
        # The softened ground truth as sparse target: floor `spread`, and on its class what is missing to 1 - epsilon.
        # A single class, as a class map may leave it, has no others that could take epsilon: it keeps all.
        epsilon = calibration.epsilon if num_classes > 1 else 0.0
        spread = np.float32(epsilon / max(num_classes - 1, 1))
        truth = (1 - share) * (np.float32(1 - epsilon) - spread)
        # An unknown target becomes class 0 with weight 0, as padding.
        index = np.concatenate([index, np.maximum(target, 0)[:, None].astype(np.int64)], axis=1)
        weight = np.concatenate([weight * share[:, None], truth[:, None]], axis=1)
        floor = floor * share + (1 - share) * spread
    return SoftTargets(
        index=torch.from_numpy(index),
        weight=torch.from_numpy(weight.astype(np.float32, copy=False)),
        floor=torch.from_numpy(floor.astype(np.float32, copy=False)),
        num_classes=num_classes,
    )


def _soft_share(calibration: Calibration) -> Floats:
    """Return the share of the soft label in a target, by policy code."""
    fallback = 0.0 if calibration.all_discarded == "soften" else 1.0
    shares = {"discard": fallback, "soften": 0.0, "blend": calibration.blend_weight, "keep": 1.0, "thin": 1.0}
    return np.array([shares[policy.kind] for policy in policy_table(calibration)], np.float32)
