"""Many worker processes: deaths, errors, and what is left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from label_sets import SMALL, TEACHER_MODULES, build_with_two, same_files, wait_until

import ferkd_data as fd
from ferkd_data.builder import Resources
from ferkd_data.builder.watch.events import WorkerStarted
from ferkd_data.builder.workers.labeller import Labeller
from ferkd_data.builder.workers.messages import Computed, Failed, Labelled, WorkerLostError
from ferkd_data.builder.workers.processes import WorkerProcess, WorkerProcesses
from ferkd_data.errors import BuildError, DeviceFailedError, TeacherError, UsageError
from ferkd_data.teachers import load_teachers


@pytest.fixture
def deadly(tiny_teachers, tmp_path, monkeypatch):
    """The spec's beginning; `python:deadly_teachers:` and a factory."""
    folder = tmp_path / "modules"
    folder.mkdir()
    shutil.copy(TEACHER_MODULES / "deadly_teachers.py", folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("FERKD_DRIVER", str(os.getpid()))
    (tmp_path / "lives").mkdir()
    yield "python:deadly_teachers:"
    sys.modules.pop("deadly_teachers", None)


def take_lives(tmp_path: Path, count: int) -> None:
    for number in range(count):
        (tmp_path / "lives" / str(number)).touch()


def test_killed_workers_are_replaced_and_the_result_is_undisturbed(photos, deadly, tmp_path):
    fd.build(photos, tmp_path / "undisturbed", teachers=[deadly + "deadly"], **SMALL)
    take_lives(tmp_path, 2)
    fd.build(photos, tmp_path / "out", teachers=[deadly + "deadly"], workers=2, **SMALL)
    assert not list((tmp_path / "lives").iterdir())
    assert same_files(tmp_path / "undisturbed", tmp_path / "out")


@pytest.mark.usefixtures("quick_workers")
def test_a_worker_whose_gpu_fails_is_replaced_like_one_that_died(photos, deadly, tmp_path):
    fd.build(photos, tmp_path / "undisturbed", teachers=[deadly + "on_broken_gpu"], **SMALL)
    take_lives(tmp_path, 2)
    said = []
    watcher = mock.Mock(see=lambda event: said.append(str(event)))
    out = tmp_path / "out"
    fd.build(photos, out, teachers=[deadly + "on_broken_gpu"], workers=2, watchers=[watcher], **SMALL)
    assert not list((tmp_path / "lives").iterdir())
    deaths = [text for text in said if "ended, since device cpu failed" in text]
    assert len(deaths) == 2 and "(CUDA error: unspecified launch failure)" in deaths[0]
    assert same_files(tmp_path / "undisturbed", out)


@pytest.mark.usefixtures("quick_workers")
def test_a_gpu_that_fails_each_time_ends_the_build(photos, deadly, tmp_path):
    take_lives(tmp_path, 100)
    with pytest.raises(BuildError, match=r"shard \d: 3 workers died while .* ended, since device cpu failed .*CUDA"):
        fd.build(photos, tmp_path / "out", teachers=[deadly + "on_broken_gpu"], workers=2, **SMALL)
    # A single worker in this process, which cannot be replaced.
    with pytest.raises(DeviceFailedError, match=r"^device cpu failed .*\(CUDA error: unspecified launch failure\);"):
        fd.build(photos, tmp_path / "here", teachers=[deadly + "on_broken_gpu"], **SMALL)


@pytest.mark.usefixtures("quick_workers")
def test_the_driver_keeps_no_teachers_of_its_own(photos, tiny_teachers, tmp_path, monkeypatch):
    """On a GPU they would take memory beside the first worker's."""
    loaded, alive = [], []

    def load_and_note(*arguments, **options):
        teachers = load_teachers(*arguments, **options)
        loaded.extend(map(weakref.ref, teachers))
        return teachers

    class Watcher:
        def see(self, event):
            if isinstance(event, WorkerStarted):
                gc.collect()
                alive.extend(teacher() for teacher in loaded if teacher() is not None)

    monkeypatch.setattr("ferkd_data.builder.prepare.load_teachers", load_and_note)
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], workers=2, watchers=[Watcher()], **SMALL)
    assert loaded and not alive


