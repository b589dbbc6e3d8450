"""Write the golden label sets of tests/golden/ that are not there yet; those that are there never change."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import ferkd_data as fd

ROOT = Path(__file__).parent.parent / "tests" / "golden"
SETS: dict[str, dict[str, Any]] = {
    "version-1": {"crops": 5, "crops_per_block": 3},
    "version-1-crop-kinds": {"crop_kinds": ["global:n=2,scale=0.4..1,size=32", "local:n=3,scale=0.05..0.4,size=16"]},
}
"""By folder: the settings that are not those of all."""


class Golden(nn.Module):
    preprocessing = {"size": 16, "mean": (0.5,), "std": (0.25,)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(12, 6)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-2, 2, 72).view(6, 12).sin() * 3)
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.pool(x).flatten(1))
        return logits


def main() -> None:
    sys.modules["golden_teacher"] = sys.modules["__main__"]
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        for number in range(4):
            path = photos / f"class{number % 2}" / f"photo{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (np.indices((12, 16)).sum(axis=0)[..., None] * [3, 5, 7] + 40 * number) % 256
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        (photos / "class0" / "broken.png").write_bytes(b"no image")
        classes = Path(folder) / "classes.txt"
        classes.write_text("".join(f"class{i}\tname {i}\n" for i in range(6)))
        for name, settings in SETS.items():
            if not (ROOT / name).exists():
                for layout in ("parquet", "webdataset"):
                    write(ROOT / name / layout, photos, classes, {**settings, "layout": layout})


def write(out: Path, photos: Path, classes: Path, settings: dict[str, Any]) -> None:
    fd.build(
        photos,
        out,
        teachers=["python:golden_teacher:Golden"],
        classes=classes,
        top_k=2,
        images_per_shard=3,
        seed=7,
        device="cpu",
        **settings,
    )


if __name__ == "__main__":
    main()
