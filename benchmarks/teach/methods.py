"""The methods that are compared: each a few settings of the public API, so that nothing but the method differs.

All of them see the same crops of the same label set, in the same order, cut by the same loader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

import ferkd_data as fd
from ferkd_data.labels.buckets import BUCKETS

Batch = tuple[Tensor, fd.SoftTargets]
PAPER_QUANTILES = (0.01, 0.03, 0.9)
"""The shares of crops below LOW, MID and TOP that `build --thresholds quantile:` names as its example."""
KEPT = (1, 2, 5, 10, 50)
"""Numbers of classes that are compared, out of a label set with 50."""

TRUTH = fd.Calibration(
    extreme_hard="soften", moderate_hard="soften", hard_positive="soften", easy_positive="soften", epsilon=0.0
)
"""Every crop gets its ground truth."""
FKD = fd.Calibration.fkd()
FERKD = fd.Calibration.ferkd()
ALL_BLEND = fd.Calibration.blend()
"""Every soft label halved with the softened ground truth, and no crop discarded."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to make a training target out of a crop."""

    named: str
    """Name in the papers."""
    calibration: fd.Calibration
    selfmix: fd.SelfMix | None = None
    mix: fd.CutMix | fd.Mixup | None = None
    """Mixes different images of a batch."""
    online: bool = False
    """Whether the teacher runs in every step; there are no labels then."""
    mix_before_teacher: bool = False
    """With `online`: mix each batch's images, evenly at random, before the teacher labels them (FunMatch)."""
    quantiles: tuple[float, float, float] | None = None
    """Thresholds of the calibration as shares of the label set's own crops, by p_max."""
    keep: int | None = None
    """Keep this many of the stored classes. For calibrations without ground truth in their targets."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of `Setup` that differ from the comparison's."""

    def mixed(self, images: Tensor, targets: fd.SoftTargets, rng: np.random.Generator) -> Batch:
        if self.keep is not None:
            targets = keep_largest(targets, self.keep)
        return (images, targets) if self.mix is None else self.mix(images, targets, rng=rng)


def keep_largest(targets: fd.SoftTargets, count: int) -> fd.SoftTargets:
    """Make the targets that a label set of top-`count` has: FKD's smooth recovery of fewer classes."""
    kept = targets.weight[:, :count] + targets.floor[:, None]
    floor = (1 - kept.sum(dim=1)).clamp(min=0) / (targets.num_classes - count)
    return replace(targets, index=targets.index[:, :count], weight=kept - floor[:, None], floor=floor)


MAIN: dict[str, Method] = {
    "hard": Method(named="hard labels", calibration=TRUTH),
    "smoothing": Method(named="label smoothing 0.1", calibration=replace(TRUTH, epsilon=0.1)),
    "hard+mixup": Method(named="hard labels, Mixup", calibration=TRUTH, mix=fd.Mixup(prob=1.0, alpha=0.2)),
    "hard+cutmix": Method(named="hard labels, CutMix", calibration=TRUTH, mix=fd.CutMix(prob=0.5)),
    "fkd": Method(named="FKD: every soft label kept", calibration=FKD),
    "ferkd": Method(named="FerKD: discard, soften, keep", calibration=FERKD),
    "discard": Method(named="FerKD, discarding alone", calibration=replace(FKD, extreme_hard="discard")),
    "soften": Method(named="FerKD, softening alone", calibration=replace(FKD, moderate_hard="soften")),
    "ferkd+selfmix": Method(named="FerKD and SelfMix", calibration=FERKD, selfmix=fd.SelfMix(prob=0.5, mode="cutmix")),
    "fkd+mixup": Method(named="FKD and Mixup of strangers", calibration=FKD, mix=fd.Mixup(prob=1.0, alpha=0.2)),
    "fkd+cutmix": Method(named="FKD and CutMix of strangers", calibration=FKD, mix=fd.CutMix(prob=0.5)),
    # Not from a paper: the quick run of 2026-11-27 pointed at it, before the main comparison began.
    "all-blend": Method(named="every soft label blended with the ground truth", calibration=ALL_BLEND),
}


def _variants() -> dict[str, Method]:
    """One change at a time, from FerKD or FKD."""
    changes: dict[str, fd.Calibration] = {
        "ferkd/blend": replace(FERKD, moderate_hard="blend"),
        "ferkd/wrong-blend": replace(FERKD, confident_but_wrong="blend"),
        "ferkd/wrong-soften": replace(FERKD, confident_but_wrong="soften"),
        "ferkd/thin-easy": replace(FERKD, easy_positive="thin(0.5)"),
        "ferkd/epsilon-0": replace(FERKD, epsilon=0.0),
        "ferkd/epsilon-0.2": replace(FERKD, epsilon=0.2),
        "ferkd/mid-0.5": replace(FERKD, thresholds=fd.Thresholds(mid=0.5)),
        "ferkd/mid-0.7": replace(FERKD, thresholds=fd.Thresholds(mid=0.7)),
        "ferkd/on-target": replace(FERKD, thresholds=fd.Thresholds(confidence="target")),
        "fkd/temperature-0.5": replace(FKD, temperature=0.5),
        "fkd/temperature-2": replace(FKD, temperature=2.0),
        "fkd/renorm": replace(FKD, recovery="renorm"),
        "fkd/argmax": replace(FKD, recovery="hard"),
        "fkd/label-smoothing": replace(FKD, recovery="label_smoothing"),
    }
    return {name: Method(named=name, calibration=calibration) for name, calibration in changes.items()}


