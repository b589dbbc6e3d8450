"""Write FKD's files from a label set, calibrated or not, for FKD's own training script.

Legend: N crops, k kept classes, K entries of a label in FKD's file, C classes.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.calibration import Calibration, calibrate, judge_crops, policy_table
from ferkd_data.errors import UsageError, check_at_least
from ferkd_data.format import out_folder
from ferkd_data.format.progress import OnProgress, TransferProgress
from ferkd_data.importers import fkd
from ferkd_data.label_set import open_labels
from ferkd_data.labels.rows import UNKNOWN_TARGET, ImageLabels
from ferkd_data.storage import write_atomically

ENTRIES = (5, 10)
"""Numbers K of FKD's script: its label types marginal_smoothing_k5 and marginal_smoothing_k10."""
MIN_CROPS = 4
"""Different crops of an image that FKD's script draws in its default settings."""


def export_fkd(
    labels: str | Path,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    min_crops: int = MIN_CROPS,
    on_progress: OnProgress | None = None,
) -> str:
    """Write FKD's files, OUT/KEY.tar, for its own training script; returns the label type to give it.

    With `calibration`, the files hold calibrated targets, so FKD's unmodified script trains as FerKD's author does:
    discarded crops are left out, softened ones hold the softened ground truth. An image that would keep fewer than
    `min_crops` crops has those it keeps repeated, because the script draws so many without repetition. What the script
    recovers from a file is the target that `CropLoader` makes of the crop, to float32.

    A run that was interrupted is continued; one that has ended is left as it is.

    Raises UsageError where `out` holds anything else, for a calibration that FKD's files cannot hold, and for crops
    with recorded augmentations or of several kinds.

    >>> fd.export_fkd(LABELS, "soft_labels/train")
    'marginal_renorm'
    """
    check_at_least(1, min_crops=min_crops)
    source = open_labels(labels)
    if source.manifest.augmentations:
        raise UsageError(
            f"{source.location}: its crops have recorded augmentations ({', '.join(source.manifest.augmentations)}); "
            "FKD's files have no place for them: its script would show the student other pixels than the teachers saw"
        )
    if len(source.crop_kinds) > 1:
        raise UsageError(
            f"{source.location}: has crops of the kinds {', '.join(kind.name for kind in source.crop_kinds)}; FKD's "
            "script would mix them at one size. Pull one kind and export that: ferkd-data pull "
            f"{source.location} NEW --crop-kind {source.crop_kinds[0].name}"
        )
    settings: out_folder.Settings = {"command": "export of FKD's files", "labels": source.identity}
    # The script knows two numbers of classes for the one, and takes any for the other.
    kind = f"marginal_smoothing_k{source.top_k}" if source.top_k in ENTRIES else "marginal_renorm"
    if calibration is not None:
        entries = _entries(calibration, source.top_k, source.num_classes)
        kind = f"marginal_smoothing_k{entries}"
        settings |= {"calibration": repr(asdict(calibration)), "min_crops": min_crops}
    out = out_folder.begin(out, settings)
    progress = TransferProgress(files_total=len(source), images=0, images_total=len(source))
    report = on_progress or (lambda progress: None)
    report(progress)
    for done, row in enumerate(source, start=1):
        path = fkd.file_of(out, row.key)
        # Whole, since it was renamed: a run that goes on skips it.
        if not path.exists():
            # Not synced: a million small files would wait for the disk one by one, and all can be made again.
            with write_atomically(path, sync=False) as aside:
                if calibration is None:
                    fkd.write_file(aside, row)
                else:
                    fkd.write_arrays(aside, *calibrated(row, calibration, source.num_classes, min_crops))
        progress = replace(progress, files=done, bytes=progress.bytes + path.stat().st_size, images=done)
        # A report for each of a million images would cost more than writing it.
        if done % 1000 == 0 or done == len(source):
            report(progress)
    return kind


