"""Devices and FIFOs given as files to write to: refused, and still there afterwards."""

from __future__ import annotations

import os
import stat

import pytest

import ferkd_data as fd
from ferkd_data.errors import UsageError
from ferkd_data.storage import write_atomically
from ferkd_data_cli.main import run

COMMANDS = {
    "report": ("report", "LABELS", "TO"),
    "show": ("show", "LABELS", "KEY", "--images", "PHOTOS", "--image", "TO"),
    "metrics": ("build", "PHOTOS", "OUT", "--teacher", "TEACHER", "--metrics", "TO"),
}


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_fifo_is_not_replaced_by_a_file(name, fifo, label_set, photos, tiny_teachers, tmp_path, capsys):
    given = {
        "LABELS": label_set,
        "KEY": next(fd.open_labels(label_set).keys()),
        "PHOTOS": photos,
        "OUT": tmp_path / "out",
        "TEACHER": tiny_teachers,
        "TO": fifo,
    }
    assert run([str(given.get(word, word)) for word in COMMANDS[name]]) == 2
    assert f"{fifo}: is a device, a FIFO or a socket" in capsys.readouterr().err
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_neither_is_what_a_link_leads_to(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    with pytest.raises(UsageError, match="name a file to write to"), write_atomically(link):
        pytest.fail("nothing is written")
    assert link.is_symlink() and stat.S_ISCHR(link.stat().st_mode)
