"""Measure teachers' accuracy and calibration on labelled images, to find out whether each is wired right.

Legend: B images, C classes, S input size, T teachers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data import rng
from ferkd_data.errors import ImageError, SourceError, check_at_least
from ferkd_data.images import ImageRef, ImageSource, Reject, decode_rgb, open_source
from ferkd_data.labels.soft_labels import EnsembleMode, combine
from ferkd_data.labels.statistics import near_chance
from ferkd_data.normalization import IMAGENET_MEAN, IMAGENET_STD
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers
from ferkd_data.teachers.probe import (
    STEADY_IMAGES,
    centre_crop,
    check_answers,
    check_class_count,
    check_class_orders,
    check_steady,
    count_different,
    odd_answers,
)
from ferkd_data.words import percent

BATCH_IMAGES = 16
ECE_BINS = 15
NORMALISATIONS = {
    "ImageNet (mean 0.485,0.456,0.406 std 0.229,0.224,0.225)": (IMAGENET_MEAN, IMAGENET_STD),
    "mean=0.5 std=0.5": ((0.5,) * 3, (0.5,) * 3),
    "mean=127/255 std=128/255": ((127 / 255,) * 3, (128 / 255,) * 3),
    "mean=0 std=1": ((0.0,) * 3, (1.0,) * 3),
    "mean=0 std=1/255": ((0.0,) * 3, (1 / 255,) * 3),
}
"""Normalisations that people confuse, named by the options that set them: (mean, std)."""
REVERSED = "channels reversed (BGR)"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy and calibration of one teacher, or of the ensemble. top1, top5 and ece are in 0..1."""

    name: str
    """Spec of the teacher, or `ensemble (MODE)`."""
    images: int
    top1: float
    top5: float
    ece: float
    """Expected calibration error in 15 equal bins of confidence (Guo et al., ICML 2017)."""
    published_top1: float | None = None
    """Accuracy on ImageNet-1k that the library of the model states."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of `evaluate`."""

    scores: tuple[Score, ...]
    """One for each teacher; where there are several, the ensemble last."""
    warnings: tuple[str, ...]
    """Sentences about teachers that look wrongly wired."""
    rejects: int
    """Images that cannot be used."""
    unlabelled: int
    """Images without ground truth, which are not evaluated."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Files that are no images, by reason (see ferkd_data.images.refs)."""
    notes: tuple[str, ...] = ()
    """Sentences that tell a person how the source was read."""


def evaluate(
    source: str | Path,
    *,
    teachers: Sequence[str | TeacherSpec],
    classes: str | Path | None = None,
    ensemble: EnsembleMode = "mean",
    device: str = "cpu",
    precision: str = "auto",
    limit: int | None = 1000,
    diagnose: int = 200,
) -> Evaluation:
    """Measure top-1, top-5 and ECE on central crops of up to `limit` labelled images, spread evenly over the source.

    On about `diagnose` of them, spread likewise, each teacher also runs under other common normalisations; a warning
    says where one of those is clearly better.

    Raises SourceError where no image has a target, UsageError where targets and outputs cannot be the same classes and
    for a `limit` below 1, and TeacherError where a teacher gives no class logits (see ferkd_data.teachers.probe).
    """
    check_at_least(1, limit=limit)
    check_at_least(0, diagnose=diagnose)
    images = open_source(source, classes=None if classes is None else Path(classes))
    models = load_teachers(teachers, device=device, precision=precision)
    refs, rejects, unlabelled, max_target = _choose(images, limit)
    if not refs:
        why = "; ".join(("no image has a target, so nothing can be evaluated", *images.notes))
        raise SourceError(f"{source}: {why}")
    check_class_count(
        models[0].num_classes,
        class_names=images.class_names,
        max_target=max_target,
        classes_given=classes is not None,
    )
    # Before anything is run: wrong classes would look like a bad teacher.
    sorted_folders = images.class_folder_names if classes is None else None
    check_class_orders(models, class_names=images.class_names, sorted_folders=sorted_folders)
    gathered = _Gathered(len(models))
    seen = 0
    for pixels, targets, broken in _batches(images, refs):
        rejects += broken
        seen += len(pixels) + broken
        if pixels:
            # Whenever too few were diagnosed for what was seen: batches of all classes, not of the first ones.
            gathered.add(models, pixels, targets, device, diagnosing=gathered.diagnosed < diagnose * seen / len(refs))
    if not gathered.targets:
        raise SourceError(f"{source}: none of the {len(refs)} images could be decoded")
    target = torch.tensor(gathered.targets, device="cpu")
    logits = [torch.cat(parts) for parts in gathered.logits]
    scores = [
        _score(str(model.spec), (z / model.spec.temperature).softmax(dim=1), target, model.published_top1)
        for model, z in zip(models, logits, strict=True)
    ]
    warnings = _warnings(models, scores, gathered)
    for model, z in zip(models, logits, strict=True):
        warnings += [f"{model.spec}: {hint}" for hint in (*model.hints, *odd_answers(z, model))]
    if len(models) > 1:
        together = combine(
            logits,
            weights=[model.spec.weight for model in models],
            temperatures=[model.spec.temperature for model in models],
            mode=ensemble,
        )
        scores.append(_score(f"ensemble ({ensemble})", together, target, None))
    return Evaluation(
        scores=tuple(scores),
        warnings=tuple(warnings),
        rejects=rejects,
        unlabelled=unlabelled,
        left_out=dict(images.left_out.counts),
        notes=images.notes,
    )


