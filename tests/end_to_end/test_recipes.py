"""docs/recipes: each page's added lines run against the installed library's own pieces; steps and crops are counted.

Whole scripts of timm, torchvision and Accelerate are not installed with them, so their loops are written out here in
short, with the calls that they make.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ferkd_data as fd
from ferkd_data.errors import UsageError

RECIPES = Path(__file__).parent.parent.parent / "docs/recipes"
PAGES = sorted(path.stem for path in RECIPES.glob("*.md") if "```diff" in path.read_text(encoding="utf-8"))
IMAGES, BATCH = 20, 4
STEPS = IMAGES // BATCH
"""Of an epoch, with epoch="crops"."""


def changed(page, sign):
    (diff,) = re.findall(r"```diff\n(.*?)```", (RECIPES / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line[1:] for line in diff.splitlines() if line.startswith(sign)]


@pytest.mark.parametrize("page", PAGES)
def test_a_recipe_changes_at_most_five_lines(page):
    added, removed = changed(page, "+"), changed(page, "-")
    assert 2 <= len(added) <= 5 and len(removed) <= 2


def test_the_five_recipes_are_there():
    assert PAGES == ["accelerate", "hf_trainer", "lightning", "timm", "torchvision"]


@pytest.fixture
def added(label_set, photos, tmp_path, monkeypatch):
    """Runs the line of a page that makes the loader, on the small label set; gives the names that it defines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels").symlink_to(label_set)
    (tmp_path / "imagenet").mkdir()
    for name in ("train", "imagenet/train"):
        (tmp_path / name).symlink_to(photos)
    make = fd.CropLoader
    small = {"size": 16, "cache_dir": tmp_path / "cache", "crops_per_image": 2}

    def make_small(labels, **settings):
        return make(labels, **(settings | small | {"num_workers": 0, "batch_size": BATCH}))

    monkeypatch.setattr(fd, "CropLoader", make_small)

    def run(page, **names):
        lines = changed(page, "+")
        first = next(number for number, line in enumerate(lines) if "fd.CropLoader(" in line)
        last = next(number for number, line in enumerate(lines) if number >= first and line.endswith(")"))
        names = {"fd": fd, "device": torch.device("cpu"), **names}
        exec(compile(textwrap.dedent("\n".join(lines[first : last + 1])), page, "exec"), names)
        return names

    return run


class Student(nn.Module):
    """Remembers the crops it was trained on, as the pictures that they were."""

    def __init__(self, classes=10):
        super().__init__()
        self.head = nn.Linear(48, classes)
        self.seen = Counter()

    def forward(self, pixel_values):
        if self.training:
            self.seen.update(hashlib.sha1(image.detach().numpy().tobytes()).hexdigest() for image in pixel_values)
        return self.head(nn.functional.adaptive_avg_pool2d(pixel_values, 4).flatten(1))


def crops_of(label_set, photos, tmp_path, epochs, prepare=fd.normalize):
    """What one process sees of whole epochs."""
    settings = {
        "batch_size": BATCH,
        "size": 16,
        "crops_per_image": 2,
        "epoch": "crops",
        "cache_dir": tmp_path / "other",
    }
    loader = type_of_loader()(fd.open_labels(label_set), images=photos, **settings)
    seen = Counter()
    for epoch in epochs:
        loader.set_epoch(epoch)
        seen.update(hashlib.sha1(x.numpy().tobytes()).hexdigest() for images, _ in loader for x in prepare(images))
    assert seen.total() == IMAGES * len(epochs)
    return seen


def type_of_loader():
    from ferkd_data.loader import CropLoader

    return CropLoader


@pytest.fixture
def expected(label_set, photos, tmp_path):
    return lambda epochs, **how: crops_of(label_set, photos, tmp_path, epochs, **how)


