"""Checkpoints as other projects' training scripts write them, by their own code where it is available."""

from __future__ import annotations

import argparse
import copy
import pathlib
import warnings

import numpy as np
import odd_teachers
import pytest
import torch
from torch import nn

import ferkd_data as fd
from ferkd_data.errors import TeacherError
from ferkd_data.teachers import TeacherSpec, load_teacher


class Net(odd_teachers.Linear):
    """A network with a BatchNorm, whose counter is missing in old checkpoints."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(classes)
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean += 0.5

    def forward(self, x):
        return super().forward(self.norm(x))


@pytest.fixture
def net(monkeypatch):
    monkeypatch.setattr(odd_teachers, "net", Net, raising=False)
    trained = Net()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.25)
    return trained


@pytest.fixture
def batch():
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def load(path, options=""):
    return load_teacher(TeacherSpec.parse(f"python:odd_teachers:net@{path}{options}"))


def other(net: nn.Module) -> dict[str, torch.Tensor]:
    """Make weights that must not be loaded."""
    return {name: value + 1 for name, value in net.state_dict().items()}


class NoSuchClassHere:
    """An object that is pickled by a reference, which the reader cannot follow safely."""


def timm_train(net, path):
    """Save with timm's CheckpointSaver: EMA beside plain weights, and the arguments of the command line."""
    import timm.utils

    plain = copy.deepcopy(net)
    plain.load_state_dict(other(net))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ema = timm.utils.ModelEmaV3(net)
    args = argparse.Namespace(model="net", lr=0.1, output=pathlib.Path("here"), betas=(0.9, 0.99), nothing=None)
    saver = timm.utils.CheckpointSaver(
        plain, torch.optim.SGD(plain.parameters(), lr=0.1), args=args, model_ema=ema, checkpoint_dir=str(path.parent)
    )
    saver.save_checkpoint(epoch=0, metric=1.0)
    return path.parent / "last.pth.tar"


def torchvision_reference(net, path):
    """torchvision's references/classification/train.py saves an EMA class that derives from AveragedModel."""
    averaged = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    assert "n_averaged" in averaged.state_dict()
    torch.save(
        {"model": other(net), "model_ema": averaged.state_dict(), "args": argparse.Namespace(), "epoch": 1}, path
    )


def lightning_module(net, path):
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self, model, lr=0.1):
            super().__init__()
            self.save_hyperparameters(ignore=["model"])
            self.model = model
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(10))

        def training_step(self, batch, number):
            return self.loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    data = torch.utils.data.DataLoader([(torch.zeros(3, 32, 32), 0)] * 2, batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=path.parent,
        )
        task = Task(net)
        task.model.norm.momentum = 0.0
        trainer.fit(task, data)
        trainer.save_checkpoint(path)


def compiled(net, path):
    torch.save(torch.compile(net).state_dict(), path)
    assert all(name.startswith("_orig_mod.") for name in torch.load(path, weights_only=True))


def compiled_inside_ddp(net, path):
    torch.save({"state_dict": {f"module._orig_mod.{k}": v for k, v in net.state_dict().items()}}, path)


def compiled_part(net, path):
    net.norm = torch.compile(net.norm)
    torch.save(net.state_dict(), path)


def no_counters(net, path):
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(state) < len(net.state_dict())
    torch.save(state, path)


def safetensors_with_prefix(net, path):
    from safetensors.torch import save_file

    path = path.with_suffix(".safetensors")
    save_file({f"model.{k}": v for k, v in net.state_dict().items()}, str(path))
    return path


def nested(net, path):
    torch.save({"model": {"state_dict": net.state_dict(), "step": 3}}, path)


def objects_of_all_kinds_beside(net, path):
    """NumPy numbers, paths and a class of the training script are not created."""
    beside = {
        "own": NoSuchClassHere(),
        "best": np.float64(0.7),
        "where": pathlib.PurePosixPath("a"),
    }
    torch.save({"state_dict": net.state_dict(), **beside}, path)


def the_same_twice(net, path):
    state = net.state_dict()
    torch.save({**{f"model.{k}": v for k, v in state.items()}, **{f"net.{k}": v for k, v in state.items()}}, path)


def averages_that_are_none(net, path):
    torch.save({"model": net.state_dict(), "ema": {"decay": 0.99, "updates": 7}, "model_ema": {}}, path)


def half_precision(net, path):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, path)


WRITERS = [
    timm_train,
    torchvision_reference,
    lightning_module,
    compiled,
    compiled_inside_ddp,
    compiled_part,
    no_counters,
    safetensors_with_prefix,
    nested,
    objects_of_all_kinds_beside,
    the_same_twice,
    averages_that_are_none,
    half_precision,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_weights_are_found(net, batch, tmp_path, write):
    expected = copy.deepcopy(net).eval()
    path = write(net, tmp_path / "w.ckpt") or tmp_path / "w.ckpt"
    teacher = load(path)
    images = (batch / 255 - 0.5) / 0.25
    tolerance = 0.02 if write is half_precision else 1e-4
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(batch), expected(images), atol=tolerance, rtol=tolerance)


