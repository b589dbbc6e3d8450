"""Worker processes: they start anywhere, do the same as no workers, end with their training, and are replaced."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from label_sets import wait_until

import ferkd_data as fd
from ferkd_data.errors import LoaderError, TooManyOpenFilesError, UsageError
from ferkd_data.images import open_source
from ferkd_data.loader.channel import (
    MAPPED_BYTES,
    NOT_KEPT,
    BatchBuffers,
    Channel,
    MappedSlots,
    anonymous_file,
    channel_pair,
)
from ferkd_data.loader.processes import MAX_DEATHS, Processes
from ferkd_data.loader.workers import CropHandler, WindowTask, pickled
from ferkd_data.replay import one_thread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def make(label_set, photos, tmp_path):
    """A loader over the small label set, whose workers are ready."""

    def make_(**changes):
        settings = {"batch_size": 4, "crops_per_image": 2, "size": 32, "calibration": "fkd", "images": photos}
        loader = fd.CropLoader(fd.open_labels(label_set), **(settings | {"cache_dir": tmp_path / "cache"} | changes))
        if loader.settings.num_workers:
            loader._open_workers().wait()
        return loader

    return make_


def processes_of(loader) -> Processes:
    return loader._open_workers()._pool._processes


def pids_of(loader) -> list[int]:
    return [worker.pid for worker in processes_of(loader)._workers]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def gone(*pids: int) -> bool:
    return not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)


def contents(batches):
    return [(images.clone(), targets.dense().clone()) for images, targets in batches]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(t, u) for (x, t), (y, u) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    "changes", [{}, {"decode_device": "cpu"}, {"order": "shards"}, {"prefetch_factor": 2}, {"prefetch_factor": 4}]
)
@pytest.mark.parametrize("victim", ["worker", "all workers", "template", "helper"])
def test_what_a_killed_process_was_at_is_done_again(make, caplog, victim, changes):
    alone, loader = make(**changes), make(num_workers=2, **({"prefetch_factor": 1} | changes))
    expected = contents(alone)
    workers, batches = pids_of(loader), []
    template = parent_of(workers[0])
    helper = parent_of(template)
    kill = {"worker": workers[:1], "all workers": workers, "template": [template], "helper": [helper]}[victim]
    for number, (images, targets) in enumerate(loader):
        batches.append((images.clone(), targets.dense().clone()))
        if number == 2:
            for pid in kill:
                # In the middle of its work, or with work before it.
                os.kill(pid, signal.SIGKILL)
    assert same(batches, expected)
    assert same(contents(loader), contents(alone)), "the next epoch"
    if victim in ("worker", "all workers"):
        assert "a loader worker died (signal SIGKILL" in caplog.text and "its work is done again" in caplog.text


class Deadly:
    """Images of which one kills the process that reads it."""

    def __init__(self, folder: Path) -> None:
        self.source = open_source(folder)
        self.description, self.class_names = "deadly images", None
        self.list_images, self.read = self.source.list_images, self.source.read

    def read_one(self, ref):
        if "photo0013" in ref.file:
            os.kill(os.getpid(), signal.SIGSEGV)
        return self.source.read_one(ref)


def test_a_job_that_kills_its_workers_is_an_error(make, photos):
    loader = make(images=Deadly(photos), num_workers=2)
    with pytest.raises(LoaderError, match=r"a loader worker died \(signal SIGSEGV\), and so did the one"):
        list(loader)


def test_a_task_that_reached_no_worker_is_not_counted_as_its_death(make):
    """Several workers may be killed at once: a task of the first may then be sent to a second that is dead too."""
    processes = processes_of(make(num_workers=1))
    (worker,) = processes._workers
    # Stopped, it takes no message, and the task waits in its socket.
    os.kill(worker.pid, signal.SIGSTOP)
    processes.ask(worker, 7, None, ())
    os.kill(worker.pid, signal.SIGKILL)
    (outcome,) = processes.outcomes(10)
    assert (outcome.task, outcome.in_work) == (7, False)
    assert outcome.died.startswith("signal SIGKILL")


def test_workers_that_cannot_live_are_an_error_not_a_hang(make, monkeypatch):
    """A resource limit, or a machine without memory, ends each as soon as it is there."""
    loader = make(num_workers=1)
    processes = processes_of(loader)
    with pytest.raises(LoaderError, match=rf"the {MAX_DEATHS + 1}th in a row; with too little memory"):
        while True:
            wait_until(lambda: processes.num_ready or processes.outcomes(1))
            os.kill(pids_of(loader)[0], signal.SIGKILL)
            while processes.num_ready:
                processes.outcomes(1)
    assert len(list(make())) == 10


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_is_the_error_itself_with_its_traceback(make, num_workers):
    loader = make(num_workers=num_workers)
    shutil.rmtree(loader._maker.images.folder)
    with pytest.raises(LoaderError, match=r"is gone\. The loader or data set that made it") as caught:
        list(loader)
    if num_workers:
        assert "worker_process.py" in str(caught.value.__cause__)


@pytest.mark.parametrize("changes", [{}, {"decode_device": "cpu"}])
def test_an_error_that_is_kept_keeps_no_workers(make, photos, tmp_path, changes):
    images = shutil.copytree(photos, tmp_path / "photos")
    (images / "class3/photo0013.jpg").write_bytes(b"other")
    loader = make(images=images, num_workers=2, **changes)
    pids = pids_of(loader)
    with pytest.raises(LoaderError, match="'class3/photo0013'") as caught:
        list(loader)
    wait_until(lambda: gone(*pids))
    assert caught.value.__traceback__


def test_workers_go_with_their_loader(make):
    loader = make(num_workers=2)
    next(iter(loader))
    pids = pids_of(loader)
    pids.append(parent_of(pids[0]))
    workers = weakref.ref(loader._workers)
    gc.disable()
    try:
        del loader
        assert workers() is None
    finally:
        gc.enable()
    wait_until(lambda: gone(*pids))


def test_a_loop_left_early_disturbs_nothing(make):
    loader, expected = make(num_workers=2), contents(make())
    for stop in range(5):
        loader.set_epoch(0)
        stream = iter(loader)
        assert same(contents(next(stream) for _ in range(stop)), expected[:stop])
        del stream
    loader.set_epoch(0)
    assert same(contents(loader), expected)


def test_batches_that_are_kept_are_never_overwritten_and_need_no_descriptors(make, label_set, photos, tmp_path):
    """More of them than there are slots; each would otherwise hold a file open."""
    loader, expected = make(num_workers=2, batch_size=2, crops_per_image=1), []
    for epoch in range(3):
        alone = make(batch_size=2, crops_per_image=1)
        alone.set_epoch(epoch)
        expected += contents(alone)
    kept, before = [], len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        kept += list(loader)
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 15
    assert same(contents(kept), expected)
    del kept
    assert len(loader._workers._buffers._free) == 2 * 2 + 3


def test_slots_go_to_the_worker_that_has_them_mapped():
    buffers = BatchBuffers(keep=3, shared=True)
    slots = [buffers.take(((2, 8),), user=number) for number in (0, 1, 0)]
    extra = buffers.take(((2, 8),), user=1)
    assert extra.number == NOT_KEPT and len({slot.number for slot in slots}) == 3
    for slot in (*slots, extra):
        buffers.give_back(slot)
    assert buffers.take(((2, 8),), user=1) is slots[1]
    assert buffers.take(((2, 8),), user=0) is slots[2]
    assert buffers.take(((2, 8),), user=1) is slots[0]
    assert buffers.take(((2, 16),)).number not in {slot.number for slot in slots}
    buffers.give_back(slots[0])
    assert not buffers._free, "of a size that is no longer asked for"


def test_a_worker_keeps_a_few_megabytes_mapped():
    mapped, size = MappedSlots(), 1000
    buffers = BatchBuffers(keep=3, shared=True)
    slots = [buffers.take(((10, size),)) for _ in range(3)]
    for number, slot in enumerate(slots):
        mapped.images(slot.number, slot.descriptor, ((10, size),))[0].fill_(number)
        assert (slot.images()[0] == number).all()
    assert len(mapped._kept) == MAPPED_BYTES // (10 * size * size * 3) == 1


def test_memory_that_is_not_there():
    buffers = BatchBuffers(keep=9, shared=True)
    with pytest.raises(LoaderError, match=r"9 windows of 1000000 crops of 8192 pixels need 1,811,939,328 MB.*has"):
        buffers.take(((1_000_000, 8192),))


def test_tensors_on_a_device_are_not_sent():
    """A worker is forked from a process that has unpickled them, where CUDA then fails. Here, meta stands for CUDA."""
    transform = SimpleNamespace(mean=torch.nn.Parameter(torch.zeros(3, device="meta")))
    with pytest.raises(UsageError, match=r"cannot be sent to worker processes \(a tensor on meta\)"):
        pickled(transform)
    assert pickle.loads(pickled(SimpleNamespace(mean=torch.ones(3)))).mean.tolist() == [1, 1, 1]


def test_what_cannot_be_sent_is_an_error_that_says_so(make, photos):
    images = Deadly(photos)
    images.lock = threading.Lock()
    with pytest.raises(UsageError, match=r"cannot be sent to worker processes .*open files, locks.* num_workers=0"):
        make(images=images, num_workers=1)


class Unfindable(Deadly):
    def __reduce__(self):
        return (__import__, ("no_such_module_anywhere",))


def test_what_workers_cannot_import_is_an_error_that_says_so(make, photos):
    with pytest.raises(LoaderError, match=r"cannot take over their work: ModuleNotFoundError.*num_workers=0"):
        make(images=Unfindable(photos), num_workers=1)


def test_a_schedule_may_be_anything(make):
    by_epoch = [fd.Calibration.fkd(), fd.Calibration(extreme_hard="keep", recovery="hard", all_discarded="keep")]
    loader = make(calibration=lambda epoch: by_epoch[epoch % 2], num_workers=2)
    for epoch in (0, 1):
        alone = make(calibration=by_epoch[epoch])
        alone.set_epoch(epoch)
        assert same(contents(loader), contents(alone))


def test_threads_of_the_user_are_left_alone(make):
    """The loader works on one core, in its own process too; what the user set stays set, for all threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
            others: list[int] = []
            thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert others == [2]
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), one_thread():
            raise ZeroDivisionError
        for _ in make():
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_no_core_but_one_works_for_the_cutter(make, monkeypatch):
    """With threads, PyTorch starts some when a crop is cut; their number is what is seen here."""
    script = (
        "import os, sys, torch; torch.set_num_threads(4); import numpy as np;"
        "from ferkd_data.replay import one_thread, replay;"
        "from ferkd_data.crops import Crops;"
        "image = np.zeros((500, 500, 3), np.uint8);"
        "crops = Crops(boxes=np.array([[0, 0, 400, 400]] * 4, np.uint16), flip=np.array([True] * 4));"
        "before = len(os.listdir('/proc/self/task'))\n"
        "with one_thread():\n    replay(image, crops, size=224)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
        "replay(image, crops, size=224)\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.split() == ["0", "3"]


def test_workers_have_numbers_of_their_own_from_global_generators(make, photos):
    """As a transform may use them; they are forked from one process."""
    loader = make(images=Dice(photos), num_workers=2, prefetch_factor=1)
    with pytest.raises(RuntimeError, match="dice") as first:
        list(loader)
    loader._open_workers().wait()
    loader.set_epoch(1)
    with pytest.raises(RuntimeError, match="dice") as second:
        list(loader)
    assert str(first.value) != str(second.value)


class Dice(Deadly):
    def read_one(self, ref):
        raise RuntimeError(f"dice {np.random.random()} {torch.rand(())}")  # noqa: NPY002


ENDLESS = """
import os, sys, time
import ferkd_data as fd
labels, photos, cache = sys.argv[1:]
loader = fd.CropLoader(
    fd.open_labels(labels), images=photos, batch_size=4, crops_per_image=2, size=32, cache_dir=cache, num_workers=2
)
batches = iter(loader)
next(batches)
loader._workers.wait()
workers = [worker.pid for worker in loader._workers._pool._processes._workers]
template = int(open(f"/proc/{workers[0]}/stat").read().rpartition(")")[2].split()[1])
helper = int(open(f"/proc/{template}/stat").read().rpartition(")")[2].split()[1])
print(*workers, template, helper, flush=True)
"""
ENDS = {
    "kill -9": ("time.sleep(600)", signal.SIGKILL, -signal.SIGKILL),
    "Ctrl-C": ("time.sleep(600)", signal.SIGINT, -signal.SIGINT),
    "SIGTERM": ("time.sleep(600)", signal.SIGTERM, -signal.SIGTERM),
    "an exception": ("raise ValueError('mine')", None, 1),
    "the end of the script": ("", None, 0),
    "os._exit": ("os._exit(5)", None, 5),
    "the loader is dropped": ("del batches, loader; print('dropped', flush=True); time.sleep(600)", None, None),
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_behind(label_set, photos, tmp_path, end):
    code, number, status = ENDS[end]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-c", ENDLESS + code, *map(str, (label_set, photos, tmp_path / "cache"))]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
        start_new_session=True,
    ) as training:
        pids = [int(pid) for pid in training.stdout.readline().split()]
        assert len(pids) == 4
        if number is not None:
            # To the whole group, as a terminal does.
            os.killpg(training.pid, number)
        if status is None:
            assert training.stdout.readline() == "dropped\n"
        wait_until(lambda: gone(*pids))
        if status is None:
            training.kill()
        errors = training.stderr.read()
        assert training.wait() in (status, -signal.SIGKILL)
    assert errors.count("Traceback") <= (end in ("Ctrl-C", "an exception")), errors


def test_a_process_that_was_forked_from_a_training_starts_workers_of_its_own(make):
    loader = make(num_workers=2)
    expected, theirs = contents(make()), pids_of(loader)
    if (child := os.fork()) == 0:
        status = 1
        try:
            loader._open_workers().wait()
            status = 0 if not set(pids_of(loader)) & set(theirs) and same(contents(loader), expected) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert pids_of(loader) == theirs and same(contents(loader), expected)


def test_a_forked_process_and_its_parent_write_into_memory_of_their_own(make):
    """A notebook trains an epoch, and then a launcher forks: both go on with the loader."""
    loader, expected = make(num_workers=1), contents(make())
    assert same(contents(loader), expected)

    def kept_slowly(epoch):
        """Whether no batch changes while the other process is at its own."""
        loader.set_epoch(epoch)
        kept = []
        for images, _ in loader:
            kept.append((images, images.clone()))
            time.sleep(0.05)
        return len(kept) == 10 and all(torch.equal(*both) for both in kept)

    if (child := os.fork()) == 0:
        status = 1
        try:
            loader._open_workers().wait()
            status = 0 if kept_slowly(1) and kept_slowly(2) else 2
        finally:
            os._exit(status)
    ended = (0, 0)
    while ended == (0, 0):
        assert kept_slowly(3)
        ended = os.waitpid(child, os.WNOHANG)
    assert ended[1] == 0


def test_an_iteration_does_not_go_on_in_a_forked_process(make):
    stream = iter(make(num_workers=1))
    next(stream)
    if (child := os.fork()) == 0:
        status = 1
        try:
            next(stream)
        except LoaderError as error:
            status = 0 if "begun before a fork" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(stream)) == 9


def test_lost_descriptors_are_an_error_that_names_the_limit():
    ours, theirs = channel_pair()
    with contextlib.closing(ours), theirs:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        descriptor = anonymous_file(1)
        ours.send("task", [descriptor])
        other = Channel(theirs)
        # As many as are open, and no more: the system drops what is above, without an error.
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor + 1, limits[1]))
        try:
            taken = []
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(descriptor))
            message, descriptors = other.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for each in (*taken, descriptor):
                os.close(each)
    assert (message, descriptors) == ("task", [])
    with pytest.raises(TooManyOpenFilesError, match=r"memory for crops: .* as many files open as it may .*ulimit -n"):
        CropHandler(SimpleNamespace(learn=lambda *_: None))(WindowTask(SimpleNamespace(epoch=0), None), descriptors)


def test_few_descriptors(make):
    """Ten workers under a limit that people really have leave most of it alone."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    loader = make(num_workers=10, batch_size=2)
    list(loader)
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 3 * 10 + 10
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 256
    started = time.monotonic()
    del loader
    assert time.monotonic() - started < 30
