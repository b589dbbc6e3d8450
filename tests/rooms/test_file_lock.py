"""Locks on files: who has one is named, and one that was removed meanwhile is no lock."""

from __future__ import annotations

import errno
import os

import pytest

from ferkd_data import locks
from ferkd_data.errors import PublishError
from ferkd_data.locks import held


def take(path, **more):
    return held(path, "out", work="pull", refusal=PublishError, **more)


def test_one_at_a_time_also_within_a_process(tmp_path):
    lock = tmp_path / "lock"
    with take(lock), pytest.raises(PublishError, match=rf"out: another pull works here \(process {os.getpid()}\)"):
        with take(lock):
            pass
    with take(lock, shared=True), take(lock, shared=True), pytest.raises(PublishError, match="works here; wait"):
        with take(lock):
            pass
    with take(lock):
        pass


def test_a_lock_whose_file_was_removed_or_replaced_is_none(tmp_path, monkeypatch):
    lock, real = tmp_path / "lock", locks.fcntl.flock

    def too_late(replaced):
        def flock(descriptor, operation):
            lock.unlink()
            if replaced:
                lock.touch()
            real(descriptor, operation)

        return flock

    for replaced in (False, True):
        monkeypatch.setattr(locks.fcntl, "flock", too_late(replaced))
        with pytest.raises(PublishError, match="has just ended here"):
            with take(lock):
                pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(PublishError, match=r"out: its file system gives no locks \(.*\); use another folder"):
        with take(tmp_path / "lock"):
            pass
