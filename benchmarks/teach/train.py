"""One run: a method, a seed and a schedule in, the student's numbers on the validation photos out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import METHODS
from students import small_resnet
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


def load_photos(folder: Path, classes: list[str], size: int) -> Photos:
    """All photos of the class folders, the shorter side resized to `size`, cut to the middle square."""
    from PIL import Image
    from torchvision.transforms.v2 import functional

    images, targets = [], []
    for path in sorted(folder.glob("*/*")):
        picture = functional.pil_to_tensor(Image.open(path).convert("RGB"))
        images.append(functional.center_crop(functional.resize(picture, [size], antialias=True), [size, size]))
        targets.append(classes.index(path.parent.name))
    return Photos(images=torch.stack(images), targets=torch.tensor(targets))


@torch.no_grad()
def evaluate(student: nn.Module, photos: Photos, device: str) -> dict[str, float]:
    """Top-1 in percent, negative log-likelihood in nats, and expected calibration error (15 bins) in percent."""
    student.eval()
    logits = torch.cat([student(fd.normalize(images.to(device))).float().cpu() for images in photos.images.split(256)])
    student.train()
    prob = logits.softmax(dim=1)
    confidence, predicted = prob.max(dim=1)
    right = (predicted == photos.targets).float()
    bins = (confidence * 15).long().clamp(max=14)
    count = torch.zeros(15).index_add_(0, bins, torch.ones_like(right))
    gap = torch.zeros(15).index_add_(0, bins, right - confidence)
    return {
        "top1": 100 * float(right.mean()),
        "nll": float(nn.functional.cross_entropy(logits, photos.targets)),
        "ece": 100 * float(gap.abs().sum() / count.sum()),
    }


def learning_rate(setup: Setup, step: int) -> float:
    rising = max(1, round(setup.warmup * setup.steps))
    if step < rising:
        return setup.lr * (step + 1) / rising
    return setup.lr / 2 * (1 + math.cos(math.pi * (step - rising) / max(1, setup.steps - rising)))


def run(setup: Setup, method: str, seed: int, photos: Photos) -> dict[str, Any]:
    """Train one student. The seed decides its weights, the order of the images, the crops drawn and the mixing."""
    torch.set_num_threads(setup.threads)
    how = METHODS[method]
    labels = fd.open_labels(setup.labels)
    selfmix = how.selfmix is not None
    loader = fd.CropLoader(
        labels,
        images=setup.train,
        batch_size=setup.batch_size,
        crops_per_image=setup.crops_per_image,
        size=setup.size,
        calibration=how.calibration,
        selfmix=how.selfmix,
        # SelfMix needs an image's crops side by side, so it cannot have what the others have.
        spread=setup.spread and not selfmix,
        seed=seed,
    )
    student = small_resnet(labels.num_classes, seed).to(setup.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=setup.lr, weight_decay=setup.weight_decay)
    rng = fd.generator("teach", seed)
    curve: list[dict[str, float]] = []
    marks = {round(setup.steps * (i + 1) / setup.evaluations) for i in range(setup.evaluations)}
    started, step, evaluating = time.perf_counter(), 0, 0.0
    while step < setup.steps:
        for images, targets in loader:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(setup, step)
            images, targets = how.mixed(images.to(setup.device), targets.to(setup.device), rng)
            with torch.autocast(setup.device, dtype=torch.bfloat16, enabled=setup.bf16):
                logits = student(fd.normalize(images))
            loss = fd.soft_cross_entropy(logits, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            if step in marks:
                before = time.perf_counter()
                curve.append({"step": step, "loss": loss.item(), **evaluate(student, photos, setup.device)})
                evaluating += time.perf_counter() - before
            if step == setup.steps:
                break
    return {
        "method": method,
        "seed": seed,
        "seconds": round(time.perf_counter() - started - evaluating, 1),
        **curve[-1],
        "curve": curve,
        "diverged": not np.isfinite(curve[-1]["loss"]),
    }
