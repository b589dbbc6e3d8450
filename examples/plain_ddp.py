"""Distil into any model with plain PyTorch and DistributedDataParallel, on GPUs or CPUs.

    torchrun --nproc-per-node 2 examples/plain_ddp.py LABELS PHOTOS [--model resnet18] [--epochs 2] [--size 224]

An interrupted run goes on at exactly the next batch: the loader's state is part of the checkpoint.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch.nn.parallel import DistributedDataParallel

import ferkd_data as fd


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("labels")
    parser.add_argument("photos")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        # Otherwise what names no GPU, such as NCCL's barriers and pinned memory, makes every rank use the first one.
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()

    labels = fd.open_labels(args.labels)
    loader = fd.CropLoader(
        labels,
        images=args.photos,
        batch_size=args.batch_size,
        size=args.size,
        selfmix=fd.SelfMix(prob=0.5),
        num_workers=args.workers,
        pin_memory=cuda,
    )
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, num_classes=labels.num_classes)
    # As the batches are; otherwise DDP warns that gradient strides do not match its buckets.
    model = model.to(device, memory_format=torch.channels_last)
    student = DistributedDataParallel(model, device_ids=[device.index] if cuda else None)
    optimiser = torch.optim.AdamW(student.parameters(), lr=args.lr)
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        loader.load_state_dict(saved["loader"])

    for epoch in range(loader.epoch, args.epochs):
        loader.set_epoch(epoch)
        for step, (images, targets) in enumerate(loader, 1):
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            loss = fd.soft_cross_entropy(student(fd.normalize(images)), targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step % args.save_every == 0 and rank == 0:
                save(args.checkpoint, model, optimiser, loader)
        if rank == 0:
            print(f"epoch {epoch}: {step} steps, loss {loss.item():.4f}", flush=True)
            save(args.checkpoint, model, optimiser, loader)
    dist.destroy_process_group()


def save(path: Path, model: torch.nn.Module, optimiser: torch.optim.Optimizer, loader: fd.CropLoader) -> None:
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "loader": loader.state_dict()}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    main()
