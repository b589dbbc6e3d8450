"""Bounded look-ahead: work done in threads while the consumer is busy, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def look_ahead(
    executor: Executor, function: Callable[[Item], Result], items: Iterable[Item], *, depth: int
) -> Iterator[Result]:
    """`map(function, items)` with at most `depth` results computed or under way beyond the one in use.

    An exception of `function` or of `items` is raised where its result is due; what is under way is then waited for.
    """
    under_way: deque[Future[Result]] = deque()
    source = iter(items)
    try:
        while True:
            while len(under_way) < depth:
                try:
                    item = next(source)
                except StopIteration:
                    break
                under_way.append(executor.submit(function, item))
            if not under_way:
                return
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()
