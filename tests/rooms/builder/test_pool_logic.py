"""What the driver does about workers that say what a test wants. (Real ones: test_pool.py, test_ray.py.)"""

from __future__ import annotations

from collections import deque
from unittest import mock

import pytest

from ferkd_data.builder import Stop
from ferkd_data.builder.workers import pool
from ferkd_data.builder.workers.messages import Computed, Failed, Labelled, Ready, Settled, ShardSaved, WorkerLostError
from ferkd_data.builder.workers.pool import WorkerPool
from ferkd_data.errors import BuildError, TeacherError

LOST = WorkerLostError("killed by SIGKILL")
FAILED = Failed("PermissionError", "no", "trace")
ANSWERS = {"label": lambda shard: [Labelled(10, 0), Computed()], "settle": lambda shard: [ShardSaved(shard), Settled()]}


class Scripted:
    """Does what `script` has for it: (what it was asked, shard) -> messages; else what a good worker would."""

    def __init__(self, number, script, saved):
        self.number = number
        self.script = script
        self.saved = saved
        self.messages = deque([Ready("node", 1)])
        self.labelled = []
        self.asked = []

    def __str__(self):
        return f"worker {self.number}"

    def location(self, ready):
        return "cpu"

    def label(self, shard):
        before = [ShardSaved(self.labelled.pop())] if self.labelled else []
        self.labelled.append(shard)
        self.answer("label", shard, [*before, *ANSWERS["label"](shard)])

    def settle(self):
        shard = self.labelled.pop()
        self.answer("settle", shard, ANSWERS["settle"](shard))

    def answer(self, what, shard, usual):
        self.asked.append((what, shard))
        self.messages.extend(self.script.pop((what, shard), usual))

    def receive(self):
        message = self.messages.popleft()
        if message is LOST:
            self.messages.clear()
            raise LOST
        if isinstance(message, ShardSaved):
            self.saved.add(message.shard)
        return message

    def leave(self):
        pass

    def end(self, wait_seconds):
        pass


class Scripts:
    when_none_gets_ready = "try something else"

    def __init__(self, script=None, room=1):
        self.script = script or {}
        self.saved = set()
        self.started = []
        self._room = room

    def room(self):
        return self._room

    def start(self, number):
        self.started.append(Scripted(number, self.script, self.saved))
        return self.started[-1]

    def with_messages(self, workers, seconds):
        return [worker for worker in workers if worker.messages]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.01)


def pool_of(scripts, teacher_timeout=None, stop=None):
    folder = mock.Mock(location="out")
    folder.files.record.side_effect = lambda shard: mock.Mock(index=shard) if shard in scripts.saved else None
    return WorkerPool(scripts, folder, mock.Mock(), stop or Stop(), teacher_timeout)


def done(made):
    return [call.args[0].index for call in made.counter.shard_done.call_args_list]


def test_the_last_shard_is_settled_and_all_are_done():
    scripts = Scripts()
    made = pool_of(scripts)
    made.label([0, 1, 2])
    (worker,) = scripts.started
    assert worker.asked == [("label", 0), ("label", 1), ("label", 2), ("settle", 2)]
    assert done(made) == [0, 1, 2]


def test_a_worker_whose_device_failed_is_ended_at_once_and_replaced():
    """Its process hangs in the driver or waits for the next request: it does not leave by itself."""
    broken = Failed("DeviceFailedError", "device cuda:0 failed (CUDA error: x)", "trace")
    scripts = Scripts({("label", 1): [broken]})
    made = pool_of(scripts)
    with mock.patch.object(Scripted, "end", autospec=True) as end:
        made.label([0, 1, 2])
    end.assert_called_once_with(scripts.started[0], 0)
    assert len(scripts.started) == 2
    lost = "ended, since device cuda:0 failed (CUDA error: x)"
    made.counter.worker_died.assert_called_once_with(0, lost, [0, 1])
    assert sorted(done(made)) == [0, 1, 2]


def test_a_worker_that_dies_with_two_shards_gives_back_both():
    scripts = Scripts({("label", 1): [LOST]})
    made = pool_of(scripts)
    made.label([0, 1, 2])
    assert len(scripts.started) == 2
    made.counter.worker_died.assert_called_once_with(0, "killed by SIGKILL", [0, 1])
    assert sorted(done(made)) == [0, 1, 2]
    assert {shard for what, shard in scripts.started[1].asked if what == "label"} == {0, 1, 2}


