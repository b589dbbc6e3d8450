"""Start, ask, replace and end the worker processes of a loader, from the training process.

`worker_process.py` is what runs in them. Nothing here knows what the work is: `pool.py` decides who does what.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from multiprocessing import spawn
from selectors import EVENT_READ, PollSelector
from typing import Any, ClassVar, NamedTuple

from ferkd_data.errors import LoaderError
from ferkd_data.loader.channel import Channel, anonymous_file, channel_pair, write_all
from ferkd_data.loader.worker_process import Begun, Do, Done, Fork, Ready, Wait

log = logging.getLogger("ferkd_data.loader")

HELPER = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from ferkd_data.loader.worker_process import main
main(int(sys.argv[2]))
"""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Workers share the cores already, and a process that has threads cannot be forked."""
MAX_DEATHS = 3
"""Number of processes that may die in a row, with no task done in between."""


class Helper:
    """The process that all loaders of a training share, from which their templates fork. Ends with the last loader.

    Loaders of several threads may share it: the class's lock is held while one is made, and while a message is sent.
    """

    _shared: ClassVar[weakref.ref[Helper] | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self._channel, theirs = channel_pair()
        with theirs:
            command = [
                spawn.get_executable(),
                # As multiprocessing does: -W, -X and -O of the training hold in its workers too.
                *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]
                # sys.path as it is now, since user code that workers unpickle may come from a folder that was added to
                # it.
                *("-c", HELPER, json.dumps(sys.path), str(theirs.fileno())),
            ]
            self.process = subprocess.Popen(
                [os.fsdecode(part) for part in command],
                # A worker must not take the lines of a prompt, or of the script where Python reads it from stdin.
                stdin=subprocess.DEVNULL,
                env=os.environ | ONE_THREAD,
                pass_fds=[theirs.fileno()],
                # Out of the terminal's process group, so that Ctrl-C reaches the training alone.
                start_new_session=True,
            )
        self._owner = os.getpid()
        # Loaders hold the helper and it holds no loader, so it goes with the last of them.
        weakref.finalize(self, _end, self._channel, self.process, self._owner)

    @classmethod
    def shared(cls) -> Helper:
        with cls._lock:
            helper = cls._shared() if cls._shared is not None else None
            # After a fork, the socket is shared with the parent, whose answers would be read here.
            if helper is None or helper._owner != os.getpid() or helper.process.poll() is not None:
                helper = cls()
                cls._shared = weakref.ref(helper)
            return helper

    def start_template(self, payload: bytes, control: socket.socket) -> None:
        """Ask for a template of this pickled work, with `control` as its socket; it starts once the helper is up.

        Raises OSError when the helper is gone.
        """
        # A file: through the socket, a large payload would have to wait until the helper reads.
        descriptor = anonymous_file(0)
        try:
            write_all(descriptor, payload)
            # A message is written in several pieces, which those of another thread's loader must not come between.
            with self._lock:
                self._channel.send(None, [control.fileno(), descriptor])
        finally:
            os.close(descriptor)


class Outcome(NamedTuple):
    """The result of a task, or the death of its worker."""

    task: int
    result: Any = None
    """What the work returned, or `Raised`."""
    descriptors: tuple[int, ...] = ()
    died: str | None = None
    """How the worker that had the task ended; None where it did the task."""
    in_work: bool = False
    """With `died`: whether the worker had begun this task."""
    send_seconds: float = 0.0
    """CPU seconds that the worker took to send its previous result."""


@dataclass(eq=False)
class Worker:
    """A worker process, as the training sees it."""

    number: int
    channel: Channel
    pid: int | None = None
    """None until it is ready."""
    tasks: deque[int] = field(default_factory=deque)
    """Tasks that it has been asked for and has not answered, in order."""
    begun: int | None = None
    """The first of them, once the worker has said that it is at it."""


class Processes:
    """The worker processes of one loader. Used by one thread at a time, of the process that made this object.

    It owns the other end of each worker's socket: closing an end lets the process go.
    """

    def __init__(self, payload: bytes, num_workers: int) -> None:
        self._payload = payload
        self._num_workers = num_workers
        # Kept apart from this object, so that the finalizer can close them without keeping it alive.
        self._channels: set[Channel] = set()
        self._in_transit: list[socket.socket] = []
        weakref.finalize(self, _close, self._channels)
        self._deaths = 0
        """Number of processes that died since a task was last done."""
        self._start()

    def _start(self) -> None:
        # Held for as long as these processes are: the reference keeps the helper running for templates to come.
        self._helper = Helper.shared()
        try:
            self._selector = PollSelector()
            self._workers: list[Worker] = []
            self._template, control = channel_pair()
            # Before the workers: `outcomes` tells the template's socket from theirs.
            self._listen_to(self._template, None)
            self._helper.start_template(self._payload, control)
            self._hand_over(control)
            self._workers = [self._start_worker(number) for number in range(self._num_workers)]
        except OSError as error:
            self.end()
            raise LoaderError(f"the loader's worker processes cannot be started ({error})") from error

    def _start_worker(self, number: int) -> Worker:
        ours, theirs = channel_pair()
        worker = Worker(number, ours)
        self._listen_to(ours, worker)
        # The template may still be unpickling; its socket keeps the messages until it reads them.
        self._template.send(Fork(number, self._num_workers), [theirs.fileno()])
        self._hand_over(theirs)
        return worker

    def _hand_over(self, sent: socket.socket) -> None:
        """Close this process's copy of a socket that was sent, so that the end of its new owner is noticed here.

        macOS loses what is closed before it has arrived: there, it stays open until the workers are ready.
        """
        self._in_transit.append(sent)
        if sys.platform != "darwin":
            self._arrived()

    def _arrived(self) -> None:
        while self._in_transit:
            self._in_transit.pop().close()

    def _listen_to(self, channel: Channel, worker: Worker | None) -> None:
        self._channels.add(channel)
        self._selector.register(channel, EVENT_READ, worker)

    def idle(self, limit: int) -> Worker | None:
        """Return the ready worker with the fewest tasks; None where all have `limit` of them."""
        ready = [worker for worker in self._workers if worker.pid is not None and len(worker.tasks) < limit]
        # Fewest tasks first, so that a slow worker gets no more while others are idle.
        return min(ready, key=lambda worker: len(worker.tasks), default=None)

    @property
    def num_ready(self) -> int:
        return sum(worker.pid is not None for worker in self._workers)

    def ask(self, worker: Worker, number: int, task: Any, descriptors: tuple[int, ...]) -> None:
        # Noted before it is sent: if the worker dies here, `_replace` reports the task as lost.
        worker.tasks.append(number)
        try:
            worker.channel.send(Do(number, task), descriptors)
        except OSError:
            # It has died; `outcomes` will notice and replace it.
            log.debug("a worker left before it could be asked")

    def outcomes(self, seconds: float | None) -> list[Outcome]:
        """Collect results and deaths; wait for the first of them, at most `seconds` (None: as long as it takes).

        Raises LoaderError when processes die as soon as they are started, or the work cannot be unpickled.
        """
        found: list[Outcome] = []
        for key, _ in self._selector.select(seconds):
            # It says nothing while all is well. `_hear_template` ends or replaces everything, so the other keys are
            # stale.
            if key.fileobj is self._template:
                found += self._hear_template()
                break
            found += self._hear(key.data)
        return found

    def _hear(self, worker: Worker) -> list[Outcome]:
        try:
            message, descriptors = worker.channel.receive()
        except (EOFError, OSError):
            return self._replace(worker)
        if isinstance(message, Ready):
            worker.pid = message.pid
            if self.num_ready == self._num_workers:
                self._arrived()
            return []
        if isinstance(message, Begun):
            worker.begun = message.number
            return []
        assert isinstance(message, Done)
        # Work goes on, so deaths are not those of workers that can do nothing, as where memory is short from the start.
        self._deaths = 0
        # A worker answers in the order in which it was asked, so this is the task of the answer.
        worker.tasks.popleft()
        worker.begun = None
        sent = message.send_seconds
        return [Outcome(message.number, message.result, tuple(descriptors), send_seconds=sent)]

    def _hear_template(self) -> list[Outcome]:
        try:
            message, _ = self._template.receive()
        except (EOFError, OSError):
            # Without it no worker could be replaced, so its workers go too and their tasks are done again.
            lost = [outcome for worker in self._workers for outcome in _lost(worker, "its template process ended")]
            self._count_death("the process that starts loader workers ended")
            self.end()
            self._start()
            return lost
        self.end()
        raise LoaderError(
            f"loader workers cannot take over their work: {message.text.splitlines()[-1]}; what they are given "
            "(images, transform) must be importable or picklable, or use num_workers=0"
        ) from message.error

    def _replace(self, worker: Worker) -> list[Outcome]:
        how = self._how_it_ended(worker)
        self._selector.unregister(worker.channel)
        self._channels.discard(worker.channel)
        worker.channel.close()
        self._count_death(f"a loader worker died ({how})")
        try:
            self._workers[worker.number] = self._start_worker(worker.number)
        except OSError:
            # The template has died as well; the next look at its socket will tell.
            worker.pid = None
        return _lost(worker, how)

    def _count_death(self, what: str) -> None:
        self._deaths += 1
        if self._deaths > MAX_DEATHS:
            self.end()
            raise LoaderError(
                f"{what}, the {self._deaths}th in a row; with too little memory, lower num_workers, batch_size or "
                "spread; num_workers=0 works without processes"
            )
        log.warning("%s; its work is done again", what)

    def _how_it_ended(self, worker: Worker) -> str:
        if worker.pid is None:
            return "while it started"
        try:
            # Only the parent of a process can wait for it, and that is the template.
            self._template.send(Wait(worker.pid))
            status, _ = self._template.receive()
        except (EOFError, OSError):
            return "its exit status is unknown"
        # SIGKILL is what Linux sends when memory runs out; nothing else in the system says so.
        if os.WIFSIGNALED(status):
            killed = os.WTERMSIG(status)
            hint = ", as a system does that has no memory left" if killed == signal.SIGKILL else ""
            return f"signal {signal.Signals(killed).name}{hint}"
        return f"exit status {os.waitstatus_to_exitcode(status)}"

    def end(self) -> None:
        """Close all sockets, at which the processes end."""
        _close(self._channels)
        self._workers = []


def _lost(worker: Worker, how: str) -> list[Outcome]:
    # The others waited in its queue, or were sent to a worker that had just been killed.
    return [Outcome(task, died=how, in_work=task == worker.begun) for task in worker.tasks]


def _close(channels: set[Channel]) -> None:
    while channels:
        channels.pop().close()


def _end(channel: Channel, process: subprocess.Popen[bytes], owner: int) -> None:
    channel.close()
    if os.getpid() == owner:
        # Its templates end by themselves when their sockets close. The helper holds nothing that must be saved.
        process.kill()
        process.wait()
