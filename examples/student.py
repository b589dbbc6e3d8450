"""Train a student from scratch, a CNN or a ViT, and test it on photos that it has never seen.

    python examples/student.py LABELS PHOTOS [--val PHOTOS] [--model resnet18] [--epochs 10] [--size 128]

PHOTOS of --val are class folders, named as the classes of the label set are.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import ferkd_data as fd


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("labels")
    parser.add_argument("photos")
    parser.add_argument("--val", type=Path)
    parser.add_argument("--model", default="resnet18", help="a model of timm")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the photos")
    parser.add_argument("--crops-per-image", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--mix", choices=["none", "self", "strangers"], default="none")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = fd.open_labels(args.labels)
    loader = fd.CropLoader(
        labels,
        images=args.photos,
        batch_size=args.batch_size,
        crops_per_image=args.crops_per_image,
        size=args.size,
        # SelfMix needs an image's crops in one batch. Otherwise different images in a batch are better.
        spread=args.mix != "self" and args.crops_per_image > 1,
        selfmix=fd.SelfMix(prob=0.5) if args.mix == "self" else None,
        num_workers=args.workers,
        pin_memory=device == "cuda",
    )
    cutmix = fd.CutMix(prob=0.5)
    torch.manual_seed(0)
    sized = {"img_size": args.size} if args.model.startswith(("vit", "deit")) else {}
    student = timm.create_model(args.model, num_classes=labels.num_classes, **sized)
    student.to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.05)
    steps = args.epochs * len(loader)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for epoch in range(args.epochs):
        loader.set_epoch(epoch)
        for step, (images, targets) in enumerate(loader, 1):
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            if args.mix == "strangers":
                images, targets = cutmix(images, targets, rng=fd.generator("cutmix", 0, epoch, step))
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = student(fd.normalize(images))
            loss = fd.soft_cross_entropy(logits, targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
        told = f", top-1 {top1(student, args.val, labels, args.size, device):.1f} %" if args.val else ""
        print(f"epoch {epoch}: {step} steps, loss {loss.item():.3f}{told}", flush=True)


@torch.no_grad()
def top1(student: nn.Module, folder: Path, labels: fd.LabelSet, size: int, device: str) -> float:
    """Count, in percent, how many photos of the class folders get their own class."""
    cut = v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    photos = ImageFolder(folder, cut)
    # ImageFolder numbers its folders by itself.
    number = torch.from_numpy(labels.class_numbers(photos.classes))
    student.eval()
    right = sum(
        int((student(fd.normalize(images.to(device))).argmax(1).cpu() == number[targets]).sum())
        for images, targets in DataLoader(photos, batch_size=256)
    )
    student.train()
    return 100 * right / len(photos)


if __name__ == "__main__":
    main()
