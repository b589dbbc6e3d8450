"""Commands run again: after success they end well and change nothing, after a kill at any moment they go on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from label_sets import SMALL, files_below, same_label_sets

import ferkd_data as fd
from ferkd_data import storage
from ferkd_data.errors import UsageError
from ferkd_data.format.progress import OnProgress
from ferkd_data_cli.main import run

SECOND = "python:ferkd_tiny_teachers:second"
GOLDEN = Path(__file__).parent.parent.parent / "golden/version-1"
CARD = fd.CardFields(name="tiny", license="mit", image_license="mit", published="2026-11-27")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def commands(label_set, tar_label_set, photos, tiny_teachers, tmp_path):
    """Every command that writes a folder, with what it writes to `out`."""
    fd.build(photos, tmp_path / "seed1", teachers=[tiny_teachers, SECOND], **{**SMALL, "seed": 1})
    fd.export_fkd(label_set, tmp_path / "fkd")
    out = str(tmp_path / "out")
    source = str(label_set)
    imported = ["--images", str(photos), "--num-classes", "10", "--teacher", "x"]
    return {
        "convert": ["convert", source, out, "--layout", "webdataset", "--images", str(photos)],
        "convert tars": ["convert", str(tar_label_set), out, "--layout", "parquet", "--crops-per-block", "4"],
        "convert --from fkd": ["convert", str(tmp_path / "fkd"), out, "--from", "fkd", *imported],
        "convert --to fkd": ["convert", source, out, "--to", "fkd", "--calibration", "ferkd"],
        "merge crops": ["merge", source, str(tmp_path / "seed1"), out],
        "publish": ["publish", source, out, "--license", "mit"],
        "pull": ["pull", source, out],
        "pull a part": ["pull", source, out, "--crops", "4"],
    }


NAMES = [
    "convert",
    "convert tars",
    "convert --from fkd",
    "convert --to fkd",
    "merge crops",
    "publish",
    "pull",
    "pull a part",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_has_ended_ends_well_again_and_changes_nothing(commands, tmp_path, capsys, name):
    assert run(commands[name]) == 0
    first = files_below(tmp_path / "out")
    times = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*") if path.suffix in (".parquet", ".tar")
    }
    capsys.readouterr()
    assert run(commands[name]) == 0
    assert files_below(tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in times} == times
    said = capsys.readouterr().out
    assert any(
        word in said for word in ("already finished", "already published", "already complete", "written for FKD")
    )


MINE = {
    "shards/00000.tar": b"my photos",
    "labels/00000-000.parquet": b"my labels",
    "README.md": b"my project",
    "LICENSE": b"my licence",
    "notes/.draft.tmp": b"my notes",
}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "publish"])
@pytest.mark.parametrize("mine", MINE)
def test_a_folder_of_somebody_elses_is_left_alone(commands, tmp_path, name, mine):
    """Also one that holds what looks like our own files: they would be written over."""
    file = tmp_path / "out" / mine
    file.parent.mkdir(parents=True)
    file.write_bytes(MINE[mine])
    assert run(commands[name]) == 2
    assert files_below(tmp_path / "out") == {mine: MINE[mine]}


@pytest.mark.parametrize("mine", ["labels/00000-000.parquet", "README.md", "LICENSE", "rejects.parquet"])
def test_publish_replaces_nobodys_files(label_set, tmp_path, capsys, mine):
    """In a project's own folder, a card in place of its README would be noticed too late."""
    source, out = shutil.copytree(label_set, tmp_path / "source"), tmp_path / "out"
    (source / "LICENSE").write_text("of the labels")
    (out / mine).parent.mkdir(parents=True)
    (out / mine).write_text("mine")
    command = ["publish", str(source), str(out), "--license", "mit"]
    for more in ([], ["--dry-run"]):
        assert run([*command, *more]) == 1
        assert f"holds '{mine}', which is not of this label set" in capsys.readouterr().err
    assert files_below(out) == {mine: b"mine"}
    assert run([*command, "--overwrite"]) == 0
    assert fd.verify(out).ok


def test_publish_and_pull_leave_other_files_and_folders_as_they_are(label_set, tmp_path):
    """Files that other programs are writing have names of the same kind as ours."""
    public, mine = tmp_path / "public", tmp_path / "mine"
    fd.publish(label_set, str(public), card=CARD)
    fd.pull(str(public), mine)
    others = ["notes/.draft.tmp", ".draft.tmp", f"another/.x.parquet.{os.getpid()}-0123abcd.tmp"]
    for folder in (public, mine):
        for other in others:
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).write_text("somebody's")
    fd.publish(label_set, str(public), card=CARD)
    fd.pull(str(public), mine)
    assert all((folder / other).exists() for folder in (public, mine) for other in others)


def test_a_pull_goes_on_where_one_of_other_settings_was_interrupted(label_set, tmp_path):
    """What it left, and what of it was damaged meanwhile, is ours to replace."""
    out = tmp_path / "out"

    def cut(progress):
        if progress.files == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fd.pull(str(label_set), out, crops=4, threads=1, on_progress=cut)
    damaged = next((out / "labels").rglob("*.parquet"))
    damaged.write_bytes(b"damaged")
    fd.pull(str(label_set), out)
    assert same_label_sets(label_set, out) and not list(out.rglob(".*"))


