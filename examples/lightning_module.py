"""A Lightning module that learns from soft labels; checkpoints hold the loader's place, also in the middle of an epoch.

python examples/lightning_module.py LABELS PHOTOS [--model resnet18] [--epochs 2] [--resume trained/CHECKPOINT]
"""

from __future__ import annotations

import argparse

import lightning
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint

import ferkd_data as fd


class Student(lightning.LightningModule):
    def __init__(self, model: str, num_classes: int, lr: float) -> None:
        super().__init__()
        self.model = torchvision.models.get_model(model, num_classes=num_classes)
        self.model.to(memory_format=torch.channels_last)  # as the batches are
        self.lr = lr

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
    parser.add_argument("--save-steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--resume", default=None, help="A checkpoint of the middle or the end of an epoch.")
    args = parser.parse_args()
    labels = fd.open_labels(args.labels)
    loader = fd.CropLoader(
        labels,
        images=args.photos,
        batch_size=args.batch_size,
        size=args.size,
        num_workers=args.workers,
        pin_memory=True,  # where there is a GPU
    )
    student = Student(args.model, labels.num_classes, lr=1e-3)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        logger=False,
        callbacks=[ModelCheckpoint("trained", every_n_train_steps=args.save_steps, save_top_k=-1)],
    )
    # Lightning calls the loader's set_epoch, and keeps its place in every checkpoint.
    trainer.fit(student, loader, ckpt_path=args.resume)
    print(f"step {trainer.global_step}: loss {trainer.callback_metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
