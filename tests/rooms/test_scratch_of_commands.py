"""Commands that are killed leave nothing in the temporary folder for good: the next process removes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from ferkd_data.scratch import Scratch

DIE = """
import os, signal, sys
from pathlib import Path

import ferkd_data as fd
from ferkd_data.bench import bench_teachers
from ferkd_data.builder import dry_run
from ferkd_data.builder.labelling import measuring
from ferkd_data.scratch import Scratch

enter, seen = Scratch.__enter__, 0
use, labels, photos, teacher, folder = sys.argv[1:]
folder = Path(folder)


def die(scratch):
    "At the first folder, or at the second where a command has two."
    global seen
    path = enter(scratch)
    (path / "below").mkdir()
    (path / "below/file").write_text("content")
    seen += 1
    if seen == (2 if use == "dry run, at its end" else 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return path


def signed():
    (folder / "signers").write_text("a@b ssh-ed25519 AAAA")
    (Path(labels) / "manifest.json.sig").write_text("no signature")
    fd.verify(labels, signed_by=folder / "signers")


Scratch.__enter__ = die
measuring.MEASURE_SECONDS = 0.01
card = fd.CardFields(name="x", license="mit", author="a")
build = {"teachers": [teacher], "device": "cpu", "crops": 2, "top_k": 3, "threads": 1}
{
    "bench": lambda: bench_teachers([teacher], compiled=False, seconds=0.01),
    "dry run": lambda: dry_run(photos, **build),
    "dry run, at its end": lambda: dry_run(photos, **build),
    "publish": lambda: fd.publish(labels, str(folder / "public"), card=card),
    "signature": signed,
    "import": lambda: fd.import_relabel(folder, folder / "out", images=photos, num_classes=10),
}[use]()
"""
USES = {
    "bench": ["bench"],
    "dry run": ["dry-run"],
    "dry run, at its end": ["dry-run", "dry-run"],
    "publish": ["publish"],
    "signature": ["signature"],
    "import": ["import"],
}
"""By name: the kinds of folders that a kill leaves."""


@pytest.mark.parametrize("use", USES)
def test_a_killed_command(copy, photos, tiny_teachers, tmp_path, monkeypatch, use):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    command = [sys.executable, "-c", DIE, use, copy, photos, tiny_teachers, tmp_path]
    killed = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(temporary)}
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(path.name.split("-", 2)[2].rpartition("-")[0].rpartition("-")[0] for path in temporary.iterdir())
    assert left == USES[use]
    Scratch("test").remove()
    assert list(temporary.iterdir()) == []
