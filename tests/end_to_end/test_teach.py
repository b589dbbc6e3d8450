"""benchmarks/teach: its arithmetic, and a whole comparison on tiny photos that is interrupted and goes on."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import ferkd_data as fd

TEACH = Path(__file__).parent.parent.parent / "benchmarks/teach"


@pytest.fixture
def teach(monkeypatch):
    """Import a module of the benchmark."""
    monkeypatch.syspath_prepend(TEACH)
    return importlib.import_module


def test_the_interval_of_paired_differences_is_students_t(teach):
    """1, 2, 3, 4, 5: mean 3, standard deviation sqrt(2.5), t(4) = 2.776."""
    mean, half = teach("summary").interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert teach("summary").interval([7.0]) == (7.0, math.inf)


def test_differences_are_paired_by_seed_and_small_ones_are_called_none(teach):
    """Seed 3 counts for nothing, since the base lacks it. 2, 2.2 and 2.4: mean 2.2, deviation 0.2, t(2) = 4.303."""
    top1 = {"a": [50, 60, 55], "b": [52, 62.2, 57.4, 99], "c": [52, 59, 56], "d": [53, 63]}
    runs = [
        {"method": method, "seed": seed, "top1": value}
        for method, values in top1.items()
        for seed, value in enumerate(values)
    ]
    difference = teach("summary").difference
    assert difference(runs, "b", "a") == "+2.2 ± 0.5"
    assert difference(runs, "c", "a") == "+0.7 ± 3.8 (none)"
    assert difference(runs, "d", "a") == "+3.0", "two seeds have no interval"
    assert difference(runs, "a", "a") == ""


def test_the_learning_rate_rises_and_falls_to_nothing(teach):
    train = teach("train")
    setup = train.Setup(labels="", train="", val="", steps=100, lr=1.0, warmup=0.1)
    rates = [train.learning_rate(setup, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:])) and 0 < rates[-1] < 0.001


def test_a_comparison_goes_on_where_it_was_cut_off(label_set, photos, tmp_path):
    """Two methods, two seeds, four steps; then with half a line at the end of the file, as a kill leaves it."""
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"class{number}\n" for number in range(10)))
    whole = fd.CropDistribution(scale=(1, 1), ratio=(1, 1), hflip=0)
    teachers = ["python:ferkd_tiny_teachers:first"]
    fd.build(photos, tmp_path / "val", teachers=teachers, crops=1, distribution=whole, device="cpu")
    runs = tmp_path / "runs.jsonl"
    options = ["--labels", label_set, "--train", photos, "--val", photos, "--val-labels", tmp_path / "val"]
    options += ["--classes", classes, "--runs", runs, "--steps", "4", "--seeds", "2", "--jobs", "1", "--fp32"]
    options += ["--batch-size", "16", "--methods", "hard,ferkd+selfmix,ferkd/ten-classes"]

    def compare() -> str:
        command = [sys.executable, TEACH / "run.py", *options]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    first = compare()
    lines = runs.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    for line in map(json.loads, lines):
        assert [point["step"] for point in line["curve"]] == [1, 2, 3, 4]
        assert 0 <= line["top1"] <= 100 and 0 <= line["agreement"] <= 100 and line["cpu_seconds"] > 0
    runs.write_text("".join(lines[:-1]) + lines[-1][:40])
    again = compare()
    assert again.count("top-1") == 2 and again.startswith("1/1 "), "one run anew, and the head of the table"
    table = [row for row in again.splitlines() if row.startswith("| ") and "seed 0" not in row]
    assert len(list(map(json.loads, runs.read_text().splitlines()))) == 6, "the half line is gone"
    assert any(row.startswith("| hard | 2 |") for row in table) and "| hard | 2 |" in first

    figure = tmp_path / "figure.svg"
    third = [json.loads(line) | {"seed": 2} for line in runs.read_text().splitlines() if '"seed": 1' in line]
    with runs.open("a") as file:
        file.writelines(json.dumps(run | {"top1": run["top1"] + 1}) + "\n" for run in third)
    subprocess.run(
        [sys.executable, TEACH / "figure.py", runs, figure, "--curves", "hard,ferkd+selfmix"], check=True, timeout=60
    )
    drawn = ElementTree.fromstring(figure.read_text())
    assert len(drawn.findall("{*}polyline")) == 2 and len(drawn.findall("{*}g")) == 2


def test_buckets_count_what_the_label_set_stores(label_set, teach, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["buckets.py", str(label_set)])
    teach("buckets").main()
    printed = capsys.readouterr().out.splitlines()
    rows = [row.strip("|").split("|") for row in printed if row.startswith("| all |")]
    assert [row[1].strip() for row in rows] == ["200", "200"]
    statistics = fd.open_labels(label_set).statistics
    assert float(rows[0][3]) == pytest.approx(100 * statistics.top1_matches_target / 200, abs=0.06)
    ways = {row.split("|")[1].strip(): [float(cell) for cell in row.split("|")[2:5]] for row in printed[-12:]}
    assert ways["hard"] == [100, 100, 100]
    assert ways["fkd"][:2] == pytest.approx([100, float(rows[0][3])], abs=0.06)
    assert ways["ferkd"][0] == pytest.approx(100 * (1 - statistics.bucket_counts[0] / 200), abs=0.06)
