"""Two teachers that can answer differently never share a digest; the same one has the same in every process."""

from __future__ import annotations

import argparse
import copy
import functools
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from ferkd_data.errors import TeacherError
from ferkd_data.teachers import TeacherSpec, load_teacher
from ferkd_data.teachers.digest import module_digest

SPEC = TeacherSpec.parse("python:a:b")


def digest(module: nn.Module) -> str:
    return module_digest(module, SPEC)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("not_kept", torch.ones(2), persistent=False)
        self.outside = torch.ones(2)
        self.scale = 2.0
        self.options = {"b": [1, 2], "a": (torch.ones(1), None)}
        self.config = argparse.Namespace(alpha=1, nested=types.SimpleNamespace(beta="x"))
        self.function = functools.partial(torch.clamp, min=0)
        self.activation = closure(3)
        self.parts = [nn.Linear(2, 2)]
        self._private = 1


def closure(factor):
    return lambda x: x * factor


def change_weight(net):
    net.head.weight.data[0, 0] += 1e-6


def change_buffer(net):
    net.kept[0] = 3


def change_non_persistent_buffer(net):
    net.not_kept[0] = 3


def change_tensor_outside(net):
    net.outside[0] = 3


def change_dtype(net):
    net.head.half()


def change_number(net):
    net.scale = 2.5


def change_private_number(net):
    net._private = 2


def change_stride(net):
    net.body[0].stride = (2, 2)


def change_eps(net):
    net.body[1].eps = 1e-3


def change_activation(net):
    net.body[2] = nn.GELU()


def change_container(net):
    net.options["b"][1] = 3


def change_tensor_in_container(net):
    net.options["a"][0][0] = 3


def change_config(net):
    net.config.nested.beta = "y"


def change_partial(net):
    net.function = functools.partial(torch.clamp, min=1)


def change_closure(net):
    net.activation = closure(4)


def change_hidden_module(net):
    net.parts[0].weight.data[0, 0] += 1


def change_hook(net):
    net.register_forward_hook(lambda module, inputs, output: output * 2)


def change_order(net):
    net.body = nn.Sequential(net.body[0], net.body[2], net.body[1])


CHANGES = [value for name, value in sorted(globals().items()) if name.startswith("change_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_shows(change):
    net = Net()
    before = digest(net)
    assert digest(Net()) == before and digest(copy.deepcopy(net)) == before and digest(net.eval()) == before
    change(net)
    assert digest(net) != before


def test_changes_differ_from_each_other():
    found = set()
    for change in CHANGES:
        net = Net()
        change(net)
        found.add(digest(net))
    assert len(found) == len(CHANGES)


def test_a_run_does_not_show():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = digest(net)
    net(torch.zeros(1, 3, 8, 8))
    assert digest(net) == before


SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
from test_digest import Net, digest, quantised
import torch
print(digest(Net()), digest(quantised(0)))
"""


def test_it_is_the_same_in_every_process():
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(Path(__file__).parent)]
    found = {subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)}
    assert found == {f"{digest(Net())} {digest(quantised(0))}\n"}


def quantised(change: float) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5))
    net[1].weight.data += change
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


def quantised_teacher() -> nn.Module:
    net = quantised(0)
    net.preprocessing = {"size": 4, "mean": 0.5, "std": 0.5}
    return net


def test_quantised_modules(monkeypatch):
    assert digest(quantised(0)) == digest(quantised(0)) != digest(quantised(0.1))
    monkeypatch.setitem(sys.modules, "quantised_teachers", sys.modules[__name__])
    teacher = load_teacher(TeacherSpec.parse("python:quantised_teachers:quantised_teacher"))
    assert teacher.logits(torch.zeros(3, 3, 4, 4, dtype=torch.uint8)).shape == (3, 5)


def test_quantised_sparse_and_complex_tensors_are_read_whole():
    class Holder(nn.Module):
        def __init__(self, tensor):
            super().__init__()
            self.register_buffer("tensor", tensor)

    ones = torch.ones(2, 2)
    kinds = [
        torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8),
        torch.quantize_per_tensor(ones, 0.2, 0, torch.qint8),
        torch.quantize_per_channel(ones, torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 0, torch.qint8),
        torch.quantize_per_channel(ones, torch.tensor([0.1, 0.3]), torch.tensor([0, 0]), 0, torch.qint8),
        ones.to_sparse(),
        (ones * 2).to_sparse(),
        ones.to(torch.complex64),
        ones.to(torch.complex64) * 1j,
        (ones.to(torch.complex64) * (1 + 1j)).conj(),
        ones.to(torch.bfloat16),
        ones.bool(),
        torch.ones(()),
        torch.ones(0, 2),
    ]
    assert len({digest(Holder(kind)) for kind in kinds}) == len(kinds)


def test_weights_that_are_not_there():
    with torch.device("meta"):
        net = nn.Linear(2, 2)
    with pytest.raises(TeacherError, match="teacher python:a:b: its weights cannot be read"):
        digest(net)


def test_programs_of_torchscript_and_fx():
    class Twice(nn.Module):
        def forward(self, x):
            return x * 2

    class Thrice(nn.Module):
        def forward(self, x):
            return x * 3

    traced = [torch.fx.symbolic_trace(cls()) for cls in (Twice, Thrice)]
    assert digest(traced[0]) != digest(traced[1])
    exported = [torch.export.export(cls(), (torch.ones(2),)).module() for cls in (Twice, Thrice)]
    assert digest(exported[0]) != digest(exported[1])


class Mended(Net):
    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class OtherPart(nn.ReLU):
    pass


def test_mended_code_is_the_same_teacher_but_another_part_is_not():
    net = Net()
    assert digest(Mended()) == digest(net)
    net.body[2] = OtherPart()
    assert digest(net) != digest(Net())
    assert digest(nn.ReLU()) != digest(nn.GELU())


def test_options_that_choose_the_answer_count():
    def load(name):
        return load_teacher(TeacherSpec.parse(f"python:odd_teachers:{name}")).digest

    assert load("dict_with_logits?output=logits") != load("dict_with_logits")
    assert load("plain?activation=logits") != load("plain")
    assert load("plain?weight=2&temperature=3") == load("plain"), "those are in the manifest by themselves"
