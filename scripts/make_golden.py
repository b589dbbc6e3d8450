"""Write the golden label sets of tests/golden/ for the present format version. Run once per version, then never."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import ferkd_data as fd

ROOT = Path(__file__).parent.parent / "tests" / "golden" / "version-1"


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
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        for number in range(4):
            path = photos / f"class{number % 2}" / f"photo{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (np.indices((12, 16)).sum(axis=0)[..., None] * [3, 5, 7] + 40 * number) % 256
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        (photos / "class0" / "broken.png").write_bytes(b"no image")
        classes = Path(name) / "classes.txt"
        classes.write_text("".join(f"class{i}\tname {i}\n" for i in range(6)))
        for layout in ("parquet", "webdataset"):
            fd.build(
                photos,
                ROOT / layout,
                teachers=["python:golden_teacher:Golden"],
                classes=classes,
                layout=layout,
                crops=5,
                crops_per_block=3,
                top_k=2,
                images_per_shard=3,
                seed=7,
                device="cpu",
            )


if __name__ == "__main__":
    main()
