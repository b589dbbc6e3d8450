"""SIGTERM, as a pre-empted job gets it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from label_sets import SMALL, same_files

import ferkd_data as fd
from ferkd_data.builder import Stop
from ferkd_data.builder.stop import stop_on_sigterm
from ferkd_data.errors import BuildStoppedError, UsageError
from ferkd_data_cli.main import run

STOPPED = 143
OPTIONS = ("--crops", "10", "--crops-per-block", "4", "--top-k", "4", "--images-per-shard", "4", "--device", "cpu")


@pytest.fixture
def gated(tiny_teachers, tmp_path, monkeypatch):
    monkeypatch.setenv("GATED_FOLDER", str(tmp_path))
    yield "python:gated_teachers:gated"
    del sys.modules["gated_teachers"]


def terminate_while_labelling(arguments, folder):
    """The exit status and stderr of a build that gets SIGTERM within a shard after its first."""
    command = [sys.executable, "-m", "ferkd_data_cli.main", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "waits").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    (folder / "open").touch()
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("grace", ["0", "20"])
def test_sigterm_ends_a_build_that_resumes(photos, gated, tmp_path, workers, grace):
    out = tmp_path / "out"
    arguments = ["build", str(photos), str(out), "--teacher", gated, *OPTIONS, "--batch-size", "16"]
    arguments += ["--workers", workers, "--grace", grace]
    status, stderr = terminate_while_labelling(arguments, tmp_path)
    assert status == STOPPED and "stopped on request; run the same command again" in stderr
    assert "Traceback" not in stderr
    finished = len(list(out.glob(".build/shards/*.json")))
    if workers == "1":
        assert finished == (1 if grace == "0" else 2)
    assert 1 <= finished <= 4
    assert not list(out.rglob("*.tmp"))
    assert run([*arguments, "--workers", "1"]) == 0
    settings = {**SMALL, "images_per_shard": 4}
    fd.build(photos, tmp_path / "undisturbed", teachers=[gated], batch_size=16, **settings)
    assert same_files(tmp_path / "undisturbed", out)


def test_a_request_before_the_labelling_ends_the_build_at_once(photos, tiny_teachers, tmp_path):
    stop = Stop()
    with pytest.raises(BuildStoppedError):
        stop.request()
    with pytest.raises(BuildStoppedError):
        fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], stop=stop, **SMALL)
    assert not list(tmp_path.glob("out/labels/*"))


def test_a_second_sigterm_is_not_ours():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop, stop.labelling():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and not stop.expired
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(UsageError, match="grace"):
        Stop(-1)
