"""Every command's exit status, stderr and --json, in real processes where that matters."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import label_sets
import pytest

import ferkd_data as fd
from ferkd_data_cli.main import COMMANDS, run

SMALL = ["--crops", "10", "--crops-per-block", "4", "--top-k", "4", "--images-per-shard", "8", "--device", "cpu"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(call, command):
    status, out, _ = call(command, "--help")
    assert status == 0 and out.startswith(f"Usage: ferkd-data {command}")


def test_help_is_light():
    code = "import sys; from ferkd_data_cli.main import run; run(['--help']); heavy = "
    code += "{'torch', 'timm', 'pyarrow', 'pydantic', 'rich', 'webdataset', 'numpy'} & set(sys.modules); "
    code += "sys.exit(f'imported {heavy}' if heavy else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("engine", [["--engine", "ray"], []])
def test_a_hint_decides_nothing(call, photos, tiny_teachers, tmp_path, monkeypatch, engine):
    """A driver without a GPU begins a build on the GPUs of a cluster."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # The command reads its defaults from fd.build when it is imported, which must be before that is replaced.
    importlib.import_module("ferkd_data_cli.build")
    begun = []

    def build(source, out, **changes):
        begun.append(changes["device"])
        raise fd.errors.BuildError("begun")

    monkeypatch.setattr(fd, "build", build)
    status, _, err = call("build", photos, tmp_path, "--teacher", tiny_teachers, "--device", "cuda", *engine)
    assert (status, begun) == (1, ["cuda"]) and "begun" in err and "no CUDA" not in err


def test_build_info_stats_show(call, photos, tiny_teachers, tmp_path):
    out = tmp_path / "out"
    status, text, err = call("build", photos, out, "--teacher", tiny_teachers, *SMALL)
    assert (status, "20 images x 10 crops" in text) == (0, True)
    assert "20/20 images" in err and "crops/s" in err
    assert err.count("hint: on a CPU") == 1 and "ferkd-data bench" in err

    status, text, _ = call("info", out)
    assert status == 0 and "top-4 of 10 classes" in text
    status, text, _ = call("info", out, "--json")
    assert json.loads(text)["num_crops"] == 10

    status, text, _ = call("stats", out)
    assert status == 0 and "0.95-1.00" in text and "easy_positive" in text and "FerKD paper" in text
    assert "right %" in text and "hint: a student trained on such labels alone" in text, "a teacher that guesses"
    status, text, _ = call("stats", out, "--json")
    content = json.loads(text)
    shares = [(one["crops"], one["right"]) for one in content["buckets"].values()]
    right = sum(crops * share for crops, share in shares if crops) / 200
    assert right == pytest.approx(100 * content["agreement_with_target"])
    assert len(content["p_max"]) == 12 and content["crops"] == 200 and len(content["worst_classes"]) == 5

    status, text, _ = call("show", out, "class3/photo0003", "--crops", "2")
    assert status == 0 and text.startswith("class3/photo0003 (64x48, class3)") and len(text.splitlines()) == 4
    status, text, _ = call("show", out, "--json")
    assert len(json.loads(text)["crops"]) == 8
    status, _, err = call("show", out, "nobody")
    assert status == 2 and "no image has the key 'nobody'; keys look like 'class0/photo0000'" in err


def test_build_json_and_rejects(call, make_photos, tiny_teachers, tmp_path):
    folder = make_photos(tmp_path / "photos", 10)
    (folder / "class0/broken.jpg").write_bytes(b"no")
    status, text, err = call(
        "build", folder, tmp_path / "out", "--teacher", tiny_teachers, "--json", "--workers", 1, *SMALL
    )
    assert status == 3
    assert json.loads(text)["rejects"] == 1
    status, _, err = call("build", folder, tmp_path / "b", "--teacher", tiny_teachers, "--on-error", "fail", *SMALL)
    assert status == 1 and "class0/broken" in err and len(err.strip().splitlines()[-1:]) == 1


def test_both_forms_of_thresholds(call, photos, tiny_teachers, tmp_path):
    for name, form in {"a": ["0.1", "0.2", "0.9"], "b": ["quantile:0.1,0.2,0.9"]}.items():
        status, _, _ = call("build", "--thresholds", *form, photos, tmp_path / name, "--teacher", tiny_teachers, *SMALL)
        assert status == 0
    assert fd.open_labels(tmp_path / "a").manifest.thresholds.mid == 0.2
    assert fd.open_labels(tmp_path / "b").manifest.thresholds.quantile == (0.1, 0.2, 0.9)