@pytest.mark.parametrize("resumed_at", [0, 2])
def test_timm(added, expected, resumed_at):
    """train.py's loop: set_epoch of the data set, timm's losses, its meters and its EMA."""
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.utils import AverageMeter, ModelEmaV3

    config = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    args = SimpleNamespace(data_dir=".", batch_size=BATCH, workers=0, pin_mem=False)
    resolved = config | {"input_size": (3, 16, 16), "interpolation": "bilinear"}
    loader = added("timm", args=args, data_config=resolved)["loader_train"]
    dataset = loader.dataset
    model = Student(len(dataset.classes))
    optimiser, ema, losses, steps = torch.optim.SGD(model.parameters(), 0.1), ModelEmaV3(model), AverageMeter(), 0
    criteria = (nn.CrossEntropyLoss(), SoftTargetCrossEntropy())
    for epoch in range(resumed_at, resumed_at + 2):
        assert hasattr(dataset, "set_epoch")
        dataset.set_epoch(epoch)
        for input, target in loader:
            losses_of = [
                criterion(model.head(input.flatten(2).mean(2).repeat(1, 16)), target) for criterion in criteria
            ]
            torch.testing.assert_close(*losses_of)
            loss = criteria[0](model(input), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            ema.update(model)
            losses.update(loss.item(), input.size(0))
            steps += 1
    assert steps == 2 * len(loader) == 2 * STEPS and losses.avg > 0

    def prepare(images):
        return fd.normalize(images, **config)

    assert model.seen == expected([resumed_at, resumed_at + 1], prepare=prepare)
    mixed, soft = Mixup(cutmix_alpha=1.0, num_classes=10, multi_label=True, label_smoothing=0)(input.clone(), target)
    assert mixed.shape == input.shape and soft.shape == (BATCH, 10)
    torch.testing.assert_close(soft.sum(1), torch.ones(BATCH))


def test_torchvision(added, expected):
    """train.py's loop: cross-entropy with label smoothing, autocast with a scaler, accuracy, v2's MixUp and CutMix."""
    from torchvision.transforms import v2

    args = SimpleNamespace(batch_size=BATCH, workers=0, train_crop_size=16, interpolation="bilinear")
    loader = added("torchvision", args=args, train_dir="train")["data_loader"]
    model = Student()
    criterion, steps = nn.CrossEntropyLoss(label_smoothing=0.1), 0
    optimiser, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    for epoch in range(3):
        loader.set_epoch(epoch)
        for image, target in loader:
            image, target = image.to("cpu"), target.to("cpu")
            with torch.autocast("cpu", torch.bfloat16):
                output = model(image)
                loss = criterion(output, target)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            assert target.ndim == 2 and (output.argmax(1) == target.max(dim=1)[1]).float().mean() >= 0
            steps += 1
    assert steps == 3 * STEPS and loss.isfinite()
    assert model.seen == expected([0, 1, 2])
    for mix in (v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)):
        mixed, soft = mix(image, target)
        assert mixed.shape == image.shape
        torch.testing.assert_close(soft.sum(1), torch.ones(BATCH))


class Classifier(nn.Module):
    """Shaped like an image classifier of transformers."""

    def __init__(self):
        super().__init__()
        self.student = Student()

    def forward(self, pixel_values, labels=None):
        from transformers.modeling_outputs import ImageClassifierOutput

        return ImageClassifierOutput(logits=self.student(pixel_values))


def loss_of_the_recipe():
    line = next(line for line in changed("hf_trainer", "+") if "compute_loss_func" in line)
    names = {"fd": fd, "torch": torch}
    exec(f"given = dict({line.strip()})", names)
    return names["given"]


def trainer_of(added, folder, model, epochs, callbacks=(), **settings):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **settings,
    )
    loader = added("hf_trainer", args=arguments)["loader"]
    trainer = Trainer(model=model, args=arguments, callbacks=list(callbacks), **loss_of_the_recipe())
    trainer.get_train_dataloader = lambda: loader
    return trainer, loader


def test_hf_trainer(added, expected, tmp_path):
    model = Classifier()
    trainer, loader = trainer_of(added, tmp_path / "out", model, 3, save_strategy="no")
    done = trainer.train()
    assert done.global_step == 3 * len(loader) == 3 * STEPS and done.training_loss > 0
    assert model.student.seen == expected([0, 1, 2])


GRADIENTS = """
import os, sys
import torch
import ferkd_data as fd
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

labels, photos, cache, out = sys.argv[1:]
STEPS = 3  # batches accumulated for an update

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(3, 10)
    def forward(self, pixel_values, labels=None):
        return ImageClassifierOutput(logits=self.head(pixel_values.mean(dim=(2, 3))))

def batches(**settings):
    labels_ = fd.open_labels(labels)
    return fd.CropLoader(labels_, images=photos, crops_per_image=2, size=16, epoch="crops", cache_dir=cache, **settings)

found = []

class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **ignored):
        found.append(model.head.weight.grad.clone())

model = Model()
args = TrainingArguments(
    out, num_train_epochs=1, learning_rate=0.0, max_grad_norm=0, report_to=[], use_cpu=True, disable_tqdm=True,
    logging_strategy="no", save_strategy="no", gradient_accumulation_steps=STEPS)
loader = batches(
    batch_size=4 // args.world_size, targets="dense",
    to_batch=lambda x, y: {"pixel_values": fd.normalize(x), "labels": y})
numbers = [{"pixel_values": torch.rand(3, 16, 16), "labels": number} for number in range(6)]
trainer = Trainer(model=model, args=args, callbacks=[Gradients()], eval_dataset=numbers, LOSS)
trainer.get_train_dataloader = lambda: loader
trainer.train()
assert 1 < trainer.evaluate()["eval_loss"] < 4

whole = list(batches(batch_size=4, rank=0, world_size=1))
expected = []
for group in (whole[:STEPS], whole[STEPS:]):
    model.zero_grad()
    for images, targets in group:
        logits = model(fd.normalize(images)).logits
        (fd.soft_cross_entropy(logits, targets) / len(group)).backward()
    expected.append(model.head.weight.grad.clone())
torch.testing.assert_close(found, expected)
print("same gradients")
"""
"""Takes 5 batches of 4 crops, however many processes share them. With a rate of 0 the model stays as it is."""


