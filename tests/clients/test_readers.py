"""Every column of layout parquet, read by the libraries that are installed here, value by value.

Older versions of them are tried by scripts/readers_matrix.py, whose table is in docs/format.md.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ferkd_data.format import parquet

ROOT = Path(__file__).parent.parent.parent
MATRIX = runpy.run_path(str(ROOT / "scripts/readers_matrix.py"), run_name="matrix")
READERS = ROOT / "tests/clients/readers"
PYTHON = ["duckdb", "fastparquet", "pandas", "polars", "pyarrow", "datasets"]
SHAPES = {"small": (5, 4, 3), "with dictionaries": (400, 50, 5)}


@pytest.fixture(scope="module", params=SHAPES)
def block(request, tmp_path_factory):
    labels = MATRIX["block"](*SHAPES[request.param])
    path = tmp_path_factory.mktemp("block") / "block.parquet"
    parquet.write(path, labels)
    return path, MATRIX["expected"](labels)


def check(command, folder, wanted):
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    columns = json.loads(done.stdout.splitlines()[-1])["columns"]
    assert set(columns) == set(wanted)
    for name, values in wanted.items():
        assert columns[name] == values, name


@pytest.mark.parametrize("reader", PYTHON)
def test_a_python_library(block, tmp_path, reader):
    if importlib.util.find_spec(reader) is None:
        pytest.skip(f"{reader} is not installed; scripts/readers_matrix.py tries it in an environment of its own")
    path, wanted = block
    check([sys.executable, str(READERS / "read_with.py"), reader, str(path)], tmp_path, wanted)


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory):
    """hyparquet from npm; skipped where there is no npm, or where it cannot be reached."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("node")
    for command in (["npm", "init", "-y"], ["npm", "install", "hyparquet", "hyparquet-compressors"]):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"npm cannot install hyparquet: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def test_hyparquet(block, node_modules):
    path, wanted = block
    check(["node", str(READERS / "read_with.mjs"), "hyparquet", str(path)], node_modules, wanted)


def test_the_table_in_the_documentation_is_of_all_readers_and_says_yes():
    text = (ROOT / "docs/format.md").read_text(encoding="utf-8")
    table = text.partition(MATRIX["BEGIN"])[2].partition(MATRIX["END"])[0].splitlines()
    assert {line.split()[1] for line in table[2:]} == {library.name for library in MATRIX["LIBRARIES"]}
    assert len(table) - 2 == len(MATRIX["LIBRARIES"]) and not any("| no |" in line for line in table)
