from __future__ import annotations

import errno
import hashlib
import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferkd_data.errors import ImageError, LabelSetError, SourceError, StorageFullError, UsageError
from ferkd_data.images.retrying import UnansweredImageError
from ferkd_data.storage import (
    default_cache_dir,
    expand,
    image_digest,
    inside,
    is_url,
    open_binary,
    remove_leftovers,
    sha256_file,
    write_atomically,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_under_its_name_only_at_the_end(tmp_path):
    path = tmp_path / "new/a.bin"
    with write_atomically(path) as aside:
        aside.write_bytes(b"whole")
        assert aside.parent == path.parent and aside.name.startswith(".") and not path.exists()
    assert path.read_bytes() == b"whole" and names(path.parent) == ["a.bin"]


def test_two_writers_with_the_same_process_number_do_not_meet(tmp_path):
    """As on two machines that share the folder."""
    path = tmp_path / "a.bin"
    with write_atomically(path) as one, write_atomically(path) as two:
        one.write_bytes(b"one")
        two.write_bytes(b"two")
    assert path.read_bytes() == b"one" and names(tmp_path) == ["a.bin"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_aside(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), write_atomically(path) as aside:
        aside.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_file_and_folder_reach_the_disk_around_the_rename(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        fsync(descriptor)

    def note_replace(source, target):
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with write_atomically(tmp_path / "a") as aside:
        aside.write_bytes(b"x")
    assert steps == ["file", "rename", "folder"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota")])
def test_a_full_disk_says_where_and_what_to_do(tmp_path, error):
    with (
        pytest.raises(StorageFullError, match=r"a\.bin: no space left.*run the same command again") as caught,
        write_atomically(tmp_path / "a.bin") as aside,
    ):
        aside.write_bytes(b"half")
        raise error
    assert caught.value.__cause__ is error and names(tmp_path) == []


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(PermissionError), write_atomically(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")


def test_leftovers_of_killed_writers_go_and_files_stay(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/.00000-000.parquet.77-0123abcd.tmp").touch()
    (tmp_path / "labels/00000-000.parquet").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path / "labels") == ["00000-000.parquet"]


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1])
def test_digests(tmp_path, size):
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "a").write_bytes(data[:size])
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data[:size]).hexdigest()
    assert len(image_digest(data)) == 16
    assert image_digest(b"").hex() == "cae66941d9efbd404e4d88758ea67670"


BAD_NAMES = ["", "/etc/passwd", "..", "a/../../b", "a/..", "a\\b", "a\0b", "out", "out/x", "loop", "\ud800"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_outside_are_refused(tmp_path, name):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    with pytest.raises(LabelSetError, match="label set"):
        inside(folder, name)


def test_names_inside_are_paths(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "link").symlink_to("labels")
    assert inside(tmp_path, "labels/0.parquet") == tmp_path / "labels/0.parquet"
    assert inside(tmp_path, "link/0.parquet") == tmp_path / "link/0.parquet"


@given(st.text(alphabet="./\\a\0", max_size=12))
def test_whatever_the_name_the_path_is_inside_or_refused(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp()
    try:
        assert inside(folder, name).resolve().is_relative_to(folder.resolve())
    except LabelSetError:
        pass


def test_urls():
    assert is_url("s3://bucket/a.tar") and is_url("https://host/a.tar")
    assert not is_url("photos/a.tar") and not is_url("/photos/a:b")


def test_a_url_is_opened_with_seek():
    import fsspec

    with fsspec.open("memory://ferkd-test/a.bin", "wb") as stream:
        stream.write(b"0123456789")
    with open_binary("memory://ferkd-test/a.bin") as stream:
        stream.seek(4)
        assert stream.read(3) == b"456"


@pytest.mark.parametrize("path", ["nowhere/a.tar", "memory://ferkd-test/none", "nosuchprotocol://a", "a\0b"])
def test_what_cannot_be_opened_is_a_source_error(path):
    with pytest.raises(SourceError, match="cannot be opened"):
        open_binary(path)


def test_patterns(tmp_path):
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b[1].tar"):
        (tmp_path / name).touch()
    here = str(tmp_path)

    def found(pattern):
        return [name.removeprefix(f"{here}/") for name in expand(f"{here}/{pattern}")]

    assert found("a-{000..001}.tar") == ["a-000.tar", "a-001.tar"]
    assert found("a-*.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert found("a-{002,000}.tar") == ["a-002.tar", "a-000.tar"]
    assert found("{a-*,a-000}.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert found("b[1].tar") == ["b[1].tar"]
    assert expand("s3://x/{0..1}.tar") == ["s3://x/0.tar", "s3://x/1.tar"]


@pytest.mark.parametrize("pattern", ["*.none", "a-{000..009}.tar", "b.tar"])
def test_a_pattern_that_matches_nothing_is_an_error(tmp_path, pattern):
    (tmp_path / "a-000.tar").touch()
    with pytest.raises(SourceError, match="no such file"):
        expand(str(tmp_path / pattern))


def test_an_empty_variable_names_no_cache_folder(monkeypatch, tmp_path):
    """Containers often pass on variables that are empty: a relative folder would move with the working folder."""
    monkeypatch.delenv("FERKD_DATA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache/ferkd-data"


def test_a_cache_folder_may_begin_with_a_tilde_and_is_no_url(monkeypatch, tmp_path):
    """As it stands in a file of variables, which no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FERKD_DATA_CACHE", "~/cache")
    assert default_cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("FERKD_DATA_CACHE", "s3://bucket/cache")
    with pytest.raises(UsageError, match="s3://bucket/cache: is a URL; give a path on this host"):
        default_cache_dir()


@pytest.mark.parametrize("error", [ImageError("corrupt", "bad data"), UnansweredImageError("unreadable", "no answer")])
def test_an_image_error_passes_between_processes(error):
    """As one that user code meets in a worker of a pool: it comes back as it was, not as an error of unpickling."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert (again.reason, again.detail) == (error.reason, error.detail)
