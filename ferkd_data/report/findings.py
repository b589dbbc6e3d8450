"""Turn the numbers of a label set into sentences, the most important first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ferkd_data.label_set import LabelSet
from ferkd_data.labels.statistics import P_MAX_UNITS, TEACHER_BINS, near_chance
from ferkd_data.report.charts import Reliability
from ferkd_data.report.collect import Collected
from ferkd_data.report.sketch import FLOAT16_VALUES, Counts, Sketch, counts_between
from ferkd_data.report.thresholds import suggest
from ferkd_data.words import percent

Level = Literal["warning", "note", "good"]
ECE_APART, ECE_RATIO = 0.05, 2.0
"""Least difference and least ratio by which a teacher's calibration error stands out from the others'."""
SMALL_PIXELS = 64


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence about a label set."""

    level: Level
    text: str
    section: str
    """Section of the report that shows the details."""


def ensemble_reliability(sketch: Sketch, name: str) -> Reliability:
    """Compute the calibration of the stored labels, on crops with a ground truth, in 15 equal bins of p_max."""
    _, known, right = sketch.confidence["max"]
    return reliability(known, right, FLOAT16_VALUES, name)


def reliability(known: Counts, right: Counts, values: npt.NDArray[Any], name: str) -> Reliability:
    """Compute a calibration curve from counts of crops, and of those named right, by rising `values` of p_max."""
    edges = np.linspace(0, 1, TEACHER_BINS + 1)
    # The bins in which a build counts each teacher, so that curves of teachers and ensemble can be compared.
    bins = np.minimum(np.searchsorted(edges, values, side="right") - 1, TEACHER_BINS - 1)
    crops = np.bincount(bins, known, minlength=TEACHER_BINS)
    hits = np.bincount(bins, right, minlength=TEACHER_BINS)
    mass = np.bincount(bins, known * values, minlength=TEACHER_BINS)
    return _curve(name, crops, hits, mass)


def _curve(name: str, crops: npt.NDArray[Any], hits: npt.NDArray[Any], mass: npt.NDArray[Any]) -> Reliability:
    """Compute a curve from the crops, the crops named right and the sum of p_max in each bin."""
    # ECE = sum over bins of n_b / n * |p_b - a_b| = sum |mass_b - hits_b| / n.
    some = np.maximum(crops, 1)
    total = max(float(crops.sum()), 1.0)
    return Reliability(
        name=name,
        crops=tuple(crops.astype(int).tolist()),
        mean_p_max=tuple((mass / some).tolist()),
        accuracy=tuple((hits / some).tolist()),
        ece=float(np.abs(mass - hits).sum() / total),
        top1=float(hits.sum() / total),
    )


def teacher_reliability(labels: LabelSet) -> list[Reliability]:
    """Compute each teacher's calibration; empty for one teacher, and where the build did not count it."""
    counted, teachers = labels.statistics, labels.manifest.teachers
    if len(teachers) < 2 or not counted.teacher_bin_crops:
        return []
    curves = []
    for i, teacher in enumerate(teachers):
        crops, right = np.array(counted.teacher_bin_crops[i]), np.array(counted.teacher_bin_right[i])
        curves.append(_curve(teacher.name, crops, right, np.array(counted.teacher_bin_p_max[i]) / P_MAX_UNITS))
    return curves


def findings(labels: LabelSet, found: Collected, *, provisional: bool = False) -> list[Finding]:
    """List the findings: warnings, then good news such as the teachers' accuracy, then notes.

    `provisional` says that the thresholds are not those of the finished label set.
    """
    if not found.sketch.crops:
        return [Finding(level="note", text="No image has been labelled yet.", section="glance")]
    listed = [
        *_accuracy(labels, found),
        *(_provisional(labels, found) if provisional else _buckets(labels, found)),
        *_calibration(found),
        *_teachers(labels),
        *_calibrated_apart(teacher_reliability(labels)),
        *_suspects(found, guessing=_guessing(labels, found.sketch)),
        *_quality(labels, found),
        *_top_k(labels, found),
    ]
    order = ("warning", "good", "note")
    # Stable: within a level, findings keep the order above.
    return sorted(listed, key=lambda finding: order.index(finding.level))


