"""Figures and names as commands print them: rounding never turns nearly all into all, and no name ends a command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from label_sets import edit_manifest

import ferkd_data as fd
from ferkd_data.exchange.card import render_card
from ferkd_data.words import in_percent, percent
from ferkd_data_cli import terminal
from ferkd_data_cli.options import print_json
from ferkd_data_cli.terminal import say_table


def test_only_nothing_is_shown_as_0_and_only_all_as_100_percent():
    shares = (0, 0.0004, 0.123, 0.9996, 1)
    assert [percent(share) for share in shares] == ["0.0%", "<0.1%", "12.3%", ">99.9%", "100.0%"]
    assert [percent(share, 0) for share in (0.004, 0.98, 0.996)] == ["<1%", "98%", ">99%"]
    assert [in_percent(share, 2) for share in (0, 1e-6, 0.5, 1 - 1e-6, 1)] == [
        "0.00",
        "<0.01",
        "50.00",
        ">99.99",
        "100.00",
    ]
    # 0.05% is written as 0.1 or 0.0, as binary fractions have it.
    assert "0.0%" not in {percent(value / 10**6) for value in range(1, 2000)}
    assert "100.0%" not in {percent(1 - value / 10**6) for value in range(1, 2000)}


def test_every_share_is_written_by_the_one_function():
    """Python's own format makes 100.0% of 99.96%."""
    root = Path(fd.__file__).parent
    sources = [*root.rglob("*.py"), *Path(terminal.__file__).parent.rglob("*.py")]
    assert len(sources) > 100
    assert [path.name for path in sources if re.search(r":[^{}\n]*%\}", path.read_text(encoding="utf-8"))] == []


def test_a_card_never_makes_all_of_nearly_all(copy):
    def change(content):
        counted = content["statistics"]
        known = counted["crops_with_target"] = 10_000
        counted["top1_matches_target"] = known - 4
        counted["teacher_top1_matches_target"] = [known - 4, 4]
        counted["crops"], counted["bucket_counts"] = 100_000, [1, 0, 0, 99_999]
        counted["kept_prob_sum"] = 99_999.0

    edit_manifest(copy, change)
    labels = fd.open_labels(copy)
    card = render_card(labels, fd.CardFields(name="x", license="mit", published="2026-11-27"), "public")
    assert "the most probable class of >99.9% of the crops" in card
    assert "| 1 | >99.9% |" in card and "| 1 | <0.1% |" in card
    assert "| `extreme_hard` | 1 | <0.01 |" in card and "| `easy_positive` | 99,999 | >99.99 |" in card
    assert "hold >99.9% of the probability" in card


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
