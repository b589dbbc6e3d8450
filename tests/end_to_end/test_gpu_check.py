"""scripts/gpu_check.sh, rehearsed on a CPU with tiny sizes, so that it does not rot until somebody has a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load(ROOT / "scripts" / "gpu_check.py")


def test_every_step_runs(check, tmp_path):
    """But for the tests, which run by themselves. JPEGs need TorchCodec, which a PyTorch of another version refuses."""
    from gpu_steps import STEPS

    steps = [name for name in STEPS if name != "tests"]
    out = tmp_path / "report.md"
    command = [SCRIPT, "--device", "cpu", "--tiny", "--steps", ",".join(steps), "--out", out]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    text = out.read_text(encoding="utf-8")
    assert done.returncode == 0, done.stdout
    for name in steps:
        assert f"| {name} | ok | " in text or (name, f"| {name} | not possible here | " in text) == ("jpegs", True), (
            name
        )
    assert "MISSED" not in text and "halved" in text and "(a rehearsal)" in text.splitlines()[0]


@pytest.mark.parametrize("wrong", [False, True])
def test_wrong_labels_of_a_device_are_noticed(check, tmp_path, capsys, wrong):
    """The device's teacher takes BGR where the CPU's takes RGB."""
    from gpu_steps import Step, agreement
    from safetensors.torch import load_file, save_file

    class Rehearsal(Step):
        def build(self, photos, teacher, **settings):
            if wrong and settings.get("device") != "cpu":
                path = teacher.partition("@")[2]
                weights = load_file(path)
                bgr = weights["conv_stem.weight"].flip(1).contiguous()
                save_file({**weights, "conv_stem.weight": bgr}, tmp_path / "bgr.safetensors")
                teacher = teacher.replace(path, str(tmp_path / "bgr.safetensors"))
            return super().build(photos, teacher, **settings)

    step = Rehearsal(device="cpu", tiny=True, folder=tmp_path)
    agreement(step)
    assert [text.partition(":")[0] for text in step.missed] == (["fp32", "fp32", "bf16", "bf16"] if wrong else [])
    assert ("MISSED: bf16: top-1" in capsys.readouterr().out) == wrong


def test_a_step_that_fails_or_hangs_costs_the_others_nothing(check):
    hung = check.run("here", "", 0.2, ["--device", "cpu", "--tiny"])
    assert hung.result == "FAILED: not done within 0 s" and hung.seconds < 60
    assert check.run("here", "", 600, ["--device", "cpu", "--no-such-option"]).result == "FAILED (status 2)"
    text = check.report([hung], ["--tiny"], "cpu")
    assert "| here | FAILED: not done within 0 s | " in text


def test_bars_on_speed_are_judged_on_a_gpu_alone(check, tmp_path, capsys):
    from gpu_steps import Step

    for device, missed in (("cpu", []), ("cuda", ["slow"])):
        step = Step(device=device, tiny=True, folder=tmp_path)
        step.bar("slow", held=False, speed=True)
        assert step.missed == missed
    step.bar("wrong", held=False)
    assert step.missed == ["slow", "wrong"] and "MISSED: wrong" in capsys.readouterr().out


def test_what_is_carried_has_no_pytorch_unless_asked_for(check):
    names = {line.partition("==")[0] for line in check.wheels(with_torch=False)}
    assert {"timm", "simplejpeg", "pyarrow", "numpy", "pytest", "torchcodec"} <= names
    assert not {"torch", "torchvision", "triton", "ferkd-data"} & names and not any("nvidia" in name for name in names)
    assert {"torch", "torchvision"} <= {line.partition("==")[0] for line in check.wheels(with_torch=True)}
