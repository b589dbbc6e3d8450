"""The display of long commands: it fits any width, and a real terminal shows it without wrapping."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import serve

import ferkd_data as fd
from ferkd_data.builder.watch.events import Progress, WorkerProgress
from ferkd_data_cli.display import Frame, Rate, _cells, clock, frame, layout, plain_line, show_transfer
from ferkd_data_cli.terminal import UNPRINTABLE

TEXT = st.text(max_size=30)
FRAMES = st.builds(
    Frame,
    what=st.sampled_from(["build", "pull", "a long command"]),
    done=st.floats(0, 1e12),
    total=st.none() | st.floats(0, 1e12),
    amount=TEXT,
    details=st.lists(TEXT, max_size=6).map(tuple),
    workers=st.lists(TEXT, max_size=20).map(tuple),
)


def progress(images_done=120_000, workers=0, **changes):
    some = tuple(WorkerProgress(worker=n, shard=100 + n, crops_per_second=1234.5 + n) for n in range(workers))
    values = {
        "shard": 29, "shards_done": 28, "shards_total": 312, "images_done": images_done, "images_total": 1_281_167,
        "crops_done": 24_000_000, "rejects": 17, "crops_per_second": 9876.5, "seconds_left": 23_456.0, "workers": some,
        "stragglers": (3,) if workers > 3 else (), "forwards_done": 72_000_000, "forwards_total": 768_000_000,
    }  # fmt: skip
    return Progress(**{**values, **changes})


@given(FRAMES, st.integers(1, 200), st.booleans())
def test_no_line_is_wider_than_the_terminal(shown, width, ascii_only):
    lines = layout(shown, width, 12.3, ascii_only=ascii_only)
    assert lines and all(_cells(line) <= width and not UNPRINTABLE.search(line) for line in lines)
    assert len(lines) <= 2 + 9


@pytest.mark.parametrize("workers", [0, 2, 64])
def test_80_columns_hold_what_matters(workers):
    lines = layout(frame(progress(workers=workers)), 80, 100.0)
    assert "━" in lines[0] and "  9 %" in lines[0] and "120,000/1,281,167 images" in lines[0]
    for part in ("9,876.5 crops/s", "6:30:56 left", "17 rejects"):
        assert part in lines[1]
    assert len(lines) == {0: 2, 2: 4, 64: 11}[workers]
    if workers == 64:
        assert "far behind" in lines[2] and lines[2].split()[:2] == ["worker", "3"] and lines[-1] == "  and 56 more"


def test_40_columns_hold_the_essentials():
    first, second = layout(frame(progress()), 40, 100.0)
    assert "9 %" in first and "crops/s" in second and "left" in second


def test_the_end_is_100_percent_and_only_the_end():
    assert " 99 %" in layout(frame(progress(images_done=1_281_166)), 80, 1.0)[0]
    assert "100 %" in layout(frame(progress(images_done=1_281_167)), 80, 1.0)[0]


def test_terminals_that_know_ascii_only_get_no_other_marks():
    assert all(line.isascii() for line in layout(frame(progress(workers=3)), 100, 1.0, ascii_only=True))


def test_strangers_do_not_control_the_terminal():
    lines = layout(Frame(what="build", amount="\x1b[2Ja\nb\u202e"), 80, 1.0)
    assert "\x1b" not in lines[0] and "\\u001b[2Ja" in lines[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (86_399, "23:59:59"), (200_000, "2 d 7:33:20"), (-3, "0:00:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_rates_are_those_of_the_last_while(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ferkd_data_cli.display.time.monotonic", lambda: now[0])
    rate = Rate()
    assert rate.left(10) == "time left not known yet"
    for second in range(1, 101):
        now[0] += 1
        rate.add(min(second, 50) * 10 + max(0, second - 50) * 2)
    assert rate.per_second == pytest.approx(2)
    assert rate.left(600 + 120) == "0:01:00 left"


def test_without_a_terminal_there_are_lines_now_and_then(capsys):
    def at(files, megabytes):
        return fd.TransferProgress(files=files, files_total=4, bytes=megabytes * 10**6, bytes_total=10**7)

    with show_transfer("pull") as report:
        assert capsys.readouterr().err == ""
        report(at(0, 0))
        assert capsys.readouterr().err.startswith("pull: 0 bytes of 10.0 MB, 0 of 4 files, 0 bytes/s, ")
        report(at(2, 6))
        assert capsys.readouterr().err == ""
        report(at(4, 10))
    assert re.fullmatch(r"pull: 10\.0 MB of 10\.0 MB, 4 of 4 files, [\d.]+ [kMGT]?B/s\n", capsys.readouterr().err)
    assert plain_line(Frame(what="pull", amount="starting")) == "pull: starting"


def on_a_terminal(command: list[str], columns: int, *, term: str = "xterm-256color"):
    """Runs a command on a pseudo-terminal: the screens that an emulator went through, and the exit status."""
    pyte = pytest.importorskip("pyte")
    screen = pyte.HistoryScreen(columns, 40, history=1000)
    stream = pyte.ByteStream(screen)
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    environment = {**os.environ, "TERM": term, "COLUMNS": str(columns), "LINES": "40", "TINY_SLEEP": "0.05"}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    screens = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            try:
                data = os.read(master, 65536)
            except OSError:
                break
            if not data:
                break
            stream.feed(data)
            screens.append([line.rstrip() for line in screen.display])
        elif process.poll() is not None:
            break
    os.close(master)
    return screens, process.wait(timeout=60)


def ferkd_data(*arguments) -> list[str]:
    code = "import sys; from ferkd_data_cli.main import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


@pytest.mark.parametrize("columns", [80, 48])
def test_a_build_on_a_real_terminal(photos, tiny_teachers, tmp_path, columns):
    command = ferkd_data(
        "build", photos, tmp_path / "out", "--teacher", tiny_teachers, "--crops", 20, "--top-k", 4,
        "--images-per-shard", 5, "--device", "cpu", "--batch-size", 16,
    )  # fmt: skip
    screens, status = on_a_terminal(command, columns)
    assert status == 0
    texts = ["\n".join(screen) for screen in screens]
    assert any("listing images, loading teachers" in text for text in texts)
    assert any("crops/s" in text and "images" in text for text in texts)
    for screen in screens:
        # One display: a line that wrapped, or one that was not overwritten, would be there twice.
        assert sum(line.startswith("build ") for line in screen) <= 1
        assert sum("crops/s" in line for line in screen) <= 1
    assert any(line.startswith("build ") and "100 %" in line for line in screens[-1])
    assert any("hint: on a CPU" in text for text in texts)
    # The last lines stay, and the result comes below them.
    # They may wrap anywhere, also at a blank.
    after = "".join(screens[-1]).replace(" ", "").partition("100%")[2]
    assert "20imagesx20crops" in after


def test_a_dumb_terminal_gets_plain_lines(label_set):
    screens, status = on_a_terminal(ferkd_data("verify", label_set), 80, term="dumb")
    assert status == 0 and any(line.startswith("verify: ") for line in screens[-1])


@pytest.mark.parametrize("command", ["verify", "pull", "publish", "convert", "merge"])
def test_other_commands_show_the_same_display(label_set, photos, tmp_path, command, tiny_teachers):
    arguments = {
        "verify": (label_set,),
        "pull": (label_set, tmp_path / "out"),
        "publish": (label_set, tmp_path / "out", "--license", "cc0-1.0"),
        "convert": (label_set, tmp_path / "out", "--layout", "webdataset", "--images", photos),
        "merge": (label_set, label_set, tmp_path / "out"),
    }[command]
    if command == "merge":
        fd.build(
            photos, tmp_path / "other", teachers=["python:ferkd_tiny_teachers:third"], crops=10, crops_per_block=4,
            top_k=4, images_per_shard=8, device="cpu",
        )  # fmt: skip
        arguments = (label_set, tmp_path / "other", tmp_path / "out")
    screens, status = on_a_terminal(ferkd_data(command, *arguments), 80)
    assert status == 0, screens[-1]
    head = next(line for line in screens[-1] if line.startswith(f"{command} "))
    below = screens[-1][screens[-1].index(head) + 1]
    assert "100 %" in head
    assert re.search(r"(\d+) of \1 files", below) and re.search(r"(B|bytes|images)/s", below), below
    # Files, bytes and rate of each of them in the same place, on 80 columns, whatever the amounts are.
    assert ("images" in head and "B · " in below) or re.search(r"B of [\d.]+ .?B", head)


@pytest.mark.parametrize("columns", [80, 48])
def test_a_transfer_says_all_from_its_start(label_set, tmp_path, columns):
    """Of a slow server: the second screen of numbers has files, bytes and time, long before the first file is whole."""

    def pause(name):
        if name.endswith(".parquet"):
            server.in_the_middle = None
            time.sleep(4)  # seconds in which a busy machine draws at least one screen

    with serve(label_set) as server:
        server.in_the_middle = pause
        screens, status = on_a_terminal(ferkd_data("pull", server.url, tmp_path / "out", "--threads", 1), columns)
    assert status == 0, screens[-1]
    texts = ["\n".join(screen) for screen in screens]
    started = [text for text in texts if re.search(r"\b0 of \d+ files", text)]
    assert started and re.search(r"0 bytes of [\d.]+ kB", started[0])
    assert any(re.search(r"[1-9][\d.]* (bytes|kB) of ", text) and "/s" in text and "left" in text for text in started)
    for screen in screens:
        assert sum(" files · " in line for line in screen) <= 1