def _entries(calibration: Calibration, top_k: int, num_classes: int) -> int:
    """Return K. Raises UsageError where FKD's script has no label type that holds the calibrated targets."""
    blends = any(policy.kind == "blend" for policy in policy_table(calibration))
    # A blend has the ground truth beside the top k; a softened target has it alone.
    needed = top_k + 1 if blends else top_k
    fitting = [entries for entries in ENTRIES if needed <= entries < num_classes]
    if not fitting:
        raise UsageError(
            f"FKD's files hold {' or '.join(map(str, ENTRIES))} classes of a crop, out of more in all; these targets "
            f"have {needed} of {num_classes}: use a label set of a smaller top-k, or export it without calibration"
        )
    return fitting[0]


def calibrated(
    row: ImageLabels, calibration: Calibration, num_classes: int, min_crops: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Return coords (N, 4), flips (N,), labels (N, 2, K) of the crops in use, at least `min_crops` of them."""
    judged = judge_crops(
        calibration,
        bucket=row.bucket,
        top1=row.class_index[:, 0],
        class_prob=row.class_prob,
        target=np.array(row.target),
        target_prob=row.target_prob,
    )
    use = judged.use
    # A crop that is thinned out is left out for good, by a draw that depends on the image and the crop alone.
    kept = rng.generator("fkd export", row.key).random(len(use)) < use
    # FKD's script needs crops of every image, also of one whose crops are all discarded.
    if not kept.any():
        kept = use > 0 if (use > 0).any() else np.ones(len(use), np.bool_)
    crops = np.flatnonzero(kept)
    if len(crops) < min_crops:
        # np.resize repeats from the start until there are enough.
        crops = np.resize(crops, min_crops)
    targets = calibrate(
        calibration,
        class_index=row.class_index[crops],
        class_prob=row.class_prob[crops],
        codes=judged.codes[crops],
        target=np.full(len(crops), row.target),
        num_classes=num_classes,
    )
    index, weight = targets.index.numpy(), targets.weight.numpy()
    if calibration.needs_target and row.target != UNKNOWN_TARGET:
        # FKD's script writes each entry to its class, so two of one class would not add up as ours do.
        index, weight = _joined(index, weight)
    entries = _entries(calibration, row.class_index.shape[1], num_classes)
    soft = _soft(index, weight, targets.floor.numpy(), entries)
    return fkd.coords_of(row)[crops], np.ascontiguousarray(row.flip[crops]), soft


def _joined(
    index: npt.NDArray[np.int64], weight: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Add the last entry, the ground truth, to the entry of the same class where there is one."""
    same = index[:, :-1] == index[:, -1:]
    first = weight[:, :-1] + same * weight[:, -1:]
    last = np.where(same.any(axis=1), 0, weight[:, -1])
    return index, np.concatenate([first, last[:, None]], axis=1).astype(np.float32)


def _soft(
    index: npt.NDArray[np.int64], weight: npt.NDArray[np.float32], floor: npt.NDArray[np.float32], entries: int
) -> npt.NDArray[np.float32]:
    """Return (N, 2, K): classes above the floor, filled up with classes at the floor, so that the sum gives the floor.

    FKD's script gives each of the other C - K classes (1 - sum) / (C - K), which is the floor again.
    """
    missing = max(entries - index.shape[1], 0)
    index = np.pad(index, ((0, 0), (0, missing)))
    weight = np.pad(weight, ((0, 0), (0, missing)))
    # Weights may be negative: rounding to float16 may lose more mass than the last class has.
    order = np.argsort(weight == 0, axis=1, kind="stable")[:, :entries]
    index, weight = np.take_along_axis(index, order, axis=1), np.take_along_axis(weight, order, axis=1)
    listed = weight != 0
    # Among 2K classes at least K are not listed, so there are enough to fill up with.
    others = np.arange(2 * entries)
    taken = ((index[:, :, None] == others) & listed[:, :, None]).any(axis=1)
    filler = np.argsort(taken, axis=1, kind="stable")[:, :entries]
    # The n-th place that is free takes the n-th class that is not listed, which has the floor alone.
    classes = np.where(listed, index, filler)
    return np.stack([classes.astype(np.float32), weight + floor[:, None]], axis=1)
