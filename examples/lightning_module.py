"""A LightningDataModule that resumes in the middle of an epoch, and a student module for it.

python examples/lightning_module.py LABELS PHOTOS [--model resnet18] [--epochs 2]
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
import torchvision

import ferkd_data as fd


class CropData(lightning.LightningDataModule):
    def __init__(self, labels: str, photos: str, **settings: Any) -> None:
        super().__init__()
        self.labels, self.photos, self.settings = labels, photos, settings
        self.loader: fd.CropLoader | None = None
        self.saved: dict[str, Any] | None = None

    def train_dataloader(self) -> fd.CropLoader:
        if self.loader is None:
            trainer = self.trainer
            rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
            self.loader = fd.CropLoader(
                fd.open_labels(self.labels), images=self.photos, rank=rank, world_size=world_size, **self.settings
            )
            if self.saved is not None:
                self.loader.load_state_dict(self.saved)
        return self.loader

    def state_dict(self) -> dict[str, Any]:
        return {} if self.loader is None else {"loader": self.loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict.get("loader")


class Student(lightning.LightningModule):
    def __init__(self, model: str, num_classes: int, lr: float) -> None:
        super().__init__()
        self.model = torchvision.models.get_model(model, num_classes=num_classes)
        self.lr = lr

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        images, targets = batch
        return images.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def training_step(self, batch: tuple[torch.Tensor, fd.SoftTargets], batch_idx: int) -> torch.Tensor:
        images, targets = batch
        loss = fd.soft_cross_entropy(self.model(fd.normalize(images)), targets)
        self.log("loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("labels")
    parser.add_argument("photos")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    data = CropData(args.labels, args.photos, batch_size=args.batch_size, size=args.size)
    student = Student(args.model, fd.open_labels(args.labels).num_classes, lr=1e-3)
    # Our loader has ranks of its own; Lightning must not put a sampler around it.
    trainer = lightning.Trainer(
        max_epochs=args.epochs, use_distributed_sampler=False, logger=False, enable_checkpointing=False
    )
    trainer.fit(student, data)
    print(f"step {trainer.global_step}: loss {trainer.callback_metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
