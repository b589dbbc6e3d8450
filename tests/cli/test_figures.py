"""Figures and names as commands print them: rounding never turns nearly all into all, and no name ends a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import ferkd_data as fd
from ferkd_data_cli.options import print_json
from ferkd_data_cli.terminal import say_table, share


def test_only_nothing_is_shown_as_0_and_only_all_as_100_percent():
    assert [share(value) for value in (0, 0.0004, 0.123, 0.9996, 1)] == ["0.0%", "<0.1%", "12.3%", ">99.9%", "100.0%"]
    assert "0.0%" not in {share(value / 10**6) for value in range(1, 2000)}
    assert "100.0%" not in {share(1 - value / 10**6) for value in range(1, 2000)}


@pytest.mark.parametrize("cell", ["<0.1%", ">99.9%", "5.0%", ""])
def test_a_column_of_shares_is_aligned_to_the_right(cell, capsys):
    say_table(["share of all", "x"], [["100.0%", "a"], [cell, "b"]])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{cell:>12}  b"


def test_json_has_no_nan(capsys):
    """Python writes NaN, which jq, JavaScript and Go refuse."""
    print_json({"a": [1.5, float("nan")], "b": {"c": (float("inf"), None, "NaN")}})
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None], "b": {"c": [None, None, "NaN"]}}


def test_names_that_an_encoding_lacks_are_escaped(photos, tiny_teachers, tmp_path):
    """A pipe on Windows, or a locale of Latin-1: class names ended the command with a UnicodeEncodeError."""
    classes = tmp_path / "classes.txt"
    names = ["猫 🐈", *(f"Käse {n}" for n in range(1, 10))]
    classes.write_text("".join(f"class{n}\t{name}\n" for n, name in enumerate(names)), encoding="utf-8")
    out = tmp_path / "out"
    fd.build(photos, out, teachers=[tiny_teachers], classes=classes, crops=2, top_k=10, device="cpu")

    def printed(*args: str) -> str:
        command = [sys.executable, "-m", "ferkd_data_cli.main", "show", str(out), *args]
        environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        assert done.stderr == b""
        return done.stdout.decode("cp1252")

    labels = json.loads(printed("--json"))["crops"][0]["labels"]
    assert {label["name"] for label in labels} == set(names)
    assert "Käse" in printed()