def test_two_models_in_one_file_are_not_guessed_between(net, tmp_path):
    state = net.state_dict()
    torch.save(
        {**{f"student.{k}": v for k, v in state.items()}, **{f"ema.{k}": v for k, v in other(net).items()}},
        tmp_path / "w.pth",
    )
    with pytest.raises(TeacherError, match=r"under 'ema\.' and, with other weights, under 'student\.'; save"):
        load(tmp_path / "w.pth")


def test_what_does_not_fit_is_named(net, tmp_path):
    state = net.state_dict()
    torch.save({f"model.{k}": v for k, v in state.items() if k != "head.bias"}, tmp_path / "short.pth")
    with pytest.raises(TeacherError, match=r"missing 1 keys \(head.bias\); unexpected none"):
        load(tmp_path / "short.pth")
    torch.save({**{f"model.{k}": v for k, v in state.items()}, "model.more": torch.ones(1)}, tmp_path / "long.pth")
    with pytest.raises(TeacherError, match=r"missing none; unexpected 1 keys \(more\)"):
        load(tmp_path / "long.pth")
    torch.save(Net(7).state_dict(), tmp_path / "seven.pth")
    with pytest.raises(TeacherError, match=r"head.weight has shape \(7, 48\).*option \?classes=7"):
        load(tmp_path / "seven.pth")
    whole = {k: (100 * v).to(torch.int8) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(whole, tmp_path / "quantised.pth")
    with pytest.raises(TeacherError, match=r"of type torch.int8, the model needs torch.float32; give a"):
        load(tmp_path / "quantised.pth")
    torch.save({"epoch": 1, "own": NoSuchClassHere()}, tmp_path / "none.pth")
    with pytest.raises(TeacherError, match="no state_dict of tensors, only objects whose making could run code"):
        load(tmp_path / "none.pth")
    torch.save(net, tmp_path / "module.pth")
    with pytest.raises(TeacherError, match="could run code"):
        load(tmp_path / "module.pth")


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_no_code_runs_beside_weights(net, batch, tmp_path):
    opens = Evil(eval, f"open({str(tmp_path / 'ran')!r}, 'w')")
    torch.save({"state_dict": net.state_dict(), "args": opens}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").logits(batch).shape == (4, 10)
    for evil in (
        {"state_dict": opens},
        {"state_dict": net.state_dict(), "args": Evil(pathlib.Path.touch, tmp_path / "ran")},
        {"state_dict": {**net.state_dict(), "head.bias": opens}},
    ):
        torch.save(evil, tmp_path / "w.pth")
        with pytest.raises(TeacherError, match=r"could run code|head\.bias"):
            load(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["timm:mobilenetv3_small_050", "torchvision:squeezenet1_1"])
def test_a_fine_tuned_head_of_another_size(tmp_path, kind):
    import timm
    import torchvision

    name = kind.partition(":")[2]
    make = timm.create_model if kind.startswith("timm") else torchvision.models.get_model
    torch.save(make(name, num_classes=7).state_dict(), tmp_path / "w.pth")
    with pytest.raises(TeacherError, match=r"add the option \?classes=7"):
        load_teacher(TeacherSpec.parse(f"{kind}@{tmp_path / 'w.pth'}"))
    teacher = load_teacher(TeacherSpec.parse(f"{kind}@{tmp_path / 'w.pth'}?classes=7"))
    assert teacher.num_classes == 7 and teacher.class_names is None and teacher.published_top1 is None


@pytest.mark.filterwarnings("ignore:.*init_weights.*:FutureWarning")
def test_a_checkpoint_of_a_model_that_may_normalise_its_input(tmp_path):
    """GoogLeNet and Inception v3 do so with torchvision's own weights; mean 0.5 and std 0.5 have the same effect."""
    import torchvision

    network = torchvision.models.googlenet(num_classes=4, aux_logits=True, init_weights=False)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    spec = f"torchvision:googlenet@{tmp_path / 'w.pth'}?classes=4&size=64"
    with pytest.raises(TeacherError, match=r"does not say which: add \?mean=0.5&std=0.5 for torchvision"):
        load_teacher(TeacherSpec.parse(spec))
    batch = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    teacher = load_teacher(TeacherSpec.parse(f"{spec}&mean=0.5&std=0.5"))
    network.eval().transform_input = True
    with torch.no_grad():
        expected = network(fd.normalize(batch))
    torch.testing.assert_close(teacher.logits(batch), expected, atol=1e-4, rtol=1e-4)


def test_a_vision_transformer_trained_at_another_size(tmp_path):
    import timm

    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=64).state_dict(), tmp_path / "w.pth")
    spec = f"timm:vit_tiny_patch16_224@{tmp_path / 'w.pth'}"
    assert load_teacher(TeacherSpec.parse(f"{spec}?size=64")).preprocessing.size == 64
    with pytest.raises(
        TeacherError, match=r"pos_embed has shape .* trained at another size\? Then add the option size"
    ):
        load_teacher(TeacherSpec.parse(spec))


def test_a_model_without_a_classifier(tmp_path):
    import timm

    name = "vit_small_patch14_dinov2"
    module = timm.create_model(name, img_size=28)
    assert module.num_classes == 0
    torch.save(module.state_dict(), tmp_path / "w.pth")
    with pytest.raises(TeacherError, match="gives features and has no classifier"):
        load_teacher(TeacherSpec.parse(f"timm:{name}@{tmp_path / 'w.pth'}?size=28"))