def test_dry_run(call, photos, tiny_teachers, tmp_path):
    status, text, _ = call("build", photos, tmp_path / "out", "--teacher", tiny_teachers, "--dry-run", *SMALL)
    assert status == 0 and "forwards      200" in text and not (tmp_path / "out").exists()
    status, text, _ = call("build", photos, tmp_path / "out", "--teacher", tiny_teachers, "--dry-run", "--json", *SMALL)
    assert json.loads(text)["crops"] == 200


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("evaluate", "--limit", 0), "limit must be a whole number, at least 1; got 0"),
        (("evaluate", "--limit", -5), "limit must be"),
        (("evaluate", "--diagnose", -1), "diagnose must be"),
        (("bench", "--seconds", "inf"), "seconds above 0"),
        (("bench", "--seconds", "nan"), "seconds above 0"),
        (("stats", "--classes", -3), "not in the range"),
    ],
)
def test_numbers_that_cannot_be_right(call, photos, label_set, tiny_teachers, command, message):
    """0 images were a division by zero, and -5 all images; an infinite measurement would never end."""
    name, *options = command
    given = {
        "evaluate": [photos, "--teacher", tiny_teachers],
        "bench": ["--teacher", tiny_teachers],
        "stats": [label_set],
    }
    status, _, err = call(name, *given[name], *options)
    assert status == 2 and message in err, err


def test_a_config_file(call, photos, tiny_teachers, tmp_path):
    config = tmp_path / "build.toml"
    config.write_text(f'teacher = ["{tiny_teachers}"]\ncrops = 6\ntop-k = 3\nthresholds = [0.1, 0.2, 0.9]\n')
    status, _, err = call("build", photos, tmp_path / "out", "--config", config, "--top-k", "2", "--device", "cpu")
    assert status == 0, err
    manifest = fd.open_labels(tmp_path / "out").manifest
    assert (manifest.num_crops, manifest.top_k, manifest.thresholds.mid) == (6, 2, 0.2)
    config.write_text("crop = 6")
    status, _, err = call("build", photos, tmp_path / "out2", "--config", config)
    assert status == 2 and "unknown setting 'crop'" in err
    config.write_text("crops = ")
    assert call("build", photos, tmp_path / "out2", "--config", config)[0] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crops = 2.5", "'2.5' is not a valid integer"),
        ("batch-size = 2.7", "'2.7' is neither a whole number nor auto"),
        ("crops = true", "crops must be a text, a number or a list of these, got True"),
        ("crops = {a = 1}", "crops must be a text"),
        ("crops = 2024-01-01", "crops must be a text"),
        ("log-json = true", "log-json must be a text"),
        ("overwrite = 2", "overwrite must be true or false, got 2"),
        ("scale = 5", "Takes 2 values but 1 was given"),
    ],
)
def test_what_a_config_file_cannot_say(call, photos, tiny_teachers, tmp_path, text, message):
    """Read by the rules of the command line: click alone would make 2 crops of 2.5, and 1 of true."""
    config = tmp_path / "build.toml"
    config.write_text(text)
    status, _, err = call("build", photos, tmp_path / "out", "--config", config, "--teacher", tiny_teachers)
    assert status == 2 and message in err, err
    assert not (tmp_path / "out").exists()


def test_one_teacher_in_a_config_file_needs_no_list(call, photos, tiny_teachers, tmp_path):
    config = tmp_path / "build.toml"
    config.write_text(f'teacher = "{tiny_teachers}"\ncrops = 2\noverwrite = true\n')
    status, _, err = call("build", photos, tmp_path / "out", "--config", config, "--device", "cpu")
    assert status == 0, err


def test_a_folder_that_is_a_file_is_said_without_surprise(call, label_set, tmp_path):
    """The system's own errors name the file; nothing about them is unexpected."""
    (tmp_path / "file").write_text("")
    status, _, err = call("report", label_set, tmp_path / "file/report.html")
    assert status == 1 and f"{tmp_path}/file" in err and "unexpected" not in err, err
    status, _, err = call("publish", label_set, tmp_path / "file", "--license", "mit")
    assert status == 2 and "is a file; give a folder" in err


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["build"], 2, "Missing argument"),
        (["nothing"], 2, "No such command"),
        (["build", "{photos}", "{out}", "--teacher", "keras:x"], 2, "must start with one of timm:"),
        (["build", "{photos}", "{out}", "--teacher", "{tiny}", "--crops", "0"], 2, "crops must be"),
        (["build", "{photos}", "{out}", "--teacher", "{tiny}", "--scale", "2", "3"], 2, "scale must be"),
        (["build", "{photos}", "{out}", "--teacher", "{tiny}", "--thresholds", "0.5"], 2, "thresholds must be"),
        (["build", "/nowhere", "{out}", "--teacher", "{tiny}"], 1, "no such folder or file"),
        (["build", "{photos}", "{out}", "--teacher", "{tiny}", "--device", "cuda:7"], 2, "no CUDA"),
        (["info", "/nowhere"], 1, "no manifest.json"),
        (["stats", "{photos}"], 1, "no manifest.json"),
        (["evaluate", "/nowhere", "--teacher", "{tiny}"], 1, "no such folder or file"),
    ],
)
def test_errors_are_one_line(call, photos, tiny_teachers, tmp_path, args, status, message):
    import torch

    if "cuda:7" in args and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    names = {"{photos}": photos, "{out}": tmp_path / "out", "{tiny}": tiny_teachers}
    found, out, err = call(*[names.get(arg, arg) for arg in args])
    assert found == status and message in err and out == ""
    assert err.startswith(("ferkd-data: ", "Usage: ")) and len(err.splitlines()) <= 4


