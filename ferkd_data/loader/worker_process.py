"""Run in the processes of a loader: a helper, a template for each loader, and its workers.

    training ── starts ──> helper: has imported PyTorch and the loader, and nothing of the user's; one thread
                             └── forks ──> template: has unpickled the work of one loader
                                             └── forks ──> worker, worker, ...

The training's script is never imported, so it needs no `__main__` guard, and may come from stdin or a notebook. Forks
are cheap and safe, because helper and template have one thread and do nothing. All memory that they have in common is
there once.

Each process has a socket to the training, which holds the other ends. When the training ends, however that happens,
all see the end of their socket and leave; they also look whether their own parent is still there. They are a session
of their own, so that Ctrl-C reaches the training alone, which may want its batches to save its state.
"""

from __future__ import annotations

import gc
import os
import pickle
import queue
import random
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch

from ferkd_data.loader import batch_maker as _preloaded  # noqa: F401
from ferkd_data.loader.channel import Channel
from ferkd_data.loader.streaming import set_share

LOOK_SECONDS = 1.0
"""Seconds between two looks at whether the parent still exists."""


class TaskHandler(Protocol):
    """The work of a loader's workers. Pickled once, for the template."""

    def __call__(self, task: Any, descriptors: list[int]) -> tuple[Any, list[int]]:
        """Return the result of a task, and descriptors that go with it; those given came with the task."""


class Fork(NamedTuple):
    """Asks a template for a worker, whose socket comes with the message."""

    number: int
    of: int
    """Number of the loader's workers."""


class Wait(NamedTuple):
    """Asks a template how a worker ended that has closed its socket; the answer is its wait status."""

    pid: int


class Ready(NamedTuple):
    """The first message of a worker."""

    pid: int


class Do(NamedTuple):
    """Asks a worker for the result of a task."""

    number: int
    task: Any


class Begun(NamedTuple):
    """Tells that a worker is at a task from here on: if it dies before the answer, this task may be the reason."""

    number: int


class Done(NamedTuple):
    """The answer of a worker to a `Do` of the same number."""

    number: int
    result: Any
    """What the work returned, or `Raised`."""
    send_seconds: float = 0.0
    """CPU time that sending this worker's result before this one took, which is only known afterwards."""


class Raised(NamedTuple):
    """An error in a worker, or in a template that cannot unpickle its work."""

    error: BaseException | None
    """None where it cannot be pickled."""
    text: str
    """The traceback."""


def main(descriptor: int) -> NoReturn:
    """Run a helper, whose socket is `descriptor`, until the training ends."""
    torch.set_num_threads(1)
    # Templates that end need not be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor))
    # Objects that exist now leave the collector's lists: its marks would copy pages that all forks share.
    gc.freeze()
    while True:
        # Each message asks for one template: its socket and its work come as descriptors.
        _, descriptors = _next(channel)
        if os.fork() == 0:
            channel.close()
            _be(_template, *descriptors)
        # The template has copies of its own from the fork.
        for descriptor in descriptors:
            os.close(descriptor)


def _template(control: int, payload: int) -> NoReturn:
    """`payload` is an anonymous file that holds the pickled work."""
    # Workers are waited for here, where somebody asks how one ended (`Wait`).
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    channel = Channel(socket.socket(fileno=control))
    try:
        with open(payload, "rb") as stream:
            # The training has written through this same open file, whose offset is therefore at its end.
            stream.seek(0)
            work = pickle.load(stream)
    except BaseException as error:
        channel.send(_raised(error))
        raise
    # Before the freeze, so that garbage from unpickling is not kept in every worker.
    gc.collect()
    gc.freeze()
    while True:
        message, descriptors = _next(channel)
        if isinstance(message, Wait):
            channel.send(os.waitpid(message.pid, 0)[1])
            continue
        if os.fork() == 0:
            channel.close()
            _be(_worker, work, message, *descriptors)
        # The worker's own copy is the only one from here on, so that its end closes the socket.
        os.close(descriptors[0])


def _worker(handler: TaskHandler, fork: Fork, descriptor: int) -> NoReturn:
    set_share(fork.number, fork.of)
    # All workers would go on with the same numbers from the generators that they have from the template.
    seed = int.from_bytes(os.urandom(8), "little")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    channel = Channel(socket.socket(fileno=descriptor))
    asked: queue.SimpleQueue[tuple[Do, list[int]]] = queue.SimpleQueue()
    # This thread alone receives; the main thread alone sends. It takes messages at once, so that the two sides never
    # both wait to send, and it ends the process with the training, whatever the main thread is busy with.
    threading.Thread(target=_listen, args=(channel, asked), name="ferkd-listen", daemon=True).start()
    try:
        channel.send(Ready(os.getpid()))
    except OSError:
        # The training ended while this worker started.
        os._exit(0)
    send_seconds = 0.0
    while True:
        do, received = asked.get()
        result: Any
        try:
            channel.send(Begun(do.number))
        except OSError:
            os._exit(0)
        try:
            # Whatever is raised goes to the training, also a SystemExit of the user's code: a worker ends with its
            # socket alone.
            result, sent = handler(do.task, received)
        except BaseException as error:
            result, sent = _raised(error), []
        # CPU time, because a full socket makes this wait until the training asks for a batch, which costs nothing.
        begun = time.thread_time()
        try:
            channel.send(Done(do.number, result, send_seconds), sent)
        except OSError:
            os._exit(0)
        send_seconds = time.thread_time() - begun
        # Both have been used up: memory that came was mapped (a map outlives its descriptor), and what was sent is
        # copied.
        for open_file in (*received, *sent):
            os.close(open_file)
        # Before the next wait, so that an idle worker does not hold the targets of a window.
        del result


def _listen(channel: Channel, asked: queue.SimpleQueue[tuple[Do, list[int]]]) -> NoReturn:
    while True:
        # Without a limit: the training never asks for more than `prefetch_factor` windows ahead.
        asked.put(_next(channel))


def _next(channel: Channel) -> tuple[Any, list[int]]:
    """Wait for the next message. Ends the process where the training or the parent is gone."""
    # The socket leads to the training, which goes on when this process's parent alone is killed.
    parent = os.getppid()
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while not poll.poll(LOOK_SECONDS * 1000):
        if os.getppid() != parent:
            os._exit(0)
    try:
        return channel.receive()
    except EOFError:
        os._exit(0)


def _be(run: Callable[..., NoReturn], *arguments: Any) -> NoReturn:
    """Run `run` in a process just forked, in which no frame and no exit handler of its parent may go on."""
    try:
        run(*arguments)
    except BaseException:
        # To stderr, which is the training's: there is no other way to tell of an error outside of a task.
        traceback.print_exc()
    finally:
        os._exit(1)


def _raised(error: BaseException) -> Raised:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        # Some errors can be pickled and not unpickled, such as those whose __init__ takes more than the message.
        pickle.loads(pickle.dumps(error))
    except Exception:
        return Raised(None, text)
    return Raised(error, text)
