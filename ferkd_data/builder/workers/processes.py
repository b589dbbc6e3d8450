"""Workers of this machine: processes, each with a pipe to the driver."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeAlias

from ferkd_data.builder.labelling.job import Job
from ferkd_data.builder.workers.labeller import Labeller
from ferkd_data.builder.workers.messages import Message, Ready, WorkerLostError
from ferkd_data.images import ImageRef

Task: TypeAlias = int | Sequence[ImageRef] | None
"""Through the pipe to a worker: a shard to label, None to settle, images to measure."""


class WorkerProcess:
    """A worker process, and the driver's end of the pipe to it."""

    def __init__(self, number: int, device: str, process: SpawnProcess, connection: Connection) -> None:
        self.number = number
        self.device = device
        self.process = process
        self.connection = connection

    def __str__(self) -> str:
        return f"worker {self.number} ({self.device}, process {self.process.pid})"

    def location(self, ready: Ready) -> str:
        return self.device

    def label(self, shard: int) -> None:
        self._send(shard)

    def settle(self) -> None:
        self._send(None)

    def measure(self, refs: Sequence[ImageRef]) -> None:
        self._send(refs)

    def receive(self) -> Message:
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError) as error:
            self.end(1)
            raise WorkerLostError(_how(self.process.exitcode)) from error
        return message

    def leave(self) -> None:
        self.connection.close()

    def end(self, wait_seconds: float) -> None:
        if self.process.pid is not None:  # else it was never started
            self.process.join(wait_seconds)
            self.process.kill()
            # A process that hangs in a system call may not even die of SIGKILL, so the wait is limited.
            self.process.join(1)
        self.connection.close()

    def _send(self, task: Task) -> None:
        with contextlib.suppress(OSError):  # it died while it was idle, which `hear` finds out
            self.connection.send(task)


class WorkerProcesses:
    """A worker process for each of `devices`."""

    when_none_gets_ready = "try --workers 1 (in a script of your own, build under `if __name__ == '__main__':`)"

    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        self.job = job
        self.devices = devices

    def room(self) -> int:
        return len(self.devices)

    def start(self, number: int) -> WorkerProcess:
        # Not fork: CUDA and the threads of PyTorch do not survive it.
        context = multiprocessing.get_context("spawn")
        device = self.devices[number]
        ours, theirs = context.Pipe()
        # A daemon, so that multiprocessing ends it where the driver ends without closing the pool.
        process = context.Process(target=work, args=(theirs, self.job, device), daemon=True)
        # A process that died while it was started shows on its pipe.
        with _interrupts_held(), contextlib.suppress(BrokenPipeError):
            process.start()
        # With the worker alone holding its end, the pipe closes when the worker dies.
        theirs.close()
        return WorkerProcess(number, device, process, ours)

    def with_messages(self, workers: Sequence[WorkerProcess], seconds: float) -> list[WorkerProcess]:
        ready = wait([worker.connection for worker in workers], timeout=seconds)
        return [worker for worker in workers if worker.connection in ready]


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT and SIGHUP for processes that are started inside: they would print a traceback of their imports."""
    resource_tracker.ensure_running()  # its start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(driver: Connection, job: Job, device: str) -> None:
    """Run a worker process: answer the driver until it closes the pipe or is gone."""
    # A batch system, and Ctrl-C, signal all processes of a job. The driver decides what the signal means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    labeller = Labeller(job, device)
    with contextlib.suppress(EOFError, OSError):
        driver.send(labeller.open())
        while True:
            for message in _answer(labeller, driver.recv()):
                driver.send(message)


def _answer(labeller: Labeller, task: Task) -> Iterator[Message]:
    if task is None:
        return labeller.settle()
    if isinstance(task, int):
        return labeller.label(task)
    return labeller.measure(task, labeller.device)


def _end_with_the_driver() -> None:
    """Wait, in a daemon thread, for the driver to end, and end this process with it.

    A driver that was killed closes nothing in time, and a worker that runs on would disturb the next build.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _how(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with status {exitcode}"
    return f"killed by {signal.Signals(-exitcode).name}"