def _setups() -> dict[str, Method]:
    """FerKD and FKD with another loader or other classes."""
    few_crops = {f"ferkd/crops-{n}": {"crops": n} for n in (4, 8, 16, 50, 100)}
    at_once = {f"ferkd/m-{m}": {"crops_per_image": m} for m in (1, 2, 8)}
    # As many decoded photos as 400 steps of 128 crops with 4 crops of each.
    decodes = {f"ferkd/m-{m}-equal-decodes": {"crops_per_image": m, "steps": 100 * m} for m in (1, 2, 8)}
    together = {"ferkd/together": {"spread": False}, "ferkd/m-8-together": {"spread": False, "crops_per_image": 8}}
    changes: dict[str, dict[str, Any]] = {**at_once, **few_crops, **decodes, **together}
    same = {name: Method(named=name, calibration=FERKD, changes=change) for name, change in changes.items()}
    ten = {"photos_classes_only": True}
    first = {"crops": 16}
    return {
        **same,
        "blend+cutmix": Method(named="blend and CutMix", calibration=ALL_BLEND, mix=fd.CutMix(prob=0.5)),
        "blend+selfmix": Method(
            named="blend and SelfMix", calibration=ALL_BLEND, selfmix=fd.SelfMix(prob=0.5, mode="cutmix")
        ),
        "ferkd+cutmix": Method(named="FerKD and CutMix", calibration=FERKD, mix=fd.CutMix(prob=0.5)),
        "online": Method(named="vanilla KD: the teacher in every step, fresh crops", calibration=FKD, online=True),
        "funmatch": Method(
            named="FunMatch: mixed views, the teacher in every step",
            calibration=FKD,
            online=True,
            mix_before_teacher=True,
        ),
        **{f"fkd/k-{k}": Method(named=f"FKD, top-{k}", calibration=FKD, keep=k, changes=first) for k in KEPT},
        "ferkd/quantile": Method(named="FerKD, thresholds by quantile", calibration=FERKD, quantiles=PAPER_QUANTILES),
        "ferkd/selfmix-always": Method(named="SelfMix always", calibration=FERKD, selfmix=fd.SelfMix(prob=1.0)),
        "ferkd/selfmix-mixup": Method(
            named="SelfMix by Mixup", calibration=FERKD, selfmix=fd.SelfMix(prob=0.5, mode="mixup")
        ),
        "fkd/ten-classes": Method(named="FKD, mass on the ten classes", calibration=FKD, changes=ten),
        "ferkd/ten-classes": Method(named="FerKD, mass on the ten classes", calibration=FERKD, changes=ten),
        "all-blend/ten-classes": Method(named="blend, mass on the ten classes", calibration=ALL_BLEND, changes=ten),
    }


def _alone() -> dict[str, Method]:
    """One bucket alone: the photos that have crops in it and only those crops, by soft label and by ground truth."""
    methods = {}
    for code, bucket in enumerate(BUCKETS):
        others = {other: "discard" for other in BUCKETS if other != bucket}
        for target, policy in (("soft", "keep"), ("truth", "soften")):
            only = fd.Calibration(**{**others, bucket: policy}, epsilon=0.0)
            methods[f"{bucket}/{target}"] = Method(named=bucket, calibration=only, changes={"bucket": code})
    return methods


def _fine_tuning() -> dict[str, Method]:
    """A pretrained EfficientNet-Lite 0, fine-tuned: the paper's ViT-G14 in small."""
    small = {"student": "efficientnet-lite0", "size": 112, "batch_size": 32, "steps": 120, "lr": 3e-4, "bf16": False}
    tuned = ("hard", "fkd", "fkd+cutmix", "ferkd", "ferkd+selfmix", "all-blend")
    methods = {f"tune/{name}": replace(MAIN[name], changes=small) for name in tuned}
    ten = {**small, "photos_classes_only": True}
    return methods | {f"tune/{name}/ten-classes": replace(MAIN[name], changes=ten) for name in ("fkd", "ferkd")}


METHODS: dict[str, Method] = {**MAIN, **_variants(), **_setups(), **_alone(), **_fine_tuning()}
QUICK = ("hard", "fkd", "ferkd", "all-blend")
Schedule = Callable[[int], float]
