"""Vanilla knowledge distillation, to compare with: the teacher runs in every step, on fresh crops.

The crops are drawn as a label set's are, from another seed, and none comes twice. An image comes once in every pass, so
a batch has as many images as crops, as with `spread=True`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

import ferkd_data as fd

FRESH = 1_000_000
"""Added to the run's seed for its crops, so that no label set has them."""


class Teacher:
    """A teacher out of an ONNX file that `ferkd-data demo` or `ferkd-data bench --export` wrote."""

    def __init__(self, path: str, threads: int) -> None:
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        stored = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        known = json.loads(stored["ferkd_data.preprocessing"])
        self.size, self.mean, self.std = known["size"], known["mean"], known["std"]

    def __call__(self, images: Tensor) -> Tensor:
        """Label uint8 (B, 3, S, S): float (B, C) probabilities."""
        (logits,) = self.session.run(None, {"images": fd.normalize(images, mean=self.mean, std=self.std).numpy()})
        return torch.from_numpy(logits).softmax(dim=1)


def batches(
    folder: str, teacher: Teacher, *, batch_size: int, size: int, steps: int, seed: int, mix: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `steps` batches: crops uint8 (B, 3, size, size) and the teacher's probabilities (B, C).

    With `mix`, each batch is mixed with its own reverse by Mixup, with a share drawn evenly from 0 to 1, and the
    teacher labels the mixed images: the consistent, aggressive mixing of FunMatch (Beyer et al., CVPR 2022).
    """
    from PIL import Image

    paths = sorted(Path(folder).glob("*/*"))
    photos = [functional.pil_to_tensor(Image.open(path).convert("RGB")) for path in paths]
    passes = -(-steps * batch_size // len(paths))
    drawn = [
        fd.draw_crops(
            path.relative_to(folder).with_suffix("").as_posix(),
            *photo.shape[1:],
            seed=FRESH + seed,
            count=passes,
            distribution=fd.CropDistribution(),
        )
        for path, photo in zip(paths, photos, strict=True)
    ]
    rng = fd.generator("online", seed)
    order = np.concatenate([rng.permutation(len(paths)) for _ in range(passes)])
    for step in range(steps):
        seen, shown = [], []
        for place in range(step * batch_size, (step + 1) * batch_size):
            row = order[place]
            crops, number = drawn[row], place // len(paths)
            box, flip = crops.boxes[number].tolist(), bool(crops.flip[number])
            for cut, side in ((seen, size), (shown, teacher.size)):
                crop = functional.resized_crop(photos[row], *box, [side, side], antialias=True)
                cut.append(functional.horizontal_flip(crop) if flip else crop)
        share = rng.uniform() if mix else 1.0
        students, teachers = (blend(torch.stack(crops), share) for crops in (seen, shown))
        yield students.contiguous(memory_format=torch.channels_last), teacher(teachers)


def blend(images: Tensor, share: float) -> Tensor:
    """Mix uint8 images (B, 3, S, S) with the batch in reverse order: `share` of each, the rest of the other."""
    if share == 1:
        return images
    mixed = share * images.float() + (1 - share) * images.flip(0).float()
    return mixed.round().to(torch.uint8)
