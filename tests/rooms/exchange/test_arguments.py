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
