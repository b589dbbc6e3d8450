"""One run: a method, a seed and a schedule in, the student's numbers on the validation photos out."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import online
import torch
from methods import METHODS, Method
from students import pretrained, small_resnet
from torch import Tensor, nn

import ferkd_data as fd


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all methods of a comparison share."""

    labels: str
    train: str
    """The photos that `labels` was built from."""
    val: str
    """Class folders, named as in the label set."""
    val_labels: str = ""
    """A label set of one crop, the whole photo, for photos of `val`. The agreement is measured with it."""
    crops: int | None = None
    """Use only the first crops of each photo; None: all."""
    teacher: str = ""
    """An ONNX file: the teacher of the method that asks it in every step."""
    bucket: int | None = None
    """Use only photos that have crops in the bucket of this code."""
    student: str = "small_resnet"
    """small_resnet, from scratch; or efficientnet-lite0, pretrained."""
    photos_classes_only: bool = False
    """Restrict soft labels to the classes that photos have, and rescale them to 1."""
    steps: int = 1500
    batch_size: int = 128
    crops_per_image: int = 4
    spread: bool = True
    size: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    """Share of the steps with a rising learning rate; a cosine down to 0 follows."""
    evaluations: int = 6
    """Points of the curve."""
    device: str = "cpu"
    threads: int = 1
    bf16: bool = True
    """Forward passes under autocast to bfloat16; weights, targets, loss and optimiser stay in float32."""


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Validation photos in memory: uint8 (N, 3, S, S), and their classes int64 (N,)."""

    images: Tensor
    targets: Tensor
    teacher: Tensor | None = None
    """The teachers' most probable class for each photo, int64 (N,); -1 where they were not asked."""


def load_photos(folder: Path, classes: tuple[str, ...], size: int, labels: str = "") -> Photos:
    """Load all photos of the class folders: the shorter side resized to `size`, cut to the middle square."""
    from PIL import Image
    from torchvision.transforms.v2 import functional

    images, targets, keys = [], [], []
    for path in sorted(folder.glob("*/*")):
        picture = functional.pil_to_tensor(Image.open(path).convert("RGB"))
        images.append(functional.center_crop(functional.resize(picture, [size], antialias=True), [size, size]))
        targets.append(classes.index(path.parent.name))
        keys.append(path.relative_to(folder).with_suffix("").as_posix())
    teacher = None
    if labels:
        told = {image.key: int(image.class_index[0, 0]) for image in fd.open_labels(labels)}
        teacher = torch.tensor([told.get(key, -1) for key in keys])
    return Photos(images=torch.stack(images), targets=torch.tensor(targets), teacher=teacher)


@torch.no_grad()
def evaluate(student: nn.Module, photos: Photos, device: str) -> dict[str, float]:
    """Measure top-1 in percent, negative log-likelihood in nats and expected calibration error (15 bins) in percent.

    Where the teachers' classes are known, also the agreement: how often, in percent, student and teachers name the
    same class.
    """
    student.eval()
    logits = torch.cat([student(fd.normalize(images.to(device))).float().cpu() for images in photos.images.split(256)])
    student.train()
    prob = logits.softmax(dim=1)
    confidence, predicted = prob.max(dim=1)
    right = (predicted == photos.targets).float()
    bins = (confidence * 15).long().clamp(max=14)
    count = torch.zeros(15).index_add_(0, bins, torch.ones_like(right))
    gap = torch.zeros(15).index_add_(0, bins, right - confidence)
    numbers = {
        "top1": 100 * float(right.mean()),
        "nll": float(nn.functional.cross_entropy(logits, photos.targets)),
        "ece": 100 * float(gap.abs().sum() / count.sum()),
    }
    if photos.teacher is not None:
        asked = photos.teacher >= 0
        numbers["agreement"] = 100 * float((predicted == photos.teacher)[asked].float().mean())
    return numbers


def learning_rate(setup: Setup, step: int) -> float:
    """Compute the rate of a step: a linear warm-up, then a cosine to 0."""
    rising = max(1, round(setup.warmup * setup.steps))
    if step < rising:
        return setup.lr * (step + 1) / rising
    return setup.lr / 2 * (1 + math.cos(math.pi * (step - rising) / max(1, setup.steps - rising)))


