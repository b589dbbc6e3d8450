"""Workers start wherever people train: the same program, with all it needs defined in it, in each of these places."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = """
import hashlib, os
import torch
import ferkd_data as fd
"""
FUNCTIONS = """
def schedule(epoch):
    return fd.Calibration.fkd()
"""
CLASS = """
class Brighter:
    def __call__(self, crop):
        return crop // 2 + torch.randint(0, 99, (), dtype=torch.uint8)
"""
LOADER = """
labels, photos, cache = (os.environ[name] for name in ("LABELS", "PHOTOS", "CACHE"))
settings = dict(images=photos, batch_size=8, crops_per_image=2, size=512, cache_dir=cache)
workers = int(os.environ.get("WORKERS", "2"))
settings |= dict(num_workers=workers, calibration=schedule, transform=Brighter())
loader = fd.CropLoader(fd.open_labels(labels), **settings)
if loader.settings.num_workers: loader._open_workers().wait()
"""
DIGEST = """
batches = [images.numpy().tobytes() + targets.dense().numpy().tobytes() for images, targets in loader]
print("digest", len(batches), hashlib.sha256(b"".join(batches)).hexdigest(), flush=True)
"""
PROGRAM = SETUP + FUNCTIONS + CLASS + LOADER + DIGEST
"""No guard around anything, and two statements on no line, so that it can be pasted piece by piece."""


@pytest.fixture
def environment(label_set, photos, tmp_path):
    return os.environ | {"LABELS": str(label_set), "PHOTOS": str(photos), "CACHE": str(tmp_path / "cache")}


@pytest.fixture
def run(environment, tmp_path):
    """Runs a command; gives the digests that it printed."""

    def run_(*command, text=None, **more):
        found = subprocess.run(
            [sys.executable, *map(str, command)],
            input=text,
            capture_output=True,
            text=True,
            timeout=600,
            env=environment | more,
            cwd=tmp_path,
        )
        assert found.returncode == 0, found.stderr
        assert "Traceback" not in found.stderr, found.stderr
        return digests(found.stdout)

    return run_


@pytest.fixture
def expected(run):
    (digest,) = run("-c", PROGRAM, WORKERS="0")
    assert digest[0] == "5"
    return [digest]


def digests(text):
    return re.findall(r"digest (\d+) ([0-9a-f]{64})", text)


def test_a_script_without_a_guard(run, expected, tmp_path):
    (tmp_path / "script.py").write_text(PROGRAM)
    assert run("script.py") == expected


def test_a_script_that_imports_what_lies_beside_it(run, expected, tmp_path):
    """The folder of the script is on the workers' path too."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/own.py").write_text(SETUP + FUNCTIONS + CLASS)
    (tmp_path / "beside/script.py").write_text("from own import *\n" + SETUP + LOADER + DIGEST)
    assert run("beside/script.py") == expected


def test_a_module(run, expected, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").touch()
    (tmp_path / "package/train.py").write_text(PROGRAM)
    assert run("-m", "package.train") == expected


def test_an_argument(run, expected):
    assert run("-c", PROGRAM) == expected


def test_standard_input(run, expected):
    assert run("-", text=PROGRAM) == expected
    assert run(text=PROGRAM) == expected


def test_everything_inside_a_function(run, expected):
    """Nothing of it can be imported from anywhere."""
    body = "".join(f"    {line}\n" for line in PROGRAM.splitlines())
    assert run("-c", f"def main():\n{body}\nmain()") == expected


def test_a_prompt(environment, expected, tmp_path):
    """Typed or pasted into Python's prompt, on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-q"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"PYTHON_BASIC_REPL": "1", "TERM": "dumb"},
        cwd=tmp_path,
        start_new_session=True,
    )
    os.close(theirs)
    shown = ""
    for line in (*PROGRAM.replace("\n\n", "\n").splitlines(), "", "exit()"):
        blank = "\n" if line.startswith(("labels", "class", "batches")) else ""
        os.write(ours, f"{blank}{line}\n".encode())
    while True:
        try:
            shown += os.read(ours, 65536).decode(errors="replace")
        except OSError:
            break
    os.close(ours)
    assert process.wait() == 0
    assert digests(shown) == expected, shown


NOTEBOOK = """
import json, sys
import nbformat
from nbclient import NotebookClient
cells = [nbformat.v4.new_code_cell(text) for text in json.loads(sys.argv[1])]
notebook = nbformat.v4.new_notebook(cells=cells)
NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
for cell in cells:
    for output in cell.outputs:
        print(output.get("text", ""))
"""


def test_a_notebook(run, expected):
    """Schedule and transform in cells of their own; a second loader after the first; and a cell that runs again."""
    cells = [SETUP, FUNCTIONS, CLASS, LOADER, DIGEST, LOADER + DIGEST]
    assert run("-W", "ignore", "-c", NOTEBOOK, json.dumps(cells)) == expected * 2


RANKS = """
import torch.distributed as dist
dist.init_process_group("gloo")
"""


def test_torchrun(run, tmp_path):
    (tmp_path / "script.py").write_text(SETUP + RANKS + FUNCTIONS + CLASS + LOADER + DIGEST)
    found = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py")
    assert [count for count, _ in found] == ["2", "2"]
    assert found[0] != found[1], "each rank has crops of its own"


THREADS = """
import threading, time
ended = threading.Event()
def busy():
    while not ended.is_set():
        torch.ones(100, 100) @ torch.ones(100, 100)
        time.sleep(0.001)

torch.set_num_threads(2)
threads = [threading.Thread(target=busy) for _ in range(4)]
for thread in threads: thread.start()
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
if torch.cuda.is_available(): torch.ones(3, device="cuda").sum().item()
"""


def test_a_process_with_threads(run, expected):
    """Which have used PyTorch, and a GPU where there is one."""
    # Joined: a thread that is in PyTorch when Python ends may abort the process.
    end = "\nended.set()\nfor thread in threads: thread.join()\n"
    assert run("-c", SETUP + THREADS + FUNCTIONS + CLASS + LOADER + DIGEST + end) == expected


def test_a_thread_of_its_own(run, expected):
    body = "".join(f"    {line}\n" for line in (LOADER + DIGEST).splitlines())
    program = SETUP + FUNCTIONS + CLASS + f"def train():\n{body}\n"
    program += "import threading\nthread = threading.Thread(target=train)\nthread.start()\nthread.join()\n"
    assert run("-c", program) == expected


def test_warnings_that_are_errors(run, expected):
    assert run("-W", "error", "-c", PROGRAM) == expected


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/usr/bin/unshare").exists(), reason="mounting needs root")
def test_hardly_any_shared_memory(environment, expected):
    """A container's default is 64 MB; here there is one, where a batch alone has six."""
    mount = "mount -t tmpfs -o size=1m none /dev/shm && exec "
    command = ["unshare", "--mount", "sh", "-c", mount + '"$0" -c "$1"', sys.executable, PROGRAM]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if "permission denied" in found.stderr.lower():
        pytest.skip("mounting is not allowed here")
    assert digests(found.stdout) == expected, found.stderr
