"""Workers are processes, threads are threads; the old names go on working, with a warning."""

from __future__ import annotations

import pytest
from label_sets import SMALL

import ferkd_data as fd
from ferkd_data.builder.prepare import make_request
from ferkd_data.errors import UsageError
from ferkd_data_cli import build as build_command
from ferkd_data_cli.main import run


@pytest.fixture
def asked(monkeypatch):
    """The keyword arguments that the command line hands to `build`, which does nothing."""
    calls = []

    def build(source, out, **arguments):
        calls.append({name: arguments[name] for name in ("workers", "threads", "batch_size") if name in arguments})
        raise UsageError("not built")

    assert build_command  # imported before: it reads the defaults of the real `fd.build`
    monkeypatch.setattr(fd, "build", build)
    return calls


def test_the_old_name_of_workers_is_taken_with_a_warning():
    with pytest.warns(DeprecationWarning, match="processes is deprecated, use workers"):
        assert fd.Resources(processes=3).workers == 3
    with pytest.warns(DeprecationWarning, match="use workers"):
        assert make_request("photos", "out", teachers=["timm:a"], processes=3).resources.workers == 3
    assert make_request("photos", "out", teachers=["timm:a"], workers=2, threads=3).resources == fd.Resources(
        workers=2, threads=3
    )
    with pytest.raises(UsageError, match="give workers alone"):
        fd.Resources(processes=3, workers=2)
    with pytest.raises(UsageError, match="give workers alone"):
        make_request("photos", "out", workers=2, processes=3)


def test_a_build_takes_the_old_name(photos, tiny_teachers, tmp_path):
    with pytest.warns(DeprecationWarning, match="use workers"):
        result = fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], processes=1, **SMALL)
    assert result.manifest.num_images == 20


@pytest.mark.parametrize("name", ["workers", "threads", "batch_size"])
def test_less_than_one_is_refused(name):
    with pytest.raises(UsageError, match=f"{name} must be at least 1, got 0"):
        fd.Resources(**{name: 0})


def test_threads_are_those_of_each_worker(monkeypatch):
    monkeypatch.setattr("ferkd_data.builder.settings.cores", lambda: 16)
    worker = fd.Resources(device="cpu", workers=4, threads=3, batch_size=5, teacher_timeout=7.0).local_worker()
    assert (worker.threads, worker.compute_threads, worker.batch_size, worker.teacher_timeout) == (3, 4, 5, 7.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--workers", "2", "--threads", "3"], {"workers": 2, "threads": 3}),
        (
            ["--workers", "auto", "--threads", "auto", "--batch-size=auto"],
            {"workers": None, "threads": None, "batch_size": None},
        ),
        ([], {}),
    ],
)
def test_options(asked, options, expected):
    assert run(["build", "photos", "out", "--teacher", "timm:a", *options]) == 2
    assert asked == [expected]


def test_the_old_option_is_hidden_and_works(asked, tmp_path, capsys):
    build = ["build", "photos", "out", "--teacher", "timm:a"]
    run([*build, "--processes", "2"])
    run([*build, "--processes=3"])
    (tmp_path / "build.toml").write_text("processes = 4\nthreads = 'auto'\n")
    run([*build, "--config", str(tmp_path / "build.toml")])
    assert asked == [{"workers": 2}, {"workers": 3}, {"workers": 4, "threads": None}]
    assert capsys.readouterr().err.count("--processes is now called --workers") == 3
    assert run(["build", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--processes" not in printed and "--workers N|auto" in printed


def test_a_number_of_workers_that_is_none(capsys):
    assert run(["build", "photos", "out", "--teacher", "timm:a", "--workers", "many"]) == 2
    assert "'many' is neither a whole number nor auto" in capsys.readouterr().err
