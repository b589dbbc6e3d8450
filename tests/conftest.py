"""Small real material that many tests share. Everything is made once per session."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# The networks here are so small that threads would mostly wait for each other, and by default they do so spinning.
# Before torch is there, and for all processes that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import hypothesis
import numpy as np
import pytest
from label_sets import SMALL, SMALL_TARS
from markers import markers_of
from PIL import Image

from ferkd_data import extras

# The workers of loaders, and the tests' own processes, have torch and ferkd_data loaded when they start: seconds each.
# The first fork server of a session serves to its end, so this cannot wait for the test that needs it.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["ferkd_data.builder", "ferkd_data.label_set", "ferkd_data.loader"]
)

# A loaded machine takes a second where an idle one takes a millisecond: no example fails for its time.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        name = item.path.relative_to(tests).with_suffix("").as_posix()
        reasons = [str(marker.kwargs.get("reason", "")) for marker in item.iter_markers("skipif")]
        for marker in markers_of(name, reasons):
            item.add_marker(marker)


@pytest.fixture(scope="session")
def tiny_teachers() -> str:
    """Makes `python:ferkd_tiny_teachers:first` and its siblings importable, in subprocesses too."""
    folder = str(Path(__file__).parent / "teacher_modules")
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    importlib.import_module("ferkd_tiny_teachers")
    return "python:ferkd_tiny_teachers:first"


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Keep the garbage collector from running finalizers while a parser stands at the recursion limit.

    Any finalizer fails there, also one of another test, and pytest would count that as this test's failure.
    """
    gc.disable()
    yield
    gc.enable()


def write_photo(path: Path, number: int, size: tuple[int, int] = (64, 48)) -> None:
    """A smooth picture that differs by number."""
    noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def make_photos() -> Callable[..., Path]:
    """Fills a folder with class folders class0 .. class9 of small JPEGs."""

    def make(folder: Path, num_images: int = 20, classes: int = 10, size: tuple[int, int] = (64, 48)) -> Path:
        for number in range(num_images):
            write_photo(folder / f"class{number % classes}" / f"photo{number:04d}.jpg", number, size)
        return folder

    return make


@pytest.fixture(scope="session")
def make_greys() -> Callable[..., Path]:
    """Fills a folder with class folders of nearly even pictures: class 0 the darkest, as the teacher Brightness names
    them. The crops of one picture are alike."""

    def make(folder: Path, classes: int, each: int = 10) -> Path:
        for number in range(classes * each):
            target = number // each
            noise = np.random.default_rng(number).normal(255 * (target + 0.5) / classes, 3, (48, 64, 3))
            path = folder / f"class{target}" / f"grey{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(path)
        return folder

    return make


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory, make_photos: Callable[..., Path]) -> Path:
    """20 small JPEGs in 10 class folders; do not write here."""
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def real_photos() -> list[Path]:
    """20 ImageNet photos of 512x512; the class number is at the end of the name."""
    folder = extras.package_folder("foolbox", extra="demo", what_for="the tests")
    return sorted((folder / "data").glob("imagenet_*.jpg"))


@pytest.fixture(scope="session")
def label_set(tmp_path_factory: pytest.TempPathFactory, photos: Path, tiny_teachers: str) -> Path:
    """A finished label set of layout parquet: 20 images in 3 shards, 10 crops in 3 blocks, top-4 of 10 classes."""
    import ferkd_data as fd

    out = tmp_path_factory.mktemp("labels") / "out"
    fd.build(photos, out, teachers=[tiny_teachers, "python:ferkd_tiny_teachers:second"], **SMALL)
    return out


@pytest.fixture(scope="session")
def tar_label_set(tmp_path_factory: pytest.TempPathFactory, photos: Path, tiny_teachers: str) -> Path:
    """The same in layout webdataset."""
    import ferkd_data as fd

    out = tmp_path_factory.mktemp("labels") / "tars"
    teachers = [tiny_teachers, "python:ferkd_tiny_teachers:second"]
    fd.build(photos, out, teachers=teachers, layout="webdataset", **SMALL_TARS)
    return out


@pytest.fixture
def copy(label_set: Path, tmp_path: Path) -> Path:
    """`label_set`, to be damaged."""
    return shutil.copytree(label_set, tmp_path / "copy")


@pytest.fixture
def tar_copy(tar_label_set: Path, tmp_path: Path) -> Path:
    """`tar_label_set`, to be damaged."""
    return shutil.copytree(tar_label_set, tmp_path / "copy")


@pytest.fixture(scope="session")
def quick_process() -> multiprocessing.context.ForkServerContext:
    """Starts processes that have torch and ferkd_data loaded, but never used, and the environment of the first one."""
    return multiprocessing.get_context("forkserver")


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch, quick_process: multiprocessing.context.ForkServerContext) -> None:
    """The workers of builds start so too; what a test puts into the environment does not come to them."""
    monkeypatch.setattr(
        "ferkd_data.builder.workers.processes.multiprocessing.get_context", lambda method: quick_process
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: its status, and what it printed to stdout and stderr."""
    from ferkd_data_cli.main import run

    def call_(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return call_
