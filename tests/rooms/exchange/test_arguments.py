"""What a caller gives wrongly is a UsageError that names the argument, before anything is read or written."""

from __future__ import annotations

import pytest

import ferkd_data as fd
from ferkd_data.errors import UsageError, check_at_least
from ferkd_data_cli.main import run

CARD = fd.CardFields(name="x", license="mit")


def import_fkd(labels, out, **changes):
    settings = {"images": labels, "num_classes": 10, "teacher": fd.FkdTeacher(name="x"), **changes}
    fd.import_fkd(labels, out, **settings)


WRONG = {
    "fkd crops_per_block": (import_fkd, "crops_per_block", 0),
    "fkd images_per_shard": (import_fkd, "images_per_shard", 0),
    "fkd top_k": (import_fkd, "top_k", 0),
    "fkd num_classes": (import_fkd, "num_classes", 1),
    "fkd more classes than the format": (import_fkd, "num_classes", 2**24 + 1),
    "fkd larger top_k than the format": (import_fkd, "top_k", 1001),
    "dr larger blocks than the format": (lambda a, b, **c: fd.import_dr(a, b, images=a, **c), "crops_per_block", 10**7),
    "relabel more crops": (lambda a, b, **c: fd.import_relabel(a, b, images=a, **c), "crops", 10**7),
    "convert larger blocks": (lambda a, b, **c: fd.convert(a, b, layout="parquet", **c), "crops_per_block", 10**7),
    "build larger top_k": (lambda *_, **c: fd.BuildSettings(**c), "top_k", 1001),
    "build larger blocks": (lambda *_, **c: fd.BuildSettings(**c), "crops_per_block", 10**7),
    "dr crops_per_block": (lambda a, b, **c: fd.import_dr(a, b, images=a, **c), "crops_per_block", 0),
    "dr images_per_shard": (lambda a, b, **c: fd.import_dr(a, b, images=a, **c), "images_per_shard", -1),
    "dr num_classes": (lambda a, b, **c: fd.import_dr(a, b, images=a, **c), "num_classes", 0),
    "convert crops_per_block": (lambda a, b, **c: fd.convert(a, b, layout="parquet", **c), "crops_per_block", 0),
    "convert half a block": (lambda a, b, **c: fd.convert(a, b, layout="parquet", **c), "crops_per_block", 2.5),
    "convert layout": (fd.convert, "layout", "zip"),
    "pull threads": (fd.pull, "threads", 0),
    "pull shards": (fd.pull, "shards", []),
    "publish threads": (lambda a, b, **c: fd.publish(a, str(b), card=CARD, **c), "threads", 0),
    "verify threads": (lambda a, _, **c: fd.verify(a, **c), "threads", -1),
    "verify max_faults": (lambda a, _, **c: fd.verify(a, **c), "max_faults", -1),
    "relabel sample": (lambda a, _, **c: fd.relabel(a, images=a, teachers=["x"], **c), "sample", 0),
    "relabel seed": (lambda a, _, **c: fd.relabel(a, images=a, teachers=["x"], **c), "seed", -1),
    "teacher size": (lambda *_, **c: fd.FkdTeacher(name="x", **c), "size", 0),
}


