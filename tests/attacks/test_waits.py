"""Nothing waits for what may never come: special files are refused at once, and Ctrl-C ends every wait."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from label_sets import wait_until
from servers import serve

import ferkd_data as fd
from ferkd_data.errors import FerkdError, ForeignFileError
from ferkd_data.importers.foreign_arrays import load_arrays
from ferkd_data.label_set.files import ShardCache
from ferkd_data.storage import open_regular_stream, read_regular, sha256_file

pytestmark = pytest.mark.usefixtures("in_time")


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    # A socket's path has at most 107 bytes.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL = {"fifo": fifo, "socket": unix_socket}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_opened_by_nobody(kind, tmp_path):
    path = tmp_path / "x"
    SPECIAL[kind](path)
    for use in (open_regular_stream, sha256_file, lambda path: read_regular(path, 10)):
        with pytest.raises(fd.FerkdError, match="is not a regular file"):
            use(path)
    with pytest.raises(fd.FerkdError, match="is not a regular file"):
        sha256_file(Path("/dev/zero"))
    with pytest.raises(ForeignFileError, match="is not a regular file"):
        load_arrays(path)


PLACES = ["manifest.json", "README.md", "LICENSE", "manifest.json.sig", "labels/00000-000.parquet", "rejects.parquet"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", PLACES)
def test_special_files_in_a_label_set(copy, tmp_path, name, kind):
    SPECIAL[kind](copy / name)
    uses = {
        "pull": lambda: fd.pull(str(copy), tmp_path / "pulled"),
        "pull by URL": lambda: fd.pull(f"file://{copy}", tmp_path / "pulled"),
        "publish": lambda: fd.publish(copy, str(tmp_path / "public"), card=fd.CardFields(name="x", license="mit")),
    }
    for use, act in uses.items():
        with pytest.raises(FerkdError):
            act()
            pytest.fail(f"{use} passed")
    assert not (tmp_path / "pulled/manifest.json").exists() and not (tmp_path / "public/manifest.json").exists()


def test_special_files_where_something_is_written(copy, tmp_path):
    (tmp_path / "out").mkdir()
    fifo(tmp_path / "out/manifest.json")
    with pytest.raises(FerkdError, match="is not a regular file"):
        fd.pull(str(copy), tmp_path / "out")
    assert not fd.verify(copy).faults


def test_a_special_file_in_the_cache_is_replaced(label_set, tmp_path):
    with serve(label_set) as server:
        labels = fd.open_labels(server.url, cache_dir=tmp_path)
        entry = labels.manifest.shards[0].files[0]
        path = labels.open(entry).path
        fifo(path)
        labels.shard(0)
        assert path.is_file()
    assert isinstance(labels.reader.files.cache, ShardCache)


def test_special_files_among_foreign_labels(photos, tmp_path):
    (tmp_path / "labels/class0").mkdir(parents=True)
    for image in (photos / "class0").iterdir():
        fifo(tmp_path / f"labels/class0/{image.stem}.tar")
    with pytest.raises(fd.FerkdError):
        fd.import_fkd(
            tmp_path / "labels",
            tmp_path / "out",
            images=photos,
            num_classes=10,
            teacher=fd.FkdTeacher(name="x", size=224),
        )


@pytest.mark.parametrize("command", ["pull", "verify", "show"])
def test_ctrl_c_ends_a_wait_for_a_server(label_set, tmp_path, command):
    """The server sends the manifest, and of shards nothing: not for an hour, if need be."""
    free = threading.Event()
    asked = threading.Event()

    def wait(name):
        if name != "manifest.json":
            asked.set()
            free.wait(3600)

    with serve(label_set) as server:
        server.before_body = wait
        arguments = [command, server.url, *([str(tmp_path / "mine")] if command == "pull" else [])]
        environment = {**os.environ, "FERKD_DATA_CACHE": str(tmp_path / "cache")}
        program = subprocess.Popen(
            [sys.executable, "-m", "ferkd_data_cli.main", *arguments], env=environment, stderr=subprocess.PIPE
        )
        try:
            wait_until(asked.is_set)
            program.send_signal(signal.SIGINT)
            _, said = program.communicate(timeout=30)
        finally:
            program.kill()
            free.set()
    assert program.returncode == 130 and b"ferkd-data: interrupted" in said and b"Traceback" not in said