@pytest.mark.parametrize("processes", [1, 2])
def test_hf_trainers_gradients_are_means_over_processes_and_accumulated_batches(label_set, photos, tmp_path, processes):
    """The last update of an epoch has fewer batches to accumulate. Evaluation is on class numbers."""
    program = tmp_path / "train.py"
    line = next(line for line in changed("hf_trainer", "+") if "compute_loss_func" in line)
    program.write_text(GRADIENTS.replace("LOSS", line.strip().rstrip(",")))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, program, label_set, photos, tmp_path / "cache", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.stdout.count("same gradients") == processes, done.stderr[-3000:]


def test_hf_trainer_resumes_in_the_middle_of_an_epoch(added, expected, tmp_path):
    from transformers import TrainerCallback

    class SaveLoader(TrainerCallback):
        loader = None

        def on_save(self, args, state, control, **ignored):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / "loader.json").write_text(json.dumps(self.loader.state_dict()))

    settings = {"save_steps": STEPS + 2, "ignore_data_skip": True}
    callback, first = SaveLoader(), Classifier()
    trainer, callback.loader = trainer_of(added, tmp_path / "out", first, 2, [callback], **settings)
    trainer.train()
    whole = expected([0, 1])
    assert first.student.seen == whole
    checkpoint = tmp_path / f"out/checkpoint-{STEPS + 2}"
    second = Classifier()
    trainer, loader = trainer_of(added, tmp_path / "out", second, 2, **settings)
    loader.load_state_dict(json.loads((checkpoint / "loader.json").read_text()))
    assert trainer.train(resume_from_checkpoint=str(checkpoint)).global_step == 2 * STEPS
    assert second.student.seen.total() == (STEPS - 2) * BATCH and second.student.seen < expected([1])
    third = Classifier()
    trainer, _ = trainer_of(added, tmp_path / "out", third, 2, save_steps=100)
    with pytest.raises(UsageError, match="ignore_data_skip=True"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_accelerate(added, expected, tmp_path):
    """cv_example.py's loop, saved in the middle of an epoch and restored."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    def accelerator_and_loader():
        accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=str(tmp_path)))
        loader = added("accelerate", accelerator=accelerator, batch_size=BATCH)["train_dataloader"]
        accelerator.register_for_checkpointing(loader)
        model = Student()
        model, optimiser, prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
        assert prepared is loader
        return accelerator, loader, model, optimiser

    def train(epochs, until=None):
        steps = 0
        for epoch in epochs:
            loader.set_epoch(epoch)
            for batch in loader:
                batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
                loss = nn.functional.cross_entropy(model(batch["image"]), batch["label"])
                accelerator.backward(loss)
                optimiser.step()
                optimiser.zero_grad()
                steps += 1
                if steps == until:
                    return steps
        return steps

    accelerator, loader, model, optimiser = accelerator_and_loader()
    assert train(range(2), until=STEPS + 2) == STEPS + 2
    accelerator.save_state(str(tmp_path / "saved"))
    seen = model.seen
    accelerator, loader, model, optimiser = accelerator_and_loader()
    accelerator.load_state(str(tmp_path / "saved"))
    assert loader.epoch == 1
    assert train(range(loader.epoch, 3)) == 2 * STEPS - 2
    assert seen + model.seen == expected([0, 1, 2], prepare=lambda images: images / 255)


@pytest.mark.filterwarnings("ignore")
def test_lightning(added, expected, tmp_path):
    """Trained for three epochs; then from a checkpoint of the middle of the second."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    step = next(line for line in changed("lightning", "+") if "soft_cross_entropy" in line)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Student()

        def training_step(self, batch, batch_idx):
            images, targets = batch
            names = {"self": self, "fd": fd, "images": images, "targets": targets}
            exec(step.strip(), names)
            return names["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(module, folder, **settings):
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(folder, every_n_train_steps=STEPS + 2, save_top_k=-1)],
        )
        trainer.fit(module, added("lightning")["loader"], **settings)
        return trainer

    first = Module()
    assert fit(first, tmp_path / "first").global_step == 3 * STEPS
    assert first.model.seen == expected([0, 1, 2])
    (checkpoint,) = [path for path in (tmp_path / "first").iterdir() if f"step={STEPS + 2}." in path.name]
    second = Module()
    assert fit(second, tmp_path / "second", ckpt_path=str(checkpoint)).global_step == 3 * STEPS
    assert second.model.seen.total() == (2 * STEPS - 2) * BATCH
    assert second.model.seen > expected([2]) and second.model.seen < expected([1, 2])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
def test_lightnings_precisions_take_soft_targets(added, precision):
    """The plugins convert whatever floating-point tensors a batch's dataclasses hold."""
    import lightning

    dtypes = set()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(48, 10)

        def training_step(self, batch, batch_idx):
            images, targets = batch
            dtypes.add((targets.weight.dtype, targets.hard.dtype, images.dtype))
            pixels = fd.normalize(images, dtype=self.head.weight.dtype)
            loss = fd.soft_cross_entropy(self.head(nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)), targets)
            assert loss.isfinite()
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        precision=precision,
    )
    trainer.fit(Module(), added("lightning")["loader"])
    wanted = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    assert dtypes == {(wanted.get(precision, torch.float32), torch.int64, torch.uint8)}
