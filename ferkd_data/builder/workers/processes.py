"""The workers of one machine: processes, each with a pipe to the driver."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from ferkd_data.builder.job import Job
from ferkd_data.builder.workers.labeller import Labeller
from ferkd_data.builder.workers.messages import Message, Ready, WorkerLostError


class WorkerProcess:
    def __init__(self, number: int, device: str, process: SpawnProcess, connection: Connection) -> None:
        self.number = number
        self.device = device
        self.process = process
        self.connection = connection

    def __str__(self) -> str:
        return f"worker {self.number} ({self.device}, process {self.process.pid})"

    def place(self, ready: Ready) -> str:
        return self.device

    def label(self, shard: int) -> None:
        self._send(shard)

    def settle(self) -> None:
        self._send(None)

    def hear(self) -> Message:
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError) as error:
            self.end(1)
            raise WorkerLostError(_how(self.process.exitcode)) from error
        return message

    def leave(self) -> None:
        self.connection.close()

    def end(self, patience_seconds: float) -> None:
        if self.process.pid is not None:  # else it was never born
            self.process.join(patience_seconds)
            self.process.kill()
            # A process that hangs in a driver call of the system may not even die.
            self.process.join(1)
        self.connection.close()

    def _send(self, shard: int | None) -> None:
        with contextlib.suppress(OSError):  # it died while it was idle; its connection will say so
            self.connection.send(shard)


class WorkerProcesses:
    """One for each of `devices`."""

    when_none_gets_ready = "try --processes 1 (in a script of your own, build under `if __name__ == '__main__':`)"

    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        self.job = job
        self.devices = devices

    def room(self) -> int:
        return len(self.devices)

    def start(self, number: int) -> WorkerProcess:
        return start_process(number, self.devices[number], work, self.job)

    def with_news(self, workers: Sequence[WorkerProcess], seconds: float) -> list[WorkerProcess]:
        spoke = wait([worker.connection for worker in workers], timeout=seconds)
        return [worker for worker in workers if worker.connection in spoke]


def start_process(number: int, device: str, target: Callable[..., None], job: Job, *arguments: Any) -> WorkerProcess:
    """A process that runs `target` with its end of the pipe, the job, the device, and the arguments."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, job, device, *arguments), daemon=True)
    # It died while it was born; its connection will say so.
    with _interrupts_held(), contextlib.suppress(BrokenPipeError):
        process.start()
    theirs.close()
    return WorkerProcess(number, device, process, ours)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """A process that is started inside never gets a Ctrl-C: it would print where in its imports that met it."""
    resource_tracker.ensure_running()  # its start would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(driver: Connection, job: Job, device: str) -> None:
    """What such a process does. Returns when the driver has no more for it, or is gone."""
    # A batch system, and Ctrl-C, signal all processes of a job; the driver decides what the signal means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    labeller = Labeller(job, device)
    with contextlib.suppress(EOFError, OSError):
        driver.send(labeller.open())
        while True:
            shard = driver.recv()
            for message in labeller.settle() if shard is None else labeller.label(shard):
                driver.send(message)


def _end_with_the_driver() -> None:
    """A driver that was killed says nothing, and what runs on without it would disturb the next."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _how(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with status {exitcode}"
    return f"killed by {signal.Signals(-exitcode).name}"
