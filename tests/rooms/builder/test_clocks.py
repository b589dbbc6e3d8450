"""A wall clock that jumps back and forth by hours disturbs nothing: what is waited for is measured by another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta

from label_sets import SMALL, same_files

import ferkd_data as fd

JUMPING = '''
"""Every look at the wall clock shows another time, up to a day away; in the driver and in every worker."""
import itertools, time

HOURS = itertools.cycle([0, 23, -23, 7, -12, 1, -1])
real, real_ns = time.time, time.time_ns
time.time = lambda: real() + 3600 * next(HOURS)
time.time_ns = lambda: real_ns() + 3600 * 10**9 * next(HOURS)
'''


def test_a_clock_that_jumps(photos, tiny_teachers, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(JUMPING)
    out, undisturbed, log = tmp_path / "out", tmp_path / "undisturbed", tmp_path / "log"
    path = os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]])
    command = [sys.executable, "-m", "ferkd_data_cli.main", "build", str(photos), str(out), "--teacher", tiny_teachers]
    command += ["--crops", "10", "--crops-per-block", "4", "--top-k", "4", "--images-per-shard", "8", "--device", "cpu"]
    command += ["--workers", "2", "--teacher-timeout", "60", "--grace", "60", "--log-json", str(log)]
    command += ["--metrics", str(tmp_path / "metrics")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    events = [json.loads(text) for text in log.read_text().splitlines()]
    times = [datetime.fromisoformat(event["time"]) for event in events]
    assert times != sorted(times) and max(times) - min(times) > timedelta(hours=10), "the clock did not jump"
    elapsed = [event["elapsed"] for event in events]
    assert elapsed == sorted(elapsed) and elapsed[-1] < 300
    assert all(0 < event["seconds"] for event in events if event["event"] == "shard_done")
    rates = [event["crops_per_second"] for event in events if event["event"] == "progress"]
    assert min(rates) >= 0 and rates[-1] > 0
    fd.build(photos, undisturbed, teachers=[tiny_teachers], **SMALL)
    assert same_files(undisturbed, out)