def test_a_shard_whose_record_is_there_is_not_labelled_again():
    scripts = Scripts({("label", 1): [LOST]})
    made = pool_of(scripts)
    scripts.saved.add(0)
    made.label([0, 1])
    assert [shard for what, shard in scripts.started[1].asked if what == "label"] == [1]
    assert sorted(done(made)) == [0, 1]


def test_a_shard_that_is_written_when_its_worker_dies_again_and_again():
    scripts = Scripts({("settle", 0): [LOST]})
    made = pool_of(scripts)
    scripts.script = _Always({("settle", 0): [LOST]})
    with pytest.raises(
        BuildError, match="shard 0: 3 workers died while they labelled it, the last was worker 0 killed"
    ):
        made.label([0])


class _Always(dict):
    def pop(self, key, usual):
        return self.get(key, usual)


def test_a_record_that_is_seen_late_and_one_that_never_is(monkeypatch):
    """As on a network file system."""
    scripts = Scripts()
    made = pool_of(scripts)
    seen = iter([None, None, mock.Mock(index=0)])
    made.folder.files.record.side_effect = lambda shard: next(seen)
    made.label([0])
    assert done(made) == [0] and made.folder.files.look_again.call_count == 2
    monkeypatch.setattr(pool, "VISIBLE_SECONDS", 0.05)
    made = pool_of(Scripts())
    made.folder.files.record.side_effect = lambda shard: None
    with pytest.raises(BuildError, match="shard 0: worker 0 finished it; its files are not in out"):
        made.label([0])


def test_others_work_on_while_a_record_is_waited_for():
    scripts = Scripts()
    made = pool_of(scripts)
    hidden = iter([None] * 3)
    made.folder.files.record.side_effect = lambda shard: (
        next(hidden, mock.Mock(index=0)) if shard == 0 else mock.Mock(index=1)
    )
    made.label([0, 1])
    assert done(made) == [1, 0]


def test_a_worker_that_says_nothing_at_all(monkeypatch):
    """Its process is stuck, and cannot even tell that its teacher hangs."""
    monkeypatch.setattr(pool, "SILENT_SECONDS", 0.02)
    scripts = Scripts({("label", 0): []})
    scripts.with_messages = _slowly(scripts.with_messages)
    with pytest.raises(TeacherError, match=r"shard 0: a teacher hangs, and worker 0 with it, .* than 0.05 seconds"):
        pool_of(scripts, teacher_timeout=0.05).label([0])


def _slowly(with_messages):
    import time

    def wait(workers, seconds):
        time.sleep(seconds)
        return with_messages(workers, seconds)

    return wait


def test_signs_of_life_are_enough(monkeypatch):
    monkeypatch.setattr(pool, "SILENT_SECONDS", 0.02)
    scripts = Scripts({("label", 0): [*[Labelled(0, 0)] * 50, Computed()]})
    scripts.with_messages = _slowly(scripts.with_messages)
    made = pool_of(scripts, teacher_timeout=0.05)
    made.label([0])
    assert done(made) == [0]


def test_a_worker_that_was_idle_for_long_is_not_silent():
    """It had nothing to say until another's shard came to it."""
    made = pool_of(Scripts({("label", 0): []}))
    made.todo.add([0])
    made._grow()
    made._listen()
    made.listened_seconds = 1000.0
    assert made._give(made.members[0])
    made._check_alive(1)
    made.listened_seconds += 1 + pool.SILENT_SECONDS + 1
    with pytest.raises(TeacherError, match="shard 0: a teacher hangs"):
        made._check_alive(1)


@pytest.mark.parametrize(
    ("script", "place"),
    [
        ({("label", 1): [FAILED]}, "shard 0 or 1: worker 0"),
        ({("label", 0): [FAILED]}, "shard 0: worker 0"),
        ({("settle", 1): [FAILED]}, "shard 1: worker 0"),
    ],
)
def test_an_error_is_of_a_shard_that_the_worker_has(script, place):
    """Also of the one that it was writing while it labelled the next."""
    with pytest.raises(BuildError, match=f"^{place} failed: PermissionError: no"):
        pool_of(Scripts(script)).label([0, 1])


def test_whoever_follows_an_idle_worker_gets_nothing_before_it_is_ready():
    scripts = Scripts()
    made = pool_of(scripts)
    made.todo.add([0])
    made._grow()
    made._listen()
    scripts.started[0].messages.append(LOST)
    made._listen()
    assert len(scripts.started) == 2 and not made.free