@pytest.mark.usefixtures("quick_workers")
def test_a_shard_that_kills_every_worker_ends_the_build_and_resumes(photos, deadly, tmp_path):
    take_lives(tmp_path, 100)
    with pytest.raises(BuildError, match=r"shard \d: 3 workers died while .* killed by SIGKILL; .*--workers"):
        fd.build(photos, tmp_path / "out", teachers=[deadly + "deadly"], workers=2, **SMALL)
    for life in (tmp_path / "lives").iterdir():
        life.unlink()
    fd.build(photos, tmp_path / "out", teachers=[deadly + "deadly"], **SMALL)
    fd.build(photos, tmp_path / "undisturbed", teachers=[deadly + "deadly"], **SMALL)
    assert same_files(tmp_path / "undisturbed", tmp_path / "out")


@pytest.mark.usefixtures("quick_workers")
def test_workers_that_never_start_end_the_build(photos, deadly, tmp_path):
    with pytest.raises(
        BuildError,
        match=r"worker \d .*: died 3 times in a row before it was ready, the last time killed by SIGKILL; try",
    ):
        fd.build(photos, tmp_path / "out", teachers=[deadly + "unborn"], workers=2, **SMALL)


@pytest.mark.usefixtures("quick_workers")
def test_a_workers_error_is_the_builds_error(photos, deadly, tmp_path):
    with pytest.raises(TeacherError, match="deadly_teachers:late gave NaN") as raised:
        fd.build(photos, tmp_path / "a", teachers=[deadly + "late"], workers=2, **SMALL)
    assert "worker" in str(raised.value.__cause__) and "raise_if_wrong" in str(raised.value.__cause__)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:0,cuda:0", "names a device twice"),
        ("cuda,cuda:0", "names a device twice"),
        ("cuda:1,cuda:01", "names a device twice"),
        ("cpu,cuda:0", "cpu beside others"),
        ("cuda:x", "must be auto, cpu"),
        ("gpu", "must be auto, cpu"),
        ("0,1", "must be auto, cpu"),
    ],
)
def test_devices_that_make_no_sense(device, message):
    with pytest.raises(UsageError, match=message):
        Resources(device=device).resolved_devices()


def test_devices_of_a_machine_with_four_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    several = {"cuda:0,cuda:1": [0, 1], "cuda:0,2,3": [0, 2, 3], "all": [0, 1, 2, 3], "cuda:3": [3]}
    for text, numbers in several.items():
        assert Resources(device=text).resolved_devices() == [f"cuda:{number}" for number in numbers]
    assert Resources(device="auto").resolved_devices() == ["cuda"]
    assert Resources(device="cuda:0,1", workers=2).resolved_devices() == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert Resources(device="all", workers=2).resolved_devices() == [f"cuda:{n}" for n in (0, 1, 2, 3, 0, 1, 2, 3)]
    with pytest.raises(UsageError, match="cuda:4: this machine has 4 GPUs"):
        Resources(device="cuda:0,4").resolved_devices()


def test_cores_are_shared_among_the_processes(monkeypatch):
    monkeypatch.setattr("ferkd_data.builder.settings.cores", lambda: 16)
    one = Resources(device="cpu").local_worker()
    assert (one.compute_threads, one.threads) == (16, 8)
    four = Resources(device="cpu", workers=4).local_worker()
    assert (four.compute_threads, four.threads) == (4, 2)
    assert Resources(device="cpu", workers=40).local_worker().compute_threads == 1