def test_debug_shows_a_traceback(capsys):
    assert run(["info", "/nowhere", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_evaluate(call, photos, tiny_teachers):
    status, text, err = call(
        "evaluate", photos, "--teacher", tiny_teachers, "--teacher", "python:ferkd_tiny_teachers:second"
    )
    assert status == 0 and "ensemble (mean)" in text and "near chance" in err
    status, text, _ = call("evaluate", photos, "--teacher", tiny_teachers, "--json", "--diagnose", 0)
    content = json.loads(text)
    assert content["scores"][0]["images"] == 20 and 0 <= content["scores"][0]["ece"] <= 1


CONVERSIONS = {
    "layout": ["convert", "LABELS", "tars", "--layout", "webdataset", "--images", "PHOTOS"],
    "to": ["convert", "LABELS", "fkd", "--to", "fkd"],
    "from": ["convert", "fkd", "back", "--from", "fkd", "--images", "PHOTOS", "--teacher", "x", "--num-classes", "10"],
    "merge": ["merge", "LABELS", "other", "both"],
    "pull": ["pull", "LABELS", "mine"],
    "publish": ["publish", "LABELS", "public", "--license", "mit"],
    "verify": ["verify", "LABELS", "--json"],
}


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_goes_to_stderr(call, photos, label_set, tiny_teachers, tmp_path, monkeypatch, terminal):
    """On a terminal a live display, which ends with the work; elsewhere lines, here without the usual pause."""
    monkeypatch.setattr("ferkd_data_cli.display.LOG_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(tmp_path)
    fd.build(photos, "other", teachers=["python:ferkd_tiny_teachers:third"], **label_sets.SMALL)
    for name, command in CONVERSIONS.items():
        if terminal:
            monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        places = {"LABELS": label_set, "PHOTOS": photos}
        status, out, err = call(*(places.get(word, word) for word in command))
        assert status == 0, err
        if terminal:
            assert ("images" if name == "from" else "100 %") in err
        elif name in ("pull", "publish", "verify"):
            assert re.search(r"([\d.]+ kB) of \1, (\d+) of \2 files, [\d.,]+ \w+/s\n$", err)
        else:
            assert re.search(
                r"20 images, 1 file, [\d.]+ kB, .* images/s\n$" if name == "from" else r"20 of 20 images, .*/s\n$", err
            )
        assert "images/s" not in out and "MB/s" not in out
        if name == "verify":
            assert json.loads(out)["ok"]
        if terminal:
            assert "\x1b[" in err and "starting" in err


def test_an_interrupt_says_how_to_go_on(photos, tiny_teachers, tmp_path):
    command = [sys.executable, "-m", "ferkd_data_cli.main", "build", photos, tmp_path / "out"]
    command += ["--teacher", tiny_teachers, *SMALL]
    # A shell that starts the tests in the background has them ignore interrupts, and so would the build.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TINY_SLEEP": "3"},
        # Who runs these tests in the background of a shell ignores Ctrl-C, and so would the build.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/.build/plan.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().endswith("interrupted; run the same command again to resume")


@pytest.mark.parametrize(
    ("gpus", "teachers", "options", "expected"),
    [
        (4, ["timm:resnet50"], {}, "uses 1 of 4 GPUs; --device all"),
        (4, ["timm:resnet50"], {"device": "cuda"}, "uses 1 of 4 GPUs; --device all"),
        (4, ["timm:resnet50"], {"device": "all"}, ""),
        (4, ["timm:resnet50"], {"device": "cuda:2"}, ""),
        (4, ["timm:resnet50"], {"engine": "ray"}, ""),
        (4, ["timm:resnet50"], {"device": "cpu"}, "ONNX Runtime"),
        (1, ["timm:resnet50"], {}, ""),
        (0, ["timm:resnet50"], {}, "ONNX Runtime"),
        (0, ["onnx:a.onnx", "timm:resnet50"], {}, "ONNX Runtime"),
        (0, ["onnx:a.onnx"], {}, ""),
        (0, ["timm:resnet50"], {"compile": True}, ""),
        (0, ["timm:resnet50"], {"device": "cuda"}, ""),
    ],
)
def test_a_build_that_could_be_faster_says_so(gpus, teachers, options, expected, monkeypatch):
    """The numbers of GPUs are PyTorch's answers, replaced here: no machine of the tests has several."""
    from ferkd_data_cli.build import _hint

    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    hint = _hint(tuple(teachers), options)
    assert expected in hint if expected else not hint
