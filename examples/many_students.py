"""Train several students from one label set in one pass: each batch is decoded and cut once for all of them.

    python examples/many_students.py LABELS PHOTOS [--models resnet18 mobilenetv3_small_050] [--epochs 10]

The teachers ran once, when the label set was built. Here the loader runs once too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

import ferkd_data as fd


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("labels")
    parser.add_argument("photos")
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenetv3_small_050"], help="models of timm")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the photos")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("students"))
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = fd.open_labels(args.labels)
    loader = fd.CropLoader(
        labels,
        images=args.photos,
        batch_size=args.batch_size,
        size=args.size,
        spread=True,
        num_workers=args.workers,
        pin_memory=device == "cuda",
    )
    torch.manual_seed(0)
    students = {name: timm.create_model(name, num_classes=labels.num_classes) for name in args.models}
    for student in students.values():
        student.to(device, memory_format=torch.channels_last)  # as the batches are
    optimisers = {
        name: torch.optim.AdamW(s.parameters(), lr=args.lr, weight_decay=0.05) for name, s in students.items()
    }
    rates = [torch.optim.lr_scheduler.CosineAnnealingLR(o, args.epochs * len(loader)) for o in optimisers.values()]
    for epoch in range(args.epochs):
        loader.set_epoch(epoch)
        for images, targets in loader:
            inputs, targets = fd.normalize(images.to(device, non_blocking=True)), targets.to(device, non_blocking=True)
            losses = {}
            for name, student in students.items():
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    logits = student(inputs)
                losses[name] = fd.soft_cross_entropy(logits, targets)
                optimisers[name].zero_grad()
                losses[name].backward()
                optimisers[name].step()
            for rate in rates:
                rate.step()
        told = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
        print(f"epoch {epoch}: loss {told}", flush=True)
    args.out.mkdir(exist_ok=True)
    for name, student in students.items():
        torch.save(student.state_dict(), args.out / f"{name}.pt")


if __name__ == "__main__":
    main()
