"""Every example runs on tiny real data, as a user would start it."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import ferkd_data as fd

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
"""On a port that is free."""
TINY = ["--epochs", "2", "--batch-size", "8", "--size", "32"]


def start(command, tmp_path, **environment):
    variables = {"FERKD_DATA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=tmp_path,
        env={**os.environ, **variables, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_examples_are_short():
    """But for those that are the format's text as a program."""
    for path in set(EXAMPLES.glob("*.py")) - set(EXAMPLES.glob("standalone_*.py")):
        assert len(path.read_text().splitlines()) < 100, path


TRAINING = sorted(path.name for path in EXAMPLES.glob("*.py") if "CropLoader(" in path.read_text())
COPIED = ("images", "targets", "crops", "soft")


@pytest.mark.parametrize("name", TRAINING)
def test_examples_are_as_fast_on_a_gpu_as_they_can_be(name):
    """Read, not run: no GPU is needed for it."""
    text = (EXAMPLES / name).read_text()
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    options = {id(call): {keyword.arg for keyword in call.keywords} for call in calls}
    methods = [call for call in calls if isinstance(call.func, ast.Attribute)]
    (loader,) = [call for call in methods if call.func.attr == "CropLoader"]
    assert "pin_memory" in options[id(loader)]
    # The calls of the test at an epoch's end copy what a DataLoader of the user gives.
    copies = [call for call in methods if call.func.attr == "to" and getattr(call.func.value, "id", "") in COPIED]
    waiting = [ast.unparse(call) for call in copies if "non_blocking" not in options[id(call)]]
    assert waiting in ([], ["images.to(device)"] * (name == "student.py"))
    assert copies or name == "lightning_module.py", "Lightning moves batches itself"
    # safetensors does not save such weights, and HF Trainer does not convert them.
    assert ("memory_format=torch.channels_last" in text) == (name != "hf_trainer.py"), "as the batches are"
    if "init_process_group" in text:
        assert 0 < text.find("torch.cuda.set_device(device)") < text.find("init_process_group")


def test_plain_ddp_on_two_processes_and_resumed(label_set, photos, tmp_path):
    command = [EXAMPLES / "plain_ddp.py", label_set, photos, *TINY, "--workers", "0"]
    printed = start_two(command, tmp_path, seen="first")
    assert "epoch 0: 5 steps, loss" in printed and "epoch 1: 5 steps, loss" in printed
    again = start_two([*command, "--epochs", "3"], tmp_path, seen="second")
    assert "epoch 2: 5 steps, loss" in again and "epoch 1" not in again
    assert trained_on(tmp_path, "first").total() == 160 and trained_on(tmp_path, "second").total() == 80


def test_timm_loop(label_set, photos, tmp_path):
    """20 images, 2 in a batch, in windows of 8 batches (spread) and a rest of 2."""
    printed = start([EXAMPLES / "timm_loop.py", label_set, photos, *TINY, "--workers", "1"], tmp_path)
    assert "epoch 0: 10 steps, loss" in printed and "epoch 1: 10 steps, loss" in printed


def test_multi_crop(photos, tiny_teachers, tmp_path):
    """20 images, 4 in a batch, with crops of two kinds; the same batches give the same student."""
    kinds = ["global:scale=0.4..1,size=48,n=4", "local:scale=0.05..0.4,size=32,n=6"]
    fd.build(photos, tmp_path / "labels", teachers=[tiny_teachers], crop_kinds=kinds, top_k=4, device="cpu")
    options = ["--epochs", "2", "--batch-images", "4", "--model", "resnet10t", "--kinds", "global=2", "local=3"]
    command = [EXAMPLES / "multi_crop.py", tmp_path / "labels", photos, *options]
    printed = start([*command, "--sizes", "global=40", "--workers", "0"], tmp_path)
    losses = [float(loss) for loss in re.findall(r"epoch \d: 5 steps, loss ([\d.]+)", printed)]
    assert len(losses) == 2 and losses[1] < losses[0]
    again = start([*command, "--sizes", "global=40", "--workers", "2"], tmp_path)
    assert again == printed and (tmp_path / "student.pt").exists()


def test_lightning_module(label_set, photos, tmp_path):
    """20 images, 2 in a batch, 2 epochs; then from a checkpoint in the middle of the second."""
    command = [EXAMPLES / "lightning_module.py", label_set, photos, *TINY, "--workers", "0", "--save-steps", "14"]
    assert "step 20: loss " in start_recorded(command, tmp_path, seen="first")
    (checkpoint,) = (tmp_path / "trained").glob("*step=14*.ckpt")
    assert "step 20: loss " in start_recorded([*command, "--resume", checkpoint], tmp_path, seen="second")
    whole = crops_of_epochs(label_set, photos, tmp_path, [0, 1])
    assert trained_on(tmp_path, "first", ranks=1) == whole
    rest = trained_on(tmp_path, "second", ranks=1)
    assert rest <= whole and rest.total() == 6 * 8