def _guessing(labels: LabelSet, sketch: Sketch) -> bool:
    """Whether the teachers name the ground truth no more often than a guess would."""
    _, known, right = sketch.confidence["max"]
    return bool(right.sum() < max(near_chance(labels.num_classes), 0.05) * known.sum())


def _accuracy(labels: LabelSet, found: Collected) -> list[Finding]:
    """Say how often the teachers name the ground truth, and warn near chance."""
    _, known, right = found.sketch.confidence["max"]
    if not known.sum():
        text = "No ground truth is known, so nothing here says whether the teachers are right."
        return [Finding(level="note", text=text, section="teachers")]
    # Rules of thumb: crops of background keep even a good teacher well below its accuracy on whole images, so half of
    # the crops is good, and three quarters where half is what guessing one of two classes gives.
    share, chance = right.sum() / known.sum(), 1 / labels.num_classes
    enough, words = (0.75, "three quarters") if labels.num_classes == 2 else (0.5, "half")
    text = f"The teachers name the ground truth on {percent(share)} of the crops"
    if _guessing(labels, found.sketch):
        text += (
            f", near chance ({percent(chance)}). Are the class numbers those of the teachers, and is their "
            "normalisation right? ferkd-data evaluate checks it."
        )
        return [Finding(level="warning", text=text, section="teachers")]
    if share >= enough:
        return [
            Finding(
                level="good", text=text + ", many of which show background: they are wired right.", section="teachers"
            )
        ]
    text += f", less than {words}. Compare with ferkd-data evaluate on whole images before you train."
    return [Finding(level="note", text=text, section="teachers")]


def _buckets(labels: LabelSet, found: Collected) -> list[Finding]:
    """Say what the stored thresholds do, which ones are suggested, and where a bucket is too large or empty."""
    sketch, thresholds = found.sketch, labels.manifest.thresholds
    hard, moderate, _, easy = (sketch.buckets[0] / sketch.crops).tolist()
    known = sketch.confidence["max"][1].any()
    listed = [
        Finding(
            level="note",
            text=f"{percent(hard)} of the crops are below {thresholds.low:g}: ferkd discards them. "
            f"{percent(moderate)} lie between {thresholds.low:g} and {thresholds.mid:g}: they "
            + (
                "get the softened ground truth." if known else "keep their soft labels, since no ground truth is known."
            ),
            section="thresholds",
        ),
        Finding(level="note", text=suggest(sketch).summary, section="thresholds"),
    ]
    if hard > 0.25:
        text = f"{percent(hard)} of the crops would be discarded: the thresholds are too high for these teachers."
        listed.append(Finding(level="warning", text=text, section="thresholds"))
    if easy < 0.005:
        text = (
            f"Hardly any crop ({percent(easy)}) passes {thresholds.top:g}: the bucket easy_positive is empty for these "
            "teachers. Lower the third threshold if you want to thin out easy crops."
        )
        listed.append(Finding(level="note", text=text, section="thresholds"))
    elif easy > 0.5:
        text = f"{percent(easy)} of the crops are easy (from {thresholds.top:g}): many teach a student little."
        listed.append(Finding(level="note", text=text, section="thresholds"))
    none_in_use = int(sketch.in_use[0])
    if none_in_use:
        target = "softened ground truth" if known else "soft label"
        text = (
            f"{_images(none_in_use)} no crop in use: all are extreme hard. ferkd discards crops only where "
            f"others are left, so it draws from these all the same, with the {target}."
        )
        listed.append(Finding(level="note", text=text, section="quality"))
    return listed