class _Gathered:
    """Accumulator over the batches: logits of each teacher, and hits under other normalisations."""

    def __init__(self, num_teachers: int) -> None:
        self.logits: list[list[Tensor]] = [[] for _ in range(num_teachers)]
        self.targets: list[int] = []
        self.diagnosed = 0
        self.right = [0] * num_teachers
        self.right_under = [dict.fromkeys((*NORMALISATIONS, REVERSED), 0) for _ in range(num_teachers)]

    def add(
        self,
        models: Sequence[Teacher],
        pixels: list[npt.NDArray[np.uint8]],
        targets: list[int],
        device: str,
        *,
        diagnosing: bool,
    ) -> None:
        target = torch.tensor(targets, device="cpu")
        for i, model in enumerate(models):
            batch = torch.cat([centre_crop(image, model) for image in pixels]).to(device)
            logits = model.logits(batch).cpu()
            check_answers(logits, count_different(batch), model)
            if not self.targets:
                alone = torch.cat([model.logits(image[None]).cpu() for image in batch[:STEADY_IMAGES]])
                check_steady(alone, logits[:STEADY_IMAGES], model)
            self.logits[i].append(logits)
            if diagnosing:
                self.right[i] += _right(logits, target)
                for name, (mean, std) in NORMALISATIONS.items():
                    self.right_under[i][name] += _right(model.renormalised(mean, std).logits(batch), target)
                # Models ported from Caffe and OpenCV take BGR.
                self.right_under[i][REVERSED] += _right(model.logits(batch.flip(1)), target)
        self.targets.extend(targets)
        self.diagnosed += len(targets) if diagnosing else 0


def _choose(source: ImageSource, limit: int | None) -> tuple[list[ImageRef], int, int, int]:
    """Choose `limit` labelled images, or all where there are fewer: one at random of each of `limit` equal parts.

    Returns them with the number of rejects, the number of unlabelled images and the largest target. The listing is read
    twice, so that it need not be held in memory.
    """
    labelled = rejects = unlabelled = 0
    max_target = -1
    for item in source.list_images():
        if isinstance(item, Reject):
            rejects += 1
        elif item.target is None:
            unlabelled += 1
        else:
            labelled += 1
            max_target = max(max_target, item.target)
    known = (item for item in source.list_images() if isinstance(item, ImageRef) and item.target is not None)
    return list(_spread(known, labelled, limit)), rejects, unlabelled, max_target


