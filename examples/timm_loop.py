"""timm's parts around our loader: its models, optimisers, schedulers and EMA, distilled offline.

    python examples/timm_loop.py LABELS PHOTOS [--model mobilenetv3_small_050] [--epochs 2]

timm's own distillation tasks (timm.task.LogitDistillationTask) run the teacher in every step. Here it ran once, when
the labels were built; what is left is timm's plain classification task with a criterion that takes soft targets.
Needs timm 1.0.31.
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask

import ferkd_data as fd


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("labels")
    parser.add_argument("photos")
    parser.add_argument("--model", default="mobilenetv3_small_050")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = fd.open_labels(args.labels)
    model = timm.create_model(args.model, num_classes=labels.num_classes).to(device, memory_format=torch.channels_last)
    config = timm.data.resolve_model_data_config(model)
    loader = fd.CropLoader(
        labels,
        images=args.photos,
        batch_size=args.batch_size,
        size=args.size,
        interpolation=config["interpolation"],
        spread=True,
        num_workers=args.workers,
        pin_memory=device == "cuda",
    )
    cutmix = fd.CutMix(prob=0.5)
    optimiser = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimiser, sched="cosine", num_epochs=args.epochs)
    task = ClassificationTask(model, criterion=fd.soft_cross_entropy, device=torch.device(device), verbose=False)
    task.setup_ema(decay=0.99)

    for epoch in range(args.epochs):
        loader.set_epoch(epoch)
        task.train()
        for step, (images, targets) in enumerate(loader, 1):
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            rng = fd.generator("cutmix", 0, epoch, step)
            images, targets = cutmix(images, targets, rng=rng)
            with torch.autocast(device, torch.bfloat16):
                loss = task(fd.normalize(images, mean=config["mean"], std=config["std"]), targets)["loss"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            task.update_ema()
        scheduler.step(epoch + 1)
        print(f"epoch {epoch}: {step} steps, loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
