"""Hand jobs out to worker processes ahead of time, and give their results back in order.

Nothing here knows what a job is (`workers.py`, `device_decode.py`). A job whose worker dies is done again. Until the
first worker is ready, a second or more after the start, jobs are done in this process, so that the first batch comes as
early as without workers. A job's result does not depend on who does it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from ferkd_data.errors import LoaderError
from ferkd_data.loader.processes import Outcome, Processes
from ferkd_data.loader.worker_process import Raised

ATTEMPTS = 2
"""Times that a job is tried when the worker at it dies."""


@dataclass(eq=False)
class Job:
    """A piece of work for a worker or this process. Subclasses add what their users need to know of it."""

    def task(self, worker: int) -> tuple[Any, tuple[int, ...]]:
        """Return the message for a worker, which must be picklable, and the descriptors that go with it."""
        raise NotImplementedError

    result: Any = None
    received: tuple[int, ...] = ()
    """Descriptors that came with the result; whoever takes the job closes them."""
    by_worker: bool = False
    """Whether a worker did it."""
    send_seconds: float = 0.0
    """CPU time that its worker took to send a result, measured at the worker's job before this one."""
    asked: bool = False
    """Whether it was sent to a worker; stays True when it is done."""
    done: bool = False
    wanted: bool = True
    """False when the iteration that it was for is over."""
    deaths: int = 0
    """Number of workers that died at it."""


J = TypeVar("J", bound=Job)


class Pool(Generic[J]):
    """`num_workers` processes, each with up to `ahead` jobs in its queue.

    Used by one thread at a time, of the process that made it.
    """

    def __init__(self, payload: Callable[[], bytes], num_workers: int, ahead: int, drop: Callable[[J], None]) -> None:
        """`payload` pickles the work when workers are started. `drop` gets the jobs that nobody takes, once no process
        is at them any more; those that were under way at an `end` are not among them.
        """
        self._payload, self._num_workers, self._ahead, self._drop = payload, num_workers, ahead, drop
        self._processes: Processes | None = None
        self._count = 0
        self._under_way: dict[int, J] = {}

    def run(self, jobs: Iterator[J], here: Callable[[J], Any]) -> Iterator[J]:
        """Yield the jobs in order, each with its result; `here` does one in this process.

        What a worker raised is raised here. Raises LoaderError when workers die again and again.
        """
        # Workers finish what an earlier iteration asked of them; its results are received and dropped (`_hear`).
        self._forget_others()
        waiting: deque[J] = deque()
        try:
            while self._fill(waiting, jobs):
                job = waiting[0]
                self._wait_for(job, waiting, here)
                # Raised in the order of the jobs, and so at the same batch whatever the number of workers.
                if isinstance(job.result, Raised):
                    raise _error_of(job.result)
                yield waiting.popleft()
        # A loop that leaves early: the workers stay for the next epoch.
        except GeneratorExit:
            raise
        except BaseException:
            # Also Ctrl-C, which may have come in the middle of a message.
            self.end()
            raise
        finally:
            self._leave(waiting)

    def _fill(self, waiting: deque[J], jobs: Iterator[J]) -> bool:
        """Send as many jobs as the ready workers may have. Returns whether there is anything left to wait for."""
        processes = self._started()
        # Ready workers only: what is asked of one that is starting would wait, while this process could do it.
        room = processes.num_ready * self._ahead if processes else 0
        # One at least, done in this process where no worker is ready. More may be waiting than there is room for, while
        # a worker that died is being replaced.
        waiting.extend(islice(jobs, max(max(room, 1) - len(waiting), 0)))
        self._ask(waiting)
        return bool(waiting)

    def _ask(self, waiting: deque[J]) -> None:
        for job in waiting:
            if not job.asked and not job.done and self._processes is not None:
                worker = self._processes.idle(self._ahead)
                if worker is None:
                    return
                job.asked = True
                # Entered before it is sent, so that a worker that dies at once finds its job here.
                self._under_way[self._count] = job
                self._processes.ask(worker, self._count, *job.task(worker.number))
                self._count += 1

    def _wait_for(self, job: J, waiting: deque[J], here: Callable[[J], Any]) -> None:
        while not job.done:
            # Not while a worker is ready: this process is the training's, and has its own work.
            if self._processes is None or (not job.asked and not self._processes.num_ready):
                job.result, job.done = here(job), True
            else:
                self._hear(None)
                self._ask(waiting)

    def _started(self) -> Processes | None:
        """Return the workers, started where needed and with their messages received; None without workers."""
        if self._num_workers and self._processes is None:
            self._processes = Processes(self._payload(), self._num_workers)
        self._hear(0)
        return self._processes

    def wait_for_workers(self) -> None:
        """Start the workers where that has not been done, and wait until all are ready."""
        while (processes := self._started()) is not None and processes.num_ready < self._num_workers:
            self._hear(None)

    def _hear(self, seconds: float | None) -> None:
        for outcome in self._processes.outcomes(seconds) if self._processes is not None else ():
            # The pool's own number, not the job: jobs of several iterations are under way at once.
            job = self._under_way.pop(outcome.task)
            if outcome.died is not None:
                self._lost(job, outcome)
            elif job.wanted:
                job.result, job.received, job.done = outcome.result, outcome.descriptors, True
                job.by_worker, job.send_seconds = True, outcome.send_seconds
            else:
                # Nobody takes this result, so nobody else would close what came with it.
                _close(outcome.descriptors)
                self._drop(job)

    def _lost(self, job: J, outcome: Outcome) -> None:
        if not job.wanted:
            self._drop(job)
            return
        # `_ask` hands it to another worker, or `_wait_for` does it here.
        job.asked = False
        # Jobs that the worker had not begun did not kill it.
        job.deaths += outcome.in_work
        if job.deaths >= ATTEMPTS:
            raise LoaderError(
                f"a loader worker died ({outcome.died}), and so did the one that did its work again. With too little "
                "memory, lower num_workers, batch_size or spread; num_workers=0 shows whether it is something else"
            )

    def _forget_others(self) -> None:
        """Mark the jobs of an earlier iteration, which this one ends, as unwanted."""
        for job in self._under_way.values():
            job.wanted = False

    def _leave(self, waiting: deque[J]) -> None:
        for job in waiting:
            job.wanted = False
            # Jobs that a worker is at keep their memory until its answer, or its death, is received.
            if job.done or not job.asked:
                _close(job.received)
                self._drop(job)

    def end(self) -> None:
        """End the workers; they are started anew when they are needed again."""
        # In a forked copy this ends nothing: the parent's ends of the sockets stay open.
        if self._processes is not None:
            self._processes.end()
        self._processes = None
        self._under_way.clear()


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _error_of(raised: Raised) -> BaseException:
    """Return the error itself, with the worker's traceback as its cause."""
    if raised.error is None:
        return LoaderError(f"a loader worker failed:\n{raised.text}")
    # Tracebacks do not survive pickling, so the worker's text stands in for it.
    raised.error.__cause__ = raised.error.__cause__ or _WorkerTraceback(raised.text)
    return raised.error


class _WorkerTraceback(Exception):
    """Shows where in the worker an error came from."""

    def __init__(self, text: str) -> None:
        super().__init__(f'\n"""\n{text}"""')