RECORDER = """
import hashlib, os, runpy, sys
import ferkd_data as fd

normalize = fd.normalize

def recorded(images, **settings):
    with open(f"{os.environ['SEEN']}-{os.environ.get('RANK', 0)}.txt", "a") as file:
        file.writelines(hashlib.sha1(image.numpy().tobytes()).hexdigest() + "\\n" for image in images.cpu())
    return normalize(images, **settings)

fd.normalize = recorded
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_recorded(command, tmp_path, *, seen):
    """One process; `trained_on` tells which crops came to its model."""
    (tmp_path / "recorder.py").write_text(RECORDER)
    return start([tmp_path / "recorder.py", *command], tmp_path, SEEN=seen)


def start_two(command, tmp_path, *, seen):
    """Two processes; `trained_on` tells which crops came to their models."""
    (tmp_path / "recorder.py").write_text(RECORDER)
    return start([*TORCHRUN, tmp_path / "recorder.py", *command], tmp_path, SEEN=seen)


def trained_on(tmp_path, seen, ranks=2):
    crops = [(tmp_path / f"{seen}-{rank}.txt").read_text().split() for rank in range(ranks)]
    assert len({len(part) for part in crops}) == 1
    return Counter(name for part in crops for name in part)


def crops_of_epochs(label_set, photos, tmp_path, epochs):
    """What one process sees of whole epochs."""
    loader = fd.CropLoader(fd.open_labels(label_set), images=photos, batch_size=8, size=32, cache_dir=tmp_path / "c")
    crops = Counter()
    for epoch in epochs:
        loader.set_epoch(epoch)
        crops.update(hashlib.sha1(image.numpy().tobytes()).hexdigest() for images, _ in loader for image in images)
    assert crops.total() == 80 * len(epochs)
    return crops


def test_accelerate_on_two_processes_repeats_and_skips_nothing(label_set, photos, tmp_path):
    command = [EXAMPLES / "accelerate_loop.py", label_set, photos, *TINY, "--workers", "0", "--checkpoint", "saved"]
    assert "epoch 0: 5 steps, loss" in start_two([*command, "--epochs", "1"], tmp_path, seen="first")
    again = start_two([*command, "--epochs", "2", "--resume"], tmp_path, seen="second")
    assert "epoch 1: 5 steps, loss" in again and "epoch 0" not in again
    assert trained_on(tmp_path, "first") == crops_of_epochs(label_set, photos, tmp_path, [0])
    assert trained_on(tmp_path, "second") == crops_of_epochs(label_set, photos, tmp_path, [1])


def test_hf_trainer_on_two_processes_resumes_after_the_last_batch(label_set, photos, tmp_path):
    """20 images, 2 in a rank's batch: 5 steps an epoch; resumed at step 4, and again nothing is repeated or skipped."""
    command = [EXAMPLES / "hf_trainer.py", label_set, photos, *TINY, "--epochs", "2", "--workers", "0"]
    command += ["--save-steps", "4"]
    assert "step 10: loss" in start_two(command, tmp_path, seen="first")
    place = tmp_path / "trained/checkpoint-8/loader.json"
    first = json.loads(place.read_text())["place"]
    for step in (8, 10):
        shutil.rmtree(tmp_path / f"trained/checkpoint-{step}")
    assert "step 10: loss" in start_two([*command, "--resume"], tmp_path, seen="second")
    assert json.loads(place.read_text())["place"] == first and (first["epoch"], first["images"]) == (1, 12)
    whole = trained_on(tmp_path, "first")
    assert whole == crops_of_epochs(label_set, photos, tmp_path, [0, 1])
    rest = trained_on(tmp_path, "second")
    assert rest <= whole and rest.total() == 6 * 16


@pytest.mark.parametrize("options", [
    ["--model", "mobilenetv3_small_050", "--mix", "self"],
    ["--model", "vit_tiny_patch16_224", "--mix", "strangers"],
    ["--model", "mobilenetv3_small_050", "--crops-per-image", "8"],
], ids=["cnn", "vit", "small data set"])  # fmt: skip
def test_student_from_scratch(label_set, photos, tmp_path, options):
    command = [EXAMPLES / "student.py", label_set, photos, "--val", photos, *TINY, "--workers", "0", *options]
    assert re.search(r"epoch 1: \d+ steps, loss \d\.\d+, top-1 \d+\.\d %", start(command, tmp_path))