def open_setup(setup: Setup) -> fd.LabelSet:
    """Open the label set of a run, or the view of it that the setup asks for."""
    labels = fd.open_labels(setup.labels, crops=setup.crops)
    if setup.bucket is not None:
        labels = labels.select(where=lambda shard: (shard.bucket == setup.bucket).any(axis=1))
    if setup.photos_classes_only:
        present = sorted({image.target for image in labels if image.target is not None})
        labels = labels.map_classes({c: c for c in present}, num_classes=labels.num_classes)
    return labels


@dataclass(kw_only=True)
class Clock:
    """Wall and CPU seconds of the training, without its evaluations."""

    wall: float = 0.0
    cpu: float = 0.0

    def go(self) -> None:
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def stop(self) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def calibration(how: Method, labels: fd.LabelSet) -> fd.Calibration:
    """Return the method's calibration, with thresholds out of the labels where it has quantiles."""
    if how.quantiles is None:
        return how.calibration
    p_max = np.concatenate([shard.class_prob[:, :, 0].ravel() for shard in labels.shards()]).astype(np.float64)
    low, mid, top = np.quantile(p_max, how.quantiles).tolist()
    return replace(how.calibration, thresholds=fd.Thresholds(low=low, mid=mid, top=top))


def batches(
    setup: Setup, how: Method, labels: fd.LabelSet, seed: int
) -> Iterator[tuple[Tensor, fd.SoftTargets | Tensor]]:
    """Yield batches for ever, mixed as the method says."""
    if how.online:
        teacher = online.Teacher(setup.teacher, setup.threads)
        size = {"batch_size": setup.batch_size, "size": setup.size, "steps": setup.steps}
        yield from online.batches(setup.train, teacher, **size, seed=seed, mix=how.mix_before_teacher)
        return
    loader = fd.CropLoader(
        labels,
        images=setup.train,
        batch_size=setup.batch_size,
        crops_per_image=setup.crops_per_image,
        size=setup.size,
        calibration=calibration(how, labels),
        selfmix=how.selfmix,
        # SelfMix needs an image's crops side by side, and one crop of an image has nothing to be spread.
        spread=setup.spread and how.selfmix is None and setup.crops_per_image > 1,
        seed=seed,
    )
    rng = fd.generator("teach", seed)
    while True:
        for images, targets in loader:
            yield how.mixed(images.to(setup.device), targets.to(setup.device), rng)


def run(setup: Setup, method: str, seed: int, photos: Photos) -> dict[str, Any]:
    """Train one student. The seed decides its weights, the order of the images, the crops drawn and the mixing."""
    torch.set_num_threads(setup.threads)
    how = METHODS[method]
    setup = replace(setup, **how.changes)
    labels = open_setup(setup)
    if setup.student == "efficientnet-lite0":
        student = pretrained(seed).to(setup.device)
    else:
        student = small_resnet(labels.num_classes, seed).to(setup.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=setup.lr, weight_decay=setup.weight_decay)
    curve: list[dict[str, float]] = []
    if setup.student != "small_resnet":
        curve.append({"step": 0, "cpu_seconds": 0.0, **evaluate(student, photos, setup.device)})
    marks = {round(setup.steps * (i + 1) / setup.evaluations) for i in range(setup.evaluations)}
    clock = Clock()
    clock.go()
    for step, (images, targets) in enumerate(itertools.islice(batches(setup, how, labels, seed), setup.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(setup, step)
        with torch.autocast(setup.device, dtype=torch.bfloat16, enabled=setup.bf16):
            logits = student(fd.normalize(images))
        loss = fd.soft_cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step + 1 in marks:
            clock.stop()
            point = {"step": step + 1, "cpu_seconds": round(clock.cpu, 1), "loss": loss.item()}
            curve.append({**point, **evaluate(student, photos, setup.device)})
            clock.go()
    clock.stop()
    return {
        "method": method,
        "seed": seed,
        "seconds": round(clock.wall, 1),
        **curve[-1],
        "curve": curve,
        "diverged": not np.isfinite(curve[-1]["loss"]),
    }
