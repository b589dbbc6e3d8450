"""Bounded look-ahead: work done in threads while the consumer is busy, results in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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


def in_background(items: Iterable[Item], *, depth: int) -> Iterator[Item]:
    """The same items, taken out of their iterator in a thread of its own, up to `depth` before they are asked for."""
    source = iter(items)
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ferkd-data-read") as executor:
        for item in look_ahead(executor, lambda _: next(source, end), itertools.repeat(None), depth=depth):
            if item is end:
                return
            yield item  # type: ignore[misc]