def test_student_counts_with_the_class_numbers_of_the_label_set(label_set, tmp_path, make_photos, monkeypatch):
    """A folder with some of the classes only, whose own numbers are others."""
    monkeypatch.syspath_prepend(EXAMPLES)
    student = importlib.import_module("student")
    some = make_photos(tmp_path / "photos")
    for name in ("class0", "class3"):
        shutil.rmtree(some / name)

    class AlwaysSeven(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(torch.full((len(images),), 7), 10).float()

    right = student.top1(AlwaysSeven(), some, fd.open_labels(label_set), 32, "cpu")
    assert right == pytest.approx(100 / 8)


def test_many_students_of_one_pass(label_set, photos, tmp_path):
    models = ["mobilenetv3_small_050", "resnet10t"]
    printed = start(
        [EXAMPLES / "many_students.py", label_set, photos, *TINY, "--workers", "0", "--models", *models], tmp_path
    )
    assert re.search(r"epoch 1: loss mobilenetv3_small_050 \d\.\d+, resnet10t \d\.\d+", printed)
    assert sorted(path.stem for path in (tmp_path / "students").iterdir()) == sorted(models)


def test_own_teacher_labels_and_a_pretrained_model_is_fine_tuned(photos, tmp_path):
    """Your own classes from photos to a student: the teacher, its label set, and a model that learns from it."""
    pytest.importorskip("efficientnet_lite_pytorch"), pytest.importorskip("onnxscript")
    printed = start([EXAMPLES / "own_teacher.py", photos, "--views", "3", "--epochs", "30", "--workers", "0"], tmp_path)
    assert "classes: class0, class1" in printed and "teacher: onnx:own_teacher.onnx" in printed
    teacher = f"onnx:{tmp_path / 'own_teacher.onnx'}"
    fd.build(photos, tmp_path / "labels", teachers=[teacher], crops=4, device="cpu")
    labels = fd.open_labels(tmp_path / "labels")
    assert labels.class_names == tuple(f"class{number}" for number in range(10))
    assert labels.statistics.top1_matches_target > 16, "twice what chance would give, of photos of noise"
    weights = tmp_path / "fine_tuned.pt"
    command = [EXAMPLES / "fine_tune.py", tmp_path / "labels", photos, *TINY, "--workers", "0", "--out", weights]
    assert "epoch 1: 10 steps, loss" in start(command, tmp_path)
    assert torch.load(weights, weights_only=True)["_fc.weight"].shape == (10, 1280)


HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    print("of", path)
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, path
"""


def test_help_works_without_data(tmp_path):
    """In one process for all of them: most of the time goes into imports."""
    examples = sorted(path for path in EXAMPLES.glob("*.py") if "argparse" in path.read_text())
    _, *printed = start(["-c", HELP, *examples], tmp_path).split("of /")
    assert len(printed) == len(examples) > 3
    assert all("usage:" in text and "photos" in text for text in printed)


def test_look_notebook(label_set, photos, tmp_path):
    """Executed in a real kernel, with the tiny label set in place of the demo's; its pictures come out."""
    pytest.importorskip("nbclient"), pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    path = EXAMPLES / "look.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "committed without outputs"
    fd.build(
        photos, tmp_path / "other", teachers=["python:ferkd_tiny_teachers:third"], crops=10, crops_per_block=4, top_k=4,
        images_per_shard=8, device="cpu",
    )  # fmt: skip
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    places = {"LABELS": label_set, "PHOTOS": photos, "OTHER_LABELS": tmp_path / "other"}
    parameters.source = "\n".join(f"{name} = {str(value)!r}" for name, value in places.items())
    (tmp_path / "look.ipynb").write_text(nbformat.writes(notebook))
    program = "import sys, nbformat, nbclient; notebook = nbformat.read(sys.argv[1], as_version=4);"
    program += "nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3').execute();"
    program += "nbformat.write(notebook, sys.argv[1])"
    start(["-c", program, tmp_path / "look.ipynb"], tmp_path)
    executed = nbformat.read(tmp_path / "look.ipynb", as_version=4)
    shown = [output.get("data", {}) for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in data for data in shown) == 2
    assert sum("<table>" in str(data.get("text/html", "")) for data in shown) == 2
    assert (tmp_path / "report.html").exists() and (tmp_path / "batch.html").exists()
