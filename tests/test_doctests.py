"""The examples in the docstrings of public names run, and print what they say."""

from __future__ import annotations

import doctest
import inspect
import shutil
from pathlib import Path

import pytest

import ferkd_data as fd

GOLDEN = Path(__file__).parent / "golden/version-1/parquet"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples(name):
    thing = getattr(fd, name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return []
    found = doctest.DocTestFinder(recurse=inspect.isclass(thing)).find(thing, name, globs={})
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", [name for name in fd.__all__ if examples(name)])
def test_the_examples_of_a_public_name_run(name, tmp_path, monkeypatch):
    """`fd` and `labels`, a small label set, are at hand; files are written to a folder with another, with images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(GOLDEN.parent / "webdataset", "labels-with-images")
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in examples(name):
        test.globs.update(fd=fd, labels=fd.open_labels(GOLDEN), LABELS=str(GOLDEN), **{name: getattr(fd, name)})
        said = []
        runner.run(test, out=said.append)
        assert not runner.failures, "".join(said)
