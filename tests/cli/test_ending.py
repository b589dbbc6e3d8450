"""How commands end: signals, a terminal that is closed, a reader that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from label_sets import SMALL, same_label_sets, wait_until

import ferkd_data as fd
from ferkd_data_cli.main import run

OPTIONS = ("--crops", "10", "--crops-per-block", "4", "--top-k", "4", "--images-per-shard", "8", "--device", "cpu")


def arguments_of(photos, out, teacher, *more):
    return ["build", str(photos), str(out), "--teacher", teacher, *OPTIONS, "--batch-size", "16", *more]


def start(arguments, sleep="0.2", **settings):
    command = [sys.executable, "-m", "ferkd_data_cli.main", *arguments]
    environment = {**os.environ, "TINY_SLEEP": sleep}
    return subprocess.Popen(command, env=environment, text=True, preexec_fn=heed_signals, **settings)


def heed_signals():
    """Tests that run in the background, or under nohup, hand on that signals are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for_a_shard(out, process):
    wait_until(lambda: any(out.glob(".build/shards/*.json")) or process.poll() is not None)
    assert process.poll() is None, process.communicate()


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("twice", [False, True])
def test_signals_end_a_build_that_goes_on_later(photos, tiny_teachers, tmp_path, processes, number, twice):
    """To all processes of the terminal, as Ctrl-C and a closed window send them; the second within half a second."""
    out = tmp_path / "out"
    arguments = arguments_of(photos, out, tiny_teachers, "--workers", processes, "--grace", "0")
    process = start(arguments, stderr=subprocess.PIPE, start_new_session=True)
    wait_for_a_shard(out, process)
    os.killpg(process.pid, number)
    if twice:
        time.sleep(0.2)
        if process.poll() is None:
            os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr and "run the same command again" in stderr
    fd.build(photos, out, teachers=[tiny_teachers], batch_size=16, **SMALL)
    fd.build(photos, tmp_path / "whole", teachers=[tiny_teachers], batch_size=16, **SMALL)
    assert same_label_sets(out, tmp_path / "whole")


def test_under_nohup_a_closed_terminal_does_not_matter(photos, tiny_teachers, tmp_path):
    out = tmp_path / "out"
    command = ["nohup", sys.executable, "-m", "ferkd_data_cli.main", *arguments_of(photos, out, tiny_teachers)]
    process = subprocess.Popen(
        command, env={**os.environ, "TINY_SLEEP": "0.1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_a_shard(out, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 0


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_reader_that_is_gone_does_not_end_a_build(photos, tiny_teachers, tmp_path, processes):
    """2>&1 | head -1"""
    out = tmp_path / "out"
    arguments = arguments_of(photos, out, tiny_teachers, "--workers", processes)
    process = start(arguments, "0.02", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert fd.verify(out).ok


@pytest.mark.parametrize("redirection", ["2>&-", "1>&- 2>&-", "2>/dev/full"])
def test_streams_that_are_closed_or_full(photos, tiny_teachers, tmp_path, redirection):
    arguments = arguments_of(photos, tmp_path / "out", tiny_teachers)
    command = " ".join([sys.executable, "-m", "ferkd_data_cli.main", *arguments, redirection])
    assert subprocess.run(command, shell=True, check=False, timeout=120).returncode == 0
    assert fd.verify(tmp_path / "out").ok


def test_a_result_that_cannot_be_written_is_an_error(photos, tiny_teachers, tmp_path, label_set):
    command = f"{sys.executable} -m ferkd_data_cli.main stats {label_set} > /dev/full"
    done = subprocess.run(command, shell=True, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_a_pattern_that_the_shell_expanded(tmp_path, capsys):
    for name in ("train-0.tar", "train-1.tar", "train-2.tar"):
        (tmp_path / name).touch()
    files = [str(tmp_path / f"train-{number}.tar") for number in range(3)]
    assert run(["build", *files, str(tmp_path / "out"), "--teacher", "timm:resnet18"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "the shell made 3 names of a pattern in SOURCE; put the pattern in quotes" in error
    assert f"'{tmp_path}/train-*.tar'" in error
    assert run(["evaluate", *files, "--teacher", "timm:resnet18"]) == 2
    assert "in quotes" in capsys.readouterr().err
    assert run(["build", *files[:2], "--teacher", "timm:resnet18"]) == 1
    assert "is a file; give a folder as OUT (a pattern in SOURCE needs quotes)" in capsys.readouterr().err
    assert run(["build", str(tmp_path), str(tmp_path / "out"), "x", "--teacher", "timm:resnet18"]) == 2


def test_an_out_that_cannot_be_written(photos, tiny_teachers, tmp_path, small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert run(arguments_of(photos, small_disk / "out", tiny_teachers)) == 1
    error = capsys.readouterr().err
    assert f"{small_disk}/out: cannot be written to (Read-only file system); choose a writable folder" in error


def test_an_out_that_is_removed_meanwhile(photos, tiny_teachers, tmp_path, capsys):
    import shutil

    out = tmp_path / "out"
    fired = []

    def remove(progress):
        if not fired:
            fired.append(progress)
            shutil.rmtree(out)

    with pytest.raises(fd.FerkdError, match=r"cannot be written to \(No such file or directory\).* is gone"):
        fd.build(photos, out, teachers=[tiny_teachers], on_progress=remove, **SMALL)


def test_help_of_build_is_in_groups(capsys):
    assert run(["build", "--help"]) == 0
    text = capsys.readouterr().out
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Teachers and classes:",
        "Crops and labels:",
        "Output:",
        "This machine:",
        "Clusters and batch systems:",
        "Monitoring and configuration:",
        "Options:",
    ]
    assert text.count("--crops-per-block") == 1
