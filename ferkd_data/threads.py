"""Thread pools and iterators that work ahead in them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Threads(ThreadPoolExecutor):
    """A thread pool whose `with` block ends at once on Ctrl-C, and on an error as soon as no thread works.

    The standard pool would first do everything in its queue. A thread cannot be stopped from outside: its present task
    ends by itself.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # On Ctrl-C nothing is waited for: a thread may be in a read of minutes, and ends with the process or its task.
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.shutdown(wait=not interrupted, cancel_futures=kind is not None)


def as_they_end(
    executor: Executor, action: Callable[[T], R], items: Iterable[T], *, ahead: int, seconds: float | None = None
) -> Iterator[tuple[list[tuple[T, R]], list[T]]]:
    """Call `action` with each item in an executor, with at most `ahead` calls queued or running.

    Yields the items whose calls have ended, with their results, and the items whose calls have not. When none ends for
    `seconds`, it yields an empty list, so that the caller can look at the progress of the others. Raises what an action
    raises.
    """
    # Only this generator uses `pending`. Its length is bounded, so that a million items take no memory each.
    pending: dict[Future[R], T] = {}
    waiting = iter(items)
    while True:
        for item in itertools.islice(waiting, ahead - len(pending)):
            pending[executor.submit(action, item)] = item
        if not pending:
            return
        ended, _ = wait(pending, timeout=seconds, return_when=FIRST_COMPLETED)
        yield [(pending.pop(future), future.result()) for future in ended], list(pending.values())


def look_ahead(executor: Executor, function: Callable[[T], R], items: Iterable[T], *, depth: int) -> Iterator[R]:
    """Yield `map(function, items)` in order, with at most `depth` results computed or begun beyond the one in use.

    `items` is consumed in the thread that asks for results, `function` runs in the executor. An exception of either is
    raised where its result is due; what has begun is then finished, and its result dropped.
    """
    begun: deque[Future[R]] = deque()
    source = iter(items)
    try:
        while True:
            while len(begun) < depth:
                try:
                    item = next(source)
                except StopIteration:
                    break
                begun.append(executor.submit(function, item))
            if not begun:
                return
            yield begun.popleft().result()
    finally:
        # What has not begun never will. What runs ends by itself: it changes nothing that others see.
        for future in begun:
            future.cancel()


def in_background(items: Iterable[T], *, depth: int) -> Iterator[T]:
    """Yield `items`, taken out of their iterator by a thread of its own, up to `depth` before they are asked for.

    That thread alone touches the iterator. It ends with the generator.
    """
    source = iter(items)
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ferkd-data-read") as executor:
        # A sentinel, since a StopIteration that comes out of a future turns into a RuntimeError in a generator (PEP
        # 479).
        for item in look_ahead(executor, lambda _: next(source, end), itertools.repeat(None), depth=depth):
            if item is end:
                return
            yield item  # type: ignore[misc]
