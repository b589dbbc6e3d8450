"""Folders for a running process: gone with it, and with the next process where it was killed."""

from __future__ import annotations

import fcntl
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from ferkd_data import scratch
from ferkd_data.scratch import Scratch

HOLD = """
import sys, time
from ferkd_data.scratch import Scratch

held = Scratch("test")
(held.path / "below").mkdir()
(held.path / "below/file").write_text("content")
print(held.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The temporary folder of this process and of those that it starts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@contextmanager
def holder():
    """A process that has a scratch folder, and the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_goes_with_its_object(temporary):
    held = Scratch("test")
    assert held.path.parent == temporary
    (held.path / "file").write_text("content")
    del held
    gc.collect()
    assert names(temporary) == []
    removed = Scratch("test")
    removed.remove()
    removed.remove()
    assert names(temporary) == []


def test_what_a_killed_process_left_goes_with_the_next(temporary):
    with holder() as (_, theirs), holder() as (killed, left):
        mine = Scratch("test")
        assert names(temporary) == sorted([theirs.name, left.name, mine.path.name])
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert (left / "below/file").exists()
        another = Scratch("other")
        assert names(temporary) == sorted([theirs.name, mine.path.name, another.path.name])


def test_a_forked_process_removes_nothing(temporary):
    held = Scratch("test")
    child = os.fork()
    if child == 0:
        try:
            held.remove()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert held.path.is_dir()


def test_folders_of_others_and_links_stay(temporary, monkeypatch):
    elsewhere = temporary.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (temporary / "ferkd-data-images-old").mkdir()
    with monkeypatch.context() as another_host:
        another_host.setattr("socket.gethostname", lambda: "another")
        prefix = f"{scratch.PREFIX}test-{scratch._host()}-"
    (temporary / f"{prefix}x").mkdir()
    link = temporary / f"{scratch.PREFIX}test-{scratch._host()}-link"
    link.symlink_to(elsewhere)
    before = names(temporary)
    Scratch("test").remove()
    assert names(temporary) == before
    assert (elsewhere / "file").exists()


def test_a_folder_without_its_lock_yet(temporary):
    """Its owner was killed before it made the lock; but what has content and no lock is not known to be left behind."""
    empty, full = (temporary / f"{scratch.PREFIX}test-{scratch._host()}-{name}" for name in ("empty", "full"))
    empty.mkdir()
    full.mkdir()
    (full / "file").touch()
    Scratch("test").remove()
    assert names(temporary) == [full.name]


def test_a_folder_swept_while_it_is_made_is_made_again(temporary, monkeypatch):
    """A sweep between each two steps of the making."""
    for step in (os, "open"), (fcntl, "flock"):
        module, name = step
        real, first = getattr(module, name), threading.Event()

        def swept(*arguments, real=real, first=first):
            if not first.is_set():
                first.set()
                scratch._sweep()
            return real(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(module, name, swept)
            held = Scratch("test")
        assert first.is_set()
        assert (held.path / scratch.LOCK_NAME).exists()
        held.remove()
        assert names(temporary) == []


def test_many_processes_make_and_sweep_at_once(temporary):
    code = """
from ferkd_data.scratch import Scratch
for number in range(100):
    scratch = Scratch("test")
    (scratch.path / "file").write_text(str(number))
    assert (scratch.path / "file").read_text() == str(number)
    scratch.remove()
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert names(temporary) == []


def test_a_file_system_without_locks(temporary, monkeypatch):
    def no_locks(*arguments):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first, second = Scratch("test"), Scratch("test")
    assert first.path.is_dir()
    second.remove()
    assert first.path.is_dir()


def test_it_belongs_to_one_process():
    held = Scratch("test")
    with pytest.raises(TypeError, match="pickle its path"):
        pickle.dumps(held)
