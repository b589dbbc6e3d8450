"""Hugging Face Trainer: it takes our loader as it is, and resumes it where it stopped instead of skipping batches.

python examples/hf_trainer.py LABELS PHOTOS [--model resnet18] [--epochs 2] [--output trained] [--resume]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torchvision
from transformers import Trainer, TrainerCallback, TrainingArguments

import ferkd_data as fd


class Distiller(Trainer):
    def __init__(self, *, loader: fd.CropLoader, **settings: Any) -> None:
        super().__init__(**settings)
        self.loader = loader

    def get_train_dataloader(self) -> fd.CropLoader:
        return self.loader

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **ignored: Any) -> Any:
        logits = model(fd.normalize(inputs["images"]))
        loss = fd.soft_cross_entropy(logits, inputs["targets"])
        return (loss, logits) if return_outputs else loss


class SaveLoader(TrainerCallback):
    """Keeps the loader's place beside each checkpoint: no batch is repeated or skipped after a resume."""

    def __init__(self, loader: fd.CropLoader) -> None:
        self.loader = loader

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **ignored: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / "loader.json").write_text(json.dumps(self.loader.state_dict()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("labels")
    parser.add_argument("photos")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--output", default="trained")
    parser.add_argument("--save-steps", type=int, default=1000)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    arguments = TrainingArguments(
        args.output, num_train_epochs=args.epochs, save_steps=args.save_steps, report_to=[], ignore_data_skip=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    loader = fd.CropLoader(
        fd.open_labels(args.labels), images=args.photos, batch_size=args.batch_size, size=args.size,
        num_workers=args.workers, pin_memory=True,
        to_batch=lambda images, targets: {
            "images": images.to(arguments.device, non_blocking=True),
            "targets": targets.to(arguments.device, non_blocking=True),
        },
    )  # fmt: skip
    # Not in channels-last format, in which batches are: Trainer cannot save such weights (safetensors refuses them).
    model = torchvision.models.get_model(args.model, num_classes=loader.labels.num_classes)
    if args.resume:
        last = max(Path(args.output).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        loader.load_state_dict(json.loads((last / "loader.json").read_text()))
    trainer = Distiller(model=model, args=arguments, loader=loader, callbacks=[SaveLoader(loader)])
    done = trainer.train(resume_from_checkpoint=args.resume)
    print(f"step {done.global_step}: loss {done.training_loss:.4f}")


if __name__ == "__main__":
    main()