@pytest.mark.parametrize("case", WRONG)
def test_numbers_and_names_that_cannot_be_right(label_set, tmp_path, case):
    function, name, value = WRONG[case]
    with pytest.raises(UsageError, match=name):
        function(str(label_set), tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_one_path_is_not_several(label_set, tmp_path):
    with pytest.raises(UsageError, match="two label sets or more"):
        fd.merge(str(label_set), tmp_path / "out")


def test_what_was_not_given_is_not_checked():
    check_at_least(1, threads=None, sample=1)
    with pytest.raises(UsageError, match=r"^sample must be a whole number, at least 1; got 'many'$"):
        check_at_least(1, threads=None, sample="many")


def test_the_old_name_of_threads_goes_on_working_with_a_warning(label_set, tmp_path):
    with pytest.warns(DeprecationWarning, match="workers= is now called threads="):
        assert fd.verify(label_set, workers=1).ok
    with pytest.warns(DeprecationWarning, match="workers= is now called threads="):
        fd.pull(str(label_set), tmp_path / "out", workers=1)
    with pytest.warns(DeprecationWarning, match="threads="), pytest.raises(fd.FerkdError, match="threads must be"):
        fd.publish(label_set, str(tmp_path / "public"), workers=0)


@pytest.mark.parametrize("option", [("--workers", "1"), ("--workers=1",), ("--threads", "1")])
def test_the_old_option_goes_on_working_with_a_line_on_stderr(label_set, capsys, option):
    assert run(["verify", str(label_set), *option]) == 0
    assert ("--workers is now called --threads" in capsys.readouterr().err) == option[0].startswith("--workers")
    assert run(["verify", "--help"]) == 0
    assert "--workers" not in capsys.readouterr().out


WRITERS = {
    "convert": ["convert", "A", "OUT", "--layout", "parquet"],
    "convert --to fkd": ["convert", "A", "OUT", "--to", "fkd"],
    "convert --from fkd": ["convert", "FKD", "OUT", "--from", "fkd", "--images", "IMAGES", "--num-classes", "10"],
    "merge": ["merge", "A", "A", "OUT"],
    "pull": ["pull", "A", "OUT"],
    "report": ["report", "A", "OUT"],
}


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("url", ["s3://bucket/out", "gs://bucket/out", "https://example.org/out", "hf://datasets/a/b"])
def test_a_url_where_a_folder_is_wanted_is_not_taken_for_one(label_set, photos, tmp_path, monkeypatch, command, url):
    """As a path, it would be a folder `s3:` here, and the command would report what it wrote to `s3:/bucket/out`."""
    monkeypatch.chdir(tmp_path)
    fd.export_fkd(label_set, tmp_path / "fkd")
    names = {"A": str(label_set), "FKD": str(tmp_path / "fkd"), "IMAGES": str(photos), "OUT": url}
    more = ["--teacher", "x"] if "--from" in WRITERS[command] else []
    assert run([names.get(word, word) for word in WRITERS[command]] + more) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["fkd"]


def test_a_tilde_is_the_home_folder_for_every_function(label_set, photos, tmp_path, monkeypatch):
    """As it is for a build: a folder of the name ~ is not found again, and dangerous to remove."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))
    fd.publish(label_set, "~/public", card=CARD)
    fd.pull("~/public", "~/mine")
    fd.pull("~/public", "~/part", shards=[0])
    fd.convert("~/mine", "~/blocks", layout="parquet", crops_per_block=2)
    fd.merge(["~/mine", "~/mine"], "~/both")
    fd.export_fkd("~/mine", "~/fkd")
    (home / "classes.txt").write_text("\n".join(sorted(folder.name for folder in photos.iterdir())))
    teacher = fd.FkdTeacher(name="x")
    fd.import_fkd("~/fkd", "~/back", images=photos, num_classes=10, teacher=teacher, classes="~/classes.txt")
    for name in ("public", "mine", "part", "blocks", "both", "back"):
        assert fd.verify(f"~/{name}").ok and len(fd.open_labels(home / name)) == len(fd.open_labels(f"~/{name}"))
    assert not list(here.iterdir())


@pytest.mark.parametrize("name", ["with space", "100%25", "a#b?c", "Übung"])
def test_a_file_url_is_the_same_folder_for_every_function(label_set, tmp_path, monkeypatch, name):
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))
    public, mine = tmp_path / name, tmp_path / f"{name} mine"
    fd.publish(label_set, public.as_uri(), card=CARD)
    assert fd.open_labels(public.as_uri()).identity == fd.open_labels(public).identity
    fd.pull(public.as_uri(), mine.as_uri())
    assert fd.verify(mine).ok
    fd.convert(mine.as_uri(), (tmp_path / f"{name} blocks").as_uri(), layout="parquet", crops_per_block=2)
    assert fd.verify(tmp_path / f"{name} blocks").ok


def test_a_damaged_note_of_an_interrupted_publish_is_no_hindrance(label_set, tmp_path, monkeypatch):
    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))

    def cut(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fd.publish(label_set, str(tmp_path / "public"), card=CARD, on_progress=lambda p: cut(p) if p.files else None)
    for note in (tmp_path / "cache/publish").iterdir():
        note.write_bytes(b"\xff\xfe\x00" + note.read_bytes())
    fd.publish(label_set, str(tmp_path / "public"), card=CARD)
    assert fd.verify(tmp_path / "public").ok
