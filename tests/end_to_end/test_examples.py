"""Every example runs on tiny real data, as a user would start it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TINY = ["--epochs", "2", "--batch-size", "8", "--size", "32"]


def start(command, tmp_path, **environment):
    variables = {"FERKD_DATA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=tmp_path,
        env={**os.environ, **variables, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 100, path


def test_plain_ddp_on_two_processes_and_resumed(label_set, photos, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    command = [*torchrun, EXAMPLES / "plain_ddp.py", label_set, photos, *TINY, "--workers", "0"]
    assert "epoch 1: loss" in start(command, tmp_path)
    again = start([*command, "--epochs", "3"], tmp_path)
    assert "epoch 2: loss" in again and "epoch 1" not in again


def test_timm_loop(label_set, photos, tmp_path):
    printed = start([EXAMPLES / "timm_loop.py", label_set, photos, *TINY, "--workers", "1"], tmp_path)
    assert "epoch 1: loss" in printed


def test_lightning_module(label_set, photos, tmp_path):
    assert "loss " in start([EXAMPLES / "lightning_module.py", label_set, photos, *TINY], tmp_path)


def test_accelerate_loop_resumes(label_set, photos, tmp_path):
    command = [EXAMPLES / "accelerate_loop.py", label_set, photos, *TINY, "--workers", "0", "--checkpoint", "saved"]
    assert "epoch 1: loss" in start(command, tmp_path)
    again = start([*command, "--epochs", "3", "--resume"], tmp_path)
    assert "epoch 2: loss" in again and "epoch 1" not in again


def test_hf_trainer_resumes_after_the_last_batch(label_set, photos, tmp_path):
    """20 images, 2 in a batch: after step 8 the loader stands at image 16, also when it was resumed at step 4."""
    command = [EXAMPLES / "hf_trainer.py", label_set, photos, *TINY, "--epochs", "1", "--workers", "0"]
    command += ["--save-steps", "4"]
    assert "step 10: loss" in start(command, tmp_path)
    place = tmp_path / "trained/checkpoint-8/loader.json"
    first = json.loads(place.read_text())["place"]
    for step in (8, 10):
        shutil.rmtree(tmp_path / f"trained/checkpoint-{step}")
    assert "step 10: loss" in start([*command, "--resume"], tmp_path)
    assert json.loads(place.read_text())["place"] == first and first["images"] == 16


@pytest.mark.parametrize(
    "example", sorted(path.name for path in EXAMPLES.glob("*.py") if "argparse" in path.read_text())
)
def test_help_works_without_data(example, tmp_path):
    assert "LABELS" in start([EXAMPLES / example, "--help"], tmp_path).upper()