def _provisional(labels: LabelSet, found: Collected) -> list[Finding]:
    """Say that the buckets are not known yet: the thresholds that stand in put nearly all crops into one."""
    thresholds = labels.manifest.thresholds
    text = (
        "The thresholds were asked for as shares of all crops, which follow at the end of the build. Until then "
        f"{thresholds.low:g}, {thresholds.mid:g} and {thresholds.top:g} stand in: the buckets, and which crops count "
        "as confident, are not those of the finished label set."
    )
    warning = Finding(level="warning", text=text, section="thresholds")
    return [warning, Finding(level="note", text=suggest(found.sketch).summary, section="thresholds")]


def _calibration(found: Collected) -> list[Finding]:
    """Say where the labels are less or more sure than right, by 5 % or more, and which temperature mends it."""
    curve = ensemble_reliability(found.sketch, "ensemble")
    total = sum(curve.crops)
    if not total:
        return []
    mean = sum(crops * p for crops, p in zip(curve.crops, curve.mean_p_max, strict=True)) / total
    # Positive where the teachers are right more often than they say.
    gap = curve.top1 - mean
    if abs(gap) < 0.05:
        return []
    kind = "under-confident" if gap > 0 else "over-confident"
    text = (
        f"The teachers are {kind}: they are right on {percent(curve.top1)} of the crops and say {percent(mean)} "
        f"(calibration error {curve.ece:.3f})."
    )
    fitted = found.temperatures.fitted()
    if fitted is not None:
        text += (
            f" In training, temperature={fitted:.2g} makes the stored labels as sure on average as they are right: "
            f"fd.Calibration(temperature={fitted:.2g}). It changes targets, not buckets."
        )
    return [Finding(level="note", text=text, section="teachers")]


def _teachers(labels: LabelSet) -> list[Finding]:
    """Warn of a teacher that disagrees with the others, or is right less than half as often as the best."""
    counted, teachers = labels.statistics, labels.manifest.teachers
    listed = []
    if len(teachers) > 1 and counted.teacher_agreement and counted.crops:
        agreement = np.array(counted.teacher_agreement) / counted.crops
        # Mean agreement with the others; each teacher agrees with itself on all crops, which is the 1.
        others = (agreement.sum(axis=1) - 1) / (len(teachers) - 1)
        worst = int(others.argmin())
        rest = np.delete(others, worst)
        apart = 1 - others[worst]
        # Far from the others, and clearly farther than they are from each other: otherwise all teachers merely differ.
        if apart > 0.15 and apart > 1.5 * (1 - rest.mean()):
            text = f"{teachers[worst].name} disagrees with the other teachers on {percent(apart)} of the crops"
            listed.append(Finding(level="warning", text=f"{text}: wired right?", section="teachers"))
    if counted.teacher_top1_matches_target and counted.crops_with_target:
        right = np.array(counted.teacher_top1_matches_target) / counted.crops_with_target
        for teacher, share in zip(teachers, right.tolist(), strict=True):
            if share < 0.5 * right.max():
                text = (
                    f"{teacher.name} is right on {percent(share)} of the crops, the best one on {percent(right.max())}."
                )
                listed.append(Finding(level="warning", text=text, section="teachers"))
    return listed


def _calibrated_apart(curves: list[Reliability]) -> list[Finding]:
    """Find each teacher whose calibration error is far from that of every other."""
    listed = []
    for i, curve in enumerate(curves):
        others = sorted(other.ece for j, other in enumerate(curves) if j != i)
        # The nearest, since a teacher stands out only where it is far from every other.
        nearest = min(others, key=lambda ece: abs(ece - curve.ece))
        low, high = sorted((curve.ece, nearest))
        if sum(curve.crops) and high - low > ECE_APART and high > ECE_RATIO * low:
            rest = f"{others[0]:.3f}" + (f" to {others[-1]:.3f}" if len(others) > 1 else "")
            text = (
                f"{curve.name} has a calibration error of {curve.ece:.3f}, the other{'s' * (len(others) > 1)} {rest}: "
                "their probabilities are not on the same scale, and the surest teacher weighs most in the mean. The "
                "label set does not hold what a temperature for each teacher is fitted on. Try some with ferkd-data "
                "evaluate (on whole images), each as ?temperature=T behind the teacher, keep the one of the least "
                "error, and build again."
            )
            listed.append(Finding(level="note", text=text, section="teachers"))
        if len(curves) == 2:
            break  # of two teachers, both stand out
    return listed


