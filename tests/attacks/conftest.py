"""A time limit for tests of inputs that have made commands wait for ever."""

from __future__ import annotations

import signal

import pytest

HUNG_SECONDS = 60


@pytest.fixture
def in_time():
    """A wait for ever becomes an error, where it can be interrupted at all."""

    def hung(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(HUNG_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