def test_a_text_of_ones_own_in_a_pulled_label_set_stays(label_set, tmp_path):
    public, mine = tmp_path / "public", tmp_path / "mine"
    fd.publish(label_set, str(public), card=CARD)
    (public / "LICENSE").write_text("theirs")
    fd.pull(str(public), mine)
    (mine / "LICENSE").write_text("mine")
    fd.publish(label_set, str(public), card=fd.CardFields(author="Lab"))
    fd.pull(str(public), mine)
    card = (mine / "README.md").read_text()
    assert "Published by Lab" in card, "a card that nobody edited is not the user's own text"
    for text in (card.replace("## Uses", "## My uses"), "What I use it for"):
        (mine / "README.md").write_text(text)
        fd.pull(str(public), mine)
        assert (mine / "README.md").read_text() == text
    assert (mine / "LICENSE").read_text() == "mine"


def test_an_interrupted_conversion_of_other_settings_is_named(label_set, tmp_path):
    def cut(progress):
        if progress.images:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fd.convert(label_set, tmp_path / "out", layout="parquet", crops_per_block=2, on_progress=cut)
    with pytest.raises(UsageError, match=r"with other settings .*crops_per_block 2.*; now .*crops_per_block 4"):
        fd.convert(label_set, tmp_path / "out", layout="parquet", crops_per_block=4)
    fd.convert(label_set, tmp_path / "out", layout="parquet", crops_per_block=2)
    assert same_label_sets(label_set, tmp_path / "out")
    assert fd.verify(tmp_path / "out").ok and not fd.verify(tmp_path / "out").warnings


KILLED = (
    "exchange/publish.py",
    "exchange/destinations.py",
    "format/out_folder.py",
    "exchange/convert.py",
    "exchange/merge.py",
    "exchange/pull.py",
)
WRITING = ("write_atomically",)


def killed_at(command: tuple[str, str, str], boundary: int) -> int:
    """Run a command, and die by SIGKILL before line number `boundary` after the last shard was written or sent.

    Returns the number of lines, where there are fewer.
    """
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        code = frame.f_code
        if not code.co_filename.endswith(KILLED) and code.co_name not in WRITING:
            return None
        if event == "line":
            seen += 1
            if seen == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def on_progress(progress):
        """From the end on, every line of these files is counted: tracing all before would take minutes."""
        if progress.files == progress.files_total:
            sys.settrace(trace)
            frame = sys._getframe(1)
            while frame is not None:
                frame.f_trace = trace if frame.f_code.co_filename.endswith(KILLED) else None
                frame = frame.f_back

    carry_out(*command, on_progress=on_progress)
    sys.settrace(None)
    return seen


def carry_out(kind: str, source: str, out: str, *, on_progress: OnProgress | None = None) -> None:
    if kind == "publish":
        fd.publish(source, out, card=CARD, threads=1, on_progress=on_progress)
    elif kind == "convert":
        fd.convert(source, out, layout="parquet", crops_per_block=2, on_progress=on_progress)
    elif kind == "merge":
        fd.merge([source, source], out, weights=[2, 1], on_progress=on_progress)
    else:
        fd.pull(source, out, crops=None if kind == "pull" else 2, threads=1, on_progress=on_progress)


def killed_everywhere(kind: str, source: str, folder: str, answer: Path) -> None:
    """One process for each boundary, forked from this one, which has everything loaded; writes how many there are."""
    boundary, status = 0, signal.SIGKILL
    # What is synced to disk survives a power cut; a killed process does not ask for it, and it takes most of the time.
    storage._sync = lambda path: None
    while status == signal.SIGKILL:
        boundary += 1
        child = os.fork()
        if child == 0:
            lines = killed_at((kind, source, f"{folder}/{boundary}"), boundary)
            os._exit(0 if lines < boundary else 1)
        status = os.waitpid(child, 0)[1]
    answer.write_text(f"{boundary} {status}")


@pytest.mark.parametrize("kind", ["publish", "convert", "merge", "pull", "pull a part"])
def test_a_kill_at_any_line_of_the_end_loses_nothing(kind, tmp_path, quick_process, monkeypatch):
    """By a real signal in a real process; then the same command in this one."""
    source = shutil.copytree(GOLDEN / "parquet", tmp_path / "source")
    arguments = (kind, str(source), str(tmp_path), tmp_path / "answer")
    process = quick_process.Process(target=killed_everywhere, args=arguments)
    process.start()
    process.join()
    monkeypatch.setattr(storage, "_sync", lambda path: None)
    boundaries, status = map(int, (tmp_path / "answer").read_text().split())
    assert status == 0 and boundaries > 25, "the last one has ended, and the end has more lines than that"
    for boundary in range(1, boundaries + 1):
        out = tmp_path / str(boundary)
        carry_out(kind, str(source), str(out))
        assert same_label_sets(tmp_path / str(boundaries), out), f"boundary {boundary}"
        verified = fd.verify(out)
        assert verified.ok and not verified.warnings, f"boundary {boundary}: {verified}"
        assert not list(out.rglob(".*")), f"boundary {boundary}"
    print(f"{kind}: killed at {boundaries - 1} lines")


def test_an_import_with_a_class_list_that_was_edited_is_another_one(label_set, photos, tmp_path):
    """Under its old name: taken for finished, the labels would keep the old order of classes."""
    fd.export_fkd(label_set, tmp_path / "fkd")
    classes, out = tmp_path / "classes.txt", tmp_path / "out"
    names = sorted(folder.name for folder in photos.iterdir())

    def import_again(out):
        teacher = fd.FkdTeacher(name="x")
        fd.import_fkd(tmp_path / "fkd", out, images=photos, num_classes=10, teacher=teacher, classes=classes)

    classes.write_text("\n".join(names))
    import_again(out)
    import_again(out)
    targets = [row.target for row in fd.open_labels(out)]
    classes.write_text("\n".join(reversed(names)))
    with pytest.raises(UsageError, match="holds another label set"):
        import_again(out)
    import_again(tmp_path / "new")
    assert [row.target for row in fd.open_labels(tmp_path / "new")] == [9 - target for target in targets]
