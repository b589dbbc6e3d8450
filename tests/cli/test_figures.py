"""Figures as commands print them: rounding never turns nearly all into all, or some into none."""

from __future__ import annotations

import json

import pytest

from ferkd_data_cli.options import print_json
from ferkd_data_cli.overview import share
from ferkd_data_cli.terminal import say_table


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