def _suspects(found: Collected, *, guessing: bool) -> list[Finding]:
    count, sure = found.suspects.found, found.suspects.sure
    if not count:
        return []
    if guessing:
        text = (
            f"{_images(count)} a ground truth in doubt by the rule below, which says nothing where the teachers name "
            "the ground truth near chance."
        )
        return [Finding(level="note", text=text, section="suspects")]
    first = f" The first to look at is {found.suspects.worst()[0].image.key}."
    listed = []
    if sure:
        text = (
            f"{_images(sure)} a ground truth that is surely wrong: nearly all crops agree on another class, with a "
            f"high p_max, and give the label almost no probability.{first}"
        )
        listed.append(Finding(level="warning", text=text, section="suspects"))
    if count > sure:
        text = (
            f"{_images(count - sure)} a ground truth in doubt: more than half of the crops confidently name "
            f"another class, often a related one, or the image shows several things.{'' if sure else first}"
        )
        listed.append(Finding(level="note", text=text, section="suspects"))
    return listed


def _quality(labels: LabelSet, found: Collected) -> list[Finding]:
    listed = []
    rejected = labels.manifest.rejects.rows
    if rejected:
        main = ", ".join(f"{count:,} {reason}" for reason, count in found.rejects.most_common(3))
        text = f"{rejected:,} of {labels.manifest.source.images_seen:,} images could not be used" + (
            f": {main}." if main else "."
        )
        listed.append(Finding(level="note", text=text, section="quality"))
    if found.duplicate_groups:
        text, conflicts = duplicates_said(found), found.duplicate_conflicts
        which = "" if conflicts == found.duplicate_groups else f"{_about(conflicts, found)} of them "
        text += f", {which}under different ground truths." if conflicts else "."
        listed.append(Finding(level="warning" if conflicts else "note", text=text, section="quality"))
    small = int(found.sketch.sides[:2].sum())
    if small:
        text = f"{_images(small)} a shorter side below {SMALL_PIXELS} pixels."
        listed.append(Finding(level="note", text=text, section="quality"))
    return listed


def _top_k(labels: LabelSet, found: Collected) -> list[Finding]:
    kept = float(found.sketch.mass_by_rank.sum() / found.sketch.crops)
    text = f"The stored top-{labels.top_k} hold {percent(kept)} of the probability."
    if kept < 0.5:
        text += " More than half is spread evenly over the other classes in training; a larger top_k keeps more."
        return [Finding(level="warning", text=text, section="confidence")]
    return [Finding(level="good" if kept > 0.8 else "note", text=text, section="confidence")]


def duplicates_said(found: Collected) -> str:
    """Say how many images occur more than once."""
    count = found.duplicate_groups
    if not count:
        share = found.duplicates_compared
        return "None" if share == 1 else f"None among the {percent(share)} of the images that were compared"
    return f"{_about(count, found)} image{'s come' if count != 1 else ' comes'} more than once"


def _images(count: int) -> str:
    return f"{count:,} images have" if count != 1 else "1 image has"


def _about(count: float, found: Collected) -> str:
    # An estimate is a whole number too: it is scaled up by a power of 2.
    return f"{count:,.0f}" if found.duplicates_compared == 1 else f"about {count:,.0f}"


def ranges_of(counts: Counts, edges: tuple[float, ...]) -> list[int]:
    """Count the crops in each range between `edges`; the last range includes its upper edge."""
    return [int(count) for count in counts_between(counts, np.array(edges))]
