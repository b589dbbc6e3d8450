"""Hugging Face Accelerate: the loader has workers, ranks and a state of its own, and is saved with the rest.

accelerate launch examples/accelerate_loop.py LABELS PHOTOS [--model resnet18] [--epochs 2]
"""

from __future__ import annotations

import argparse

import torch
import torchvision
from accelerate import Accelerator

import ferkd_data as fd


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("labels")
    parser.add_argument("photos")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--checkpoint", default=None, help="A folder to save to after each epoch, and to resume from.")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    # Without a GPU it must be told: else each of several processes takes itself for the only one.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    labels = fd.open_labels(args.labels)
    loader = fd.CropLoader(
        labels,
        images=args.photos,
        batch_size=args.batch_size,
        size=args.size,
        num_workers=args.workers,
        pin_memory=True,  # where there is a GPU
    )
    model = torchvision.models.get_model(args.model, num_classes=labels.num_classes)
    model.to(memory_format=torch.channels_last)  # as the batches are
    model, optimiser = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    # Anything with state_dict and load_state_dict is saved along: no batch is repeated or skipped after a resume.
    accelerator.register_for_checkpointing(loader)
    if args.resume:
        accelerator.load_state(args.checkpoint)

    for epoch in range(loader.epoch, args.epochs):
        loader.set_epoch(epoch)
        steps = 0
        for images, targets in loader:
            images = images.to(accelerator.device, non_blocking=True)
            targets = targets.to(accelerator.device, non_blocking=True)
            with accelerator.autocast():
                logits = model(fd.normalize(images))
            loss = fd.soft_cross_entropy(logits, targets)
            optimiser.zero_grad()
            accelerator.backward(loss)
            optimiser.step()
            steps += 1
        accelerator.print(f"epoch {epoch}: {steps} steps, loss {loss.item():.4f}")
        if args.checkpoint:
            accelerator.save_state(args.checkpoint)


if __name__ == "__main__":
    main()
