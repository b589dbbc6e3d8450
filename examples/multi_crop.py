"""Train a multi-crop student: two large and six small crops of each image in a batch, each at its own size.

    ferkd-data build PHOTOS LABELS --teacher timm:NAME --crop-kinds global:scale=0.25..1,n=20 \
        --crop-kinds local:scale=0.05..0.25,size=96,n=80
    python examples/multi_crop.py LABELS PHOTOS [--kinds global=2 local=6] [--sizes global=160] [--epochs 10]

Every crop has the teachers' label of its own pixels. As in DINO, small crops also learn what the large ones of their
image show: `--local-to-global` is the weight of that part.
"""

from __future__ import annotations

import argparse

import timm
import torch

import ferkd_data as fd


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("labels")
    parser.add_argument("photos")
    parser.add_argument(
        "--kinds", nargs="+", default=["global=2", "local=6"], help="crops of each image; large ones first"
    )
    parser.add_argument("--sizes", nargs="*", default=[], help="other sizes than those of the label set")
    parser.add_argument("--model", default="resnet18", help="a model of timm that takes any size")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the photos")
    parser.add_argument("--batch-images", type=int, default=32)
    parser.add_argument("--local-to-global", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = fd.open_labels(args.labels)
    kinds = numbers(args.kinds)
    large, *small = kinds
    loader = fd.CropLoader(
        labels,
        images=args.photos,
        kinds=kinds,
        size=numbers(args.sizes),
        batch_size=args.batch_images * kinds[large],  # crops of the first kind
        num_workers=args.workers,
        pin_memory=device == "cuda",
    )
    torch.manual_seed(0)
    student = timm.create_model(args.model, num_classes=labels.num_classes).to(
        device, memory_format=torch.channels_last
    )
    optimiser = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.05)
    for epoch in range(args.epochs):
        loader.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for images, targets in loader:
            images = {kind: crops.to(device, non_blocking=True) for kind, crops in images.items()}
            targets = {kind: soft.to(device, non_blocking=True) for kind, soft in targets.items()}
            # A forward pass for each size, as in DINO.
            logits = {kind: student(fd.normalize(crops)) for kind, crops in images.items()}
            loss = torch.stack([fd.soft_cross_entropy(logits[kind], targets[kind]) for kind in kinds]).mean()
            # The mean label of an image's large crops, which lie side by side in a batch: (images, C).
            whole = targets[large].dense().unflatten(0, (-1, kinds[large])).mean(dim=1)
            for kind in small:
                of_each = whole.repeat_interleave(kinds[kind], dim=0)
                loss = loss + args.local_to_global / len(small) * fd.soft_cross_entropy(logits[kind], of_each)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            total += loss.detach()
        print(f"epoch {epoch}: {len(loader)} steps, loss {total.item() / len(loader):.3f}")
    torch.save(student.state_dict(), "student.pt")


def numbers(pairs: list[str]) -> dict[str, int]:
    """Parse ["global=2", "local=6"]."""
    return {name: int(value) for name, _, value in (pair.partition("=") for pair in pairs)}


if __name__ == "__main__":
    main()