def _spread(items: Iterator[ImageRef], length: int, limit: int | None) -> Iterator[ImageRef]:
    """Return one of each of `limit` equal parts of the items, the same every time."""
    if limit is None or limit >= length:
        return items
    # Not the first ones, which are of one class where class folders come one after the other. Nor every step-th: where
    # classes take turns, and their number and the step have a common divisor, these would be of a few classes.
    starts = [part * length // limit for part in range(limit + 1)]
    chosen = {start + rng.hash64("evaluate", start) % (stop - start) for start, stop in itertools.pairwise(starts)}
    return (item for number, item in enumerate(items) if number in chosen)


def _batches(
    source: ImageSource, refs: Sequence[ImageRef]
) -> Iterator[tuple[list[npt.NDArray[np.uint8]], list[int], int]]:
    for start in range(0, len(refs), BATCH_IMAGES):
        part = refs[start : start + BATCH_IMAGES]
        pixels, targets, broken = [], [], 0
        for ref, data in zip(part, source.read(part), strict=True):
            try:
                if isinstance(data, ImageError):
                    raise data
                pixels.append(decode_rgb(data))
                # None only to the type checker: `_choose` has left out images without a target.
                targets.append(-1 if ref.target is None else ref.target)
            except ImageError:
                broken += 1
        yield pixels, targets, broken


def _right(logits: Tensor, target: Tensor) -> int:
    return int((logits.cpu().argmax(dim=1) == target).sum())


def _score(name: str, prob_BC: Tensor, target: Tensor, published: float | None) -> Score:
    best = prob_BC.topk(min(5, prob_BC.shape[1]), dim=1).indices
    hits = best == target[:, None]
    return Score(
        name=name,
        images=len(target),
        top1=float(hits[:, 0].float().mean()),
        top5=float(hits.any(dim=1).float().mean()),
        ece=expected_calibration_error(prob_BC.max(dim=1).values.numpy(), hits[:, 0].numpy()),
        published_top1=published,
    )


def expected_calibration_error(confidences: npt.NDArray[np.float32], right: npt.NDArray[np.bool_]) -> float:
    """Compute the ECE of predictions (B,): |accuracy - confidence| of ECE_BINS equal bins, weighted by their size.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    # A confidence of 1 belongs to the last bin.
    which = np.minimum((confidences * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = [
        abs(float(right[which == b].mean()) - float(confidences[which == b].mean())) * (which == b).mean()
        for b in range(ECE_BINS)
        if (which == b).any()
    ]
    return float(sum(gaps))


def _warnings(models: Sequence[Teacher], scores: Sequence[Score], gathered: _Gathered) -> list[str]:
    found = []
    best = max(score.top1 for score in scores)
    for i, (model, score) in enumerate(zip(models, scores, strict=True)):
        # Three standard deviations of a share of `images` coin tosses, sqrt(p (1 - p) / n).
        # The variance is at least 0.01, so that 10 of 10 right do not count as certain.
        noise = 3 * math.sqrt(max(score.top1 * (1 - score.top1), 0.01) / score.images)
        # noise / 3 is one standard deviation.
        if score.top1 < near_chance(model.num_classes) + noise / 3:
            found.append(
                f"{score.name}: top-1 {percent(score.top1)} is near chance: wrong weights, class order or normalisation"
            )
        # 5 points of slack: the published figure is of the whole validation set.
        elif score.published_top1 is not None and score.top1 < score.published_top1 - 0.05 - noise:
            found.append(
                f"{score.name}: top-1 {percent(score.top1)} is far below the published "
                f"{percent(score.published_top1)}: check mean, std, size and the class order"
            )
        elif score.top1 < best - 0.15 - noise:
            found.append(f"{score.name}: top-1 {percent(score.top1)} is far below the best teacher's {percent(best)}")
        found.extend(_better_normalisation(score, gathered, i))
    return found


def _better_normalisation(score: Score, gathered: _Gathered, i: int) -> Iterator[str]:
    """Yield a warning where another normalisation has more hits, by two standard deviations of the difference."""
    if not gathered.diagnosed:
        return
    name, right = max(gathered.right_under[i].items(), key=lambda item: item[1])
    gain = right - gathered.right[i]
    # Most hits are common to both, so sqrt(right + 1) / 2 is taken for the standard deviation of the difference.
    if gain > 2 * math.sqrt(right + 1) / 2 and gain >= 3:
        yield (
            f"{score.name}: gets {gathered.right[i]} of {gathered.diagnosed} images right with the given settings, "
            f"but {right} with {name}: is its normalisation wrong?"
        )