def test_workers_end_with_a_driver_that_is_killed(photos, deadly, tiny_teachers, tmp_path, quick_process):
    """Also while a teacher is busy, long before they would notice that nobody listens."""
    out, lives = tmp_path / "out", tmp_path / "lives"
    driver = quick_process.Process(target=build_with_two, args=(photos, out, deadly + "slow"))
    driver.start()
    wait_until(lambda: len(list(lives.iterdir())) == 2)
    workers = [int(path.name.removeprefix("asleep-")) for path in lives.iterdir()]
    os.kill(driver.pid, signal.SIGKILL)
    driver.join()
    wait_until(lambda: not any(is_alive(pid) for pid in workers))
    fd.build(photos, out, teachers=[tiny_teachers], **SMALL)
    fd.build(photos, tmp_path / "undisturbed", teachers=[tiny_teachers], **SMALL)
    assert same_files(tmp_path / "undisturbed", out)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").exists()


def test_a_teacher_that_hangs_is_named_with_its_shard(photos, deadly, tmp_path):
    """Ten minutes, were it not for the limit."""
    with pytest.raises(TeacherError, match=r"_teachers:slow: no answer for a batch of shard 0 within 2 seconds"):
        fd.build(photos, tmp_path / "out", teachers=[deadly + "slow"], teacher_timeout=2, **SMALL)
    (sleeper,) = (int(path.name.removeprefix("asleep-")) for path in (tmp_path / "lives").iterdir())
    assert sleeper != os.getpid() and not is_alive(sleeper)


def test_a_teacher_that_stops_its_whole_process(photos, deadly, tmp_path, monkeypatch):
    monkeypatch.setattr("ferkd_data.builder.workers.pool.SILENT_SECONDS", 2)
    with pytest.raises(TeacherError, match=r"shard 0: a teacher hangs, and worker 0 .* longer than 1 seconds"):
        fd.build(photos, tmp_path / "out", teachers=[deadly + "frozen"], teacher_timeout=1, **SMALL)


@pytest.mark.usefixtures("quick_workers")
def test_a_time_limit_changes_nothing_else(photos, tiny_teachers, tmp_path, label_set):
    teachers = [tiny_teachers, "python:ferkd_tiny_teachers:second"]
    fd.build(photos, tmp_path / "out", teachers=teachers, teacher_timeout=60, **SMALL)
    assert same_files(label_set, tmp_path / "out")
    with pytest.raises(UsageError, match="teacher_timeout"):
        fd.build(photos, tmp_path / "out", teachers=teachers, teacher_timeout=0, **SMALL)


def test_ctrl_c_does_not_reach_a_worker_that_is_still_being_loaded(job, capfd):
    """It comes to all processes of a terminal, and Python would print a traceback for each."""
    workers = WorkerProcesses(job, ["cpu"])
    worker = workers.start(0)
    while not workers.with_messages([worker], 0.02):
        os.kill(worker.process.pid, signal.SIGINT)
    assert isinstance(worker.receive(), Failed)  # there is nothing to build: it lives, and says so
    worker.leave()
    worker.end(30)
    assert "Traceback" not in capfd.readouterr().err
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_worker_that_dies_before_it_can_be_started_is_lost():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    theirs.close()
    with pytest.raises(WorkerLostError):
        WorkerProcess(0, "cpu", context.Process(), ours).receive()


def test_a_shard_does_not_begin_with_the_rejects_of_the_one_before(job, monkeypatch):
    """Its worker may say that it lives before it has got to the new one."""
    monkeypatch.setattr("ferkd_data.builder.workers.labeller.REPORT_SECONDS", 0.01)
    job = replace(job, resources=replace(job.resources, teacher_timeout=60))
    labeller, told = Labeller(job, "cpu"), threading.Event()
    labeller.watch.labelled(0, 3)
    busy = mock.Mock(label=lambda *_: told.wait(30))
    monkeypatch.setattr(labeller, "_behind", busy, raising=False)
    messages = labeller.label(1)
    assert next(messages) == Labelled(0, 0)
    told.set()
    assert list(messages)[-1] == Computed()
