"""The end of a build: killed between any two of its steps it goes on, and run again afterwards it has ended already."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import sys
import tarfile
from dataclasses import fields

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_sets import edit_manifest, files_below, same_files
from PIL import Image

import ferkd_data as fd
from ferkd_data.builder import BuildSettings, build_part, finish
from ferkd_data.builder import run as run_module
from ferkd_data.builder.finished import _is_on_this_host, _saved
from ferkd_data.errors import BuildError, ManifestError, SettingsMismatchError
from ferkd_data_cli.main import run

TINY = {"crops": 4, "crops_per_block": 2, "top_k": 3, "images_per_shard": 3, "device": "cpu", "workers": 1}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")


@pytest.fixture(scope="module")
def few(tmp_path_factory, make_photos):
    return make_photos(tmp_path_factory.mktemp("few"), 10)


def die_before_step(step, from_the_end, work, *arguments):
    """Kill this process before its `step`-th change to a file system, counted from the end of a build or from here."""
    count = 0
    seal = run_module._seal

    def see(event, details):
        nonlocal count
        if event in CHANGES or (event == "open" and isinstance(details[2], int) and details[2] & WRITING):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(*details):
        sys.addaudithook(see)
        return seal(*details)

    if from_the_end:
        run_module._seal = watched
    else:
        sys.addaudithook(see)
    work(*arguments)


def build(few, out, teacher, settings):
    fd.build(few, out, teachers=[teacher], **settings)


def extend(few, out, teacher, settings):
    fd.build(few, out, extend=True, crops=6, device="cpu")


def finish_by_hand(few, out, teacher, settings):
    finish(out)


def label_all(monkeypatch, work, *arguments):
    """Everything but the end."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "_seal", stop)
        work(*arguments)


QUANTILES = fd.QuantileThresholds(low=0.1, mid=0.3, top=0.8)


@pytest.mark.parametrize(
    ("work", "settings"),
    [
        (build, {}),
        (build, {"thresholds": QUANTILES, "layout": "webdataset"}),
        (extend, {}),
        (finish_by_hand, {}),
        (finish_by_hand, {"thresholds": QUANTILES}),
    ],
    ids=["build", "quantiles in tars", "extend", "finish", "finish quantiles"],
)
def test_a_kill_before_any_step_of_the_end(few, tiny_teachers, tmp_path, monkeypatch, quick_process, work, settings):
    """Each of them, with a real process and SIGKILL: the next run ends well, with the bytes of an undisturbed build."""
    settings = TINY | settings
    whole, labelled, out = tmp_path / "whole", tmp_path / "labelled", tmp_path / "out"
    arguments = [few, whole, tiny_teachers, settings]
    build(*arguments)
    if work is extend:
        shutil.copytree(whole, labelled)
        extend(*arguments)
    label_all(monkeypatch, extend if work is extend else build, few, labelled, tiny_teachers, settings)
    step = killed = 0
    while True:
        step += 1
        shutil.copytree(labelled, out)
        arguments = (step, True, work, few, out, tiny_teachers, settings)
        process = quick_process.Process(target=die_before_step, args=arguments)
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        if (out / "manifest.json").exists():
            assert fd.verify(out).ok
        else:
            with pytest.raises(ManifestError):
                fd.open_labels(out)
        if work is finish_by_hand and not (out / "manifest.json").exists():
            finish(out)
        else:
            work(few, out, tiny_teachers, settings)
        assert same_files(out, whole), step
        assert not list(out.rglob("*.tmp")) and fd.verify(out).warnings == ()
        shutil.rmtree(out)
    assert same_files(out, whole)
    assert killed >= 10, "the steps were not seen"


def flip_a_probability(path):
    """A bit of a stored probability, so that the file stays one that can be read."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_labels_that_rot_before_the_end_get_no_new_digest(few, tiny_teachers, tmp_path, monkeypatch, layout):
    """Thresholds by quantile write every shard anew: what was damaged meanwhile must not come out as whole."""
    settings = TINY | {"thresholds": QUANTILES, "layout": layout}
    whole, out = tmp_path / "whole", tmp_path / "out"
    build(few, whole, tiny_teachers, settings)
    label_all(monkeypatch, build, few, out, tiny_teachers, settings)
    damaged = sorted(path for name in ("labels", "shards") for path in (out / name).rglob("*.*"))[1]
    flip_a_probability(damaged)
    with pytest.raises(BuildError, match=rf"{damaged.name}: was damaged or changed since .* remove it and run"):
        build(few, out, tiny_teachers, settings)
    assert not (out / "manifest.json").exists()
    with pytest.raises(BuildError, match="was damaged or changed"):
        finish(out)
    damaged.unlink()
    build(few, out, tiny_teachers, settings)
    assert same_files(out, whole)


def arguments_of(few, out, teacher):
    options = ["--crops", "4", "--crops-per-block", "2", "--top-k", "3", "--images-per-shard", "3", "--device", "cpu"]
    return ["build", str(few), str(out), "--teacher", teacher, *options]


def test_the_same_command_after_the_end(few, tiny_teachers, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = arguments_of(few, out, tiny_teachers)
    assert run(command) == 0
    before = files_below(out)
    capsys.readouterr()

    def never(*_, **__):
        raise AssertionError("no teacher is needed to see that a build has ended")

    # A model of a library is known by its name; the user's own code is not.
    edit_manifest(out, lambda content: content["teachers"][0].update(spec="timm:resnet18"))
    command = arguments_of(few, out, "timm:resnet18")
    before = files_below(out)
    monkeypatch.setattr("ferkd_data.builder.prepare.load_teachers", never)
    assert run(command) == 0
    said = capsys.readouterr()
    # Nothing is listed again, and so it is said.
    assert "already finished" in said.out and f"ferkd-data verify {out} --images {few}` finds those" in said.err
    assert run(["finish", str(out)]) == 0
    assert "already finished" in capsys.readouterr().out
    assert run([*command, "--part", "1/2"]) == 0
    assert "already finished" in capsys.readouterr().out
    assert files_below(out) == before


def test_rejects_are_told_by_the_status_of_the_run_that_ends_the_build(make_photos, tiny_teachers, tmp_path, capsys):
    """A batch system that starts a job again must not see it fail for ever: 3 once, then 0 with a line."""
    photos = make_photos(tmp_path / "photos", 10)
    (photos / "class0/broken.jpg").write_bytes(b"no picture")
    command = arguments_of(photos, tmp_path / "out", tiny_teachers)
    assert run(command) == 3
    capsys.readouterr()
    assert run(command) == 0
    assert "1 image could not be used" in capsys.readouterr().err


def test_other_settings_images_or_teachers_are_not_taken_for_the_same(few, make_photos, tiny_teachers, tmp_path):
    out = tmp_path / "out"
    fd.build(few, out, teachers=[tiny_teachers], **TINY)
    before = files_below(out)
    for changes, message in (
        ({"crops": 5}, "crops: saved 4, now 5"),
        ({"seed": 1}, "seed: saved 0, now 1"),
        ({"max_pixels": 10**7}, "max_pixels: saved 89478485, now 10000000"),
        ({"thresholds": fd.Thresholds(low=0.1)}, r"thresholds\[0\]: saved 0.15, now 0.1"),
        ({"layout": "webdataset"}, "layout: saved 'parquet', now 'webdataset'"),
        ({"precision": "bf16"}, r"precision\[0\]: saved 'fp32', now 'bf16'"),
    ):
        with pytest.raises(SettingsMismatchError, match=f"finished label set with other settings: .*{message}"):
            fd.build(few, out, teachers=[tiny_teachers], **{**TINY, **changes})
    with pytest.raises(SettingsMismatchError, match=r"teachers\[0\].digest"):
        fd.build(few, out, teachers=["python:ferkd_tiny_teachers:second"], **TINY)
    with pytest.raises(SettingsMismatchError, match="number of teachers: saved 1, now 2"):
        fd.build(few, out, teachers=[tiny_teachers, "python:ferkd_tiny_teachers:second"], **TINY)
    other = make_photos(tmp_path / "few", 20)
    with pytest.raises(SettingsMismatchError, match="finished label set of other images"):
        fd.build(other, out, teachers=[tiny_teachers], **TINY)
    assert files_below(out) == before


def test_every_setting_is_compared(few, tiny_teachers, tmp_path):
    """A new field of BuildSettings has to be in the manifest, or a finished build would be taken for another."""
    out = tmp_path / "out"
    manifest = fd.build(few, out, teachers=[tiny_teachers], **TINY).manifest
    compared = _saved(manifest).keys() | {"distribution"}
    assert {field.name for field in fields(BuildSettings)} <= compared


def write_classes(path, numbers, *, names=""):
    path.write_text("".join(f"class{number}\t{names}{number}\n" for number in numbers))
    return path


def parquet_with_class_labels(few, to):
    """The file's own names are in another order than the teacher's classes."""
    photos = sorted(few.rglob("*.jpg"))
    images = [{"bytes": path.read_bytes(), "path": None} for path in photos]
    names = [f"class{number}" for number in reversed(range(10))]
    features = {"label": {"_type": "ClassLabel", "names": names}}
    table = pa.table({"image": images, "label": [names.index(path.parent.name) for path in photos]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    to.mkdir()
    pq.write_table(table, to / "images.parquet")
    return to


def tar_with_texts(few, to):
    to.mkdir()
    with tarfile.open(to / "images.tar", "w") as out:
        for path in sorted(few.rglob("*.jpg")):
            out.add(path, f"{path.stem}.jpg")
            label = tarfile.TarInfo(f"{path.stem}.cls")
            label.size = len(path.parent.name)
            out.addfile(label, io.BytesIO(path.parent.name.encode()))
    return to


@pytest.mark.parametrize("pack", [parquet_with_class_labels, tar_with_texts])
def test_classes_that_are_given_after_the_end_are_not_ignored(few, tiny_teachers, tmp_path, pack):
    """The first build's note asks for them; the ground truth of the finished set is wrong, or unknown."""
    source, out = pack(few, tmp_path / "packed"), tmp_path / "out"
    fd.build(source, out, teachers=[tiny_teachers], **TINY)
    classes = write_classes(tmp_path / "classes.txt", range(10))
    with pytest.raises(SettingsMismatchError, match="of other images, or of other classes of these"):
        fd.build(source, out, teachers=[tiny_teachers], classes=classes, **TINY)
    fd.build(source, out, teachers=[tiny_teachers], classes=classes, overwrite=True, **TINY)
    assert fd.build(source, out, teachers=[tiny_teachers], classes=classes, **TINY).already_finished
    # The form of the file is of no interest.
    pairs = {str(number): [f"class{number}", str(number)] for number in range(10)}
    (tmp_path / "classes.json").write_text(json.dumps(pairs))
    again = {"teachers": [tiny_teachers], **TINY}
    assert fd.build(source, out, classes=tmp_path / "classes.json", **again).already_finished
    renamed = write_classes(tmp_path / "renamed.txt", range(10), names="kind ")
    for changed in (renamed, None, write_classes(tmp_path / "turned.txt", reversed(range(10)))):
        with pytest.raises(SettingsMismatchError, match=r"digest of --classes: saved '|classes\[0\]"):
            fd.build(source, out, classes=changed, **again)


def test_a_label_set_that_does_not_say_whether_it_had_a_list_of_classes(few, tiny_teachers, tmp_path):
    out, classes = tmp_path / "out", write_classes(tmp_path / "classes.txt", range(10))
    arguments = {"teachers": [tiny_teachers], **TINY}
    fd.build(few, out, classes=classes, **arguments)
    edit_manifest(out, lambda content: content["source"].pop("classes_sha256"))
    assert fd.build(few, out, classes=classes, **arguments).already_finished
    renamed = write_classes(tmp_path / "renamed.txt", range(10), names="kind ")
    with pytest.raises(SettingsMismatchError, match=r"class_names\[0\]: saved '0', now 'kind 0'"):
        fd.build(few, out, classes=renamed, **arguments)


def test_the_same_images_at_another_place_are_the_same(few, tiny_teachers, tmp_path):
    out = tmp_path / "out"
    fd.build(few, out, teachers=[tiny_teachers], **TINY)
    shutil.copytree(few, tmp_path / "moved")
    assert fd.build(tmp_path / "moved", out, teachers=[tiny_teachers], **TINY).already_finished


def write_linear(file, seed):
    """Write a TorchScript teacher of 10 classes."""
    import torch

    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    file.parent.mkdir(exist_ok=True)
    torch.jit.script(module).save(str(file))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_the_same_path_elsewhere_is_another_teacher(few, tmp_path, monkeypatch):
    """Also one that is older than the labels: a relative path is read from another working folder."""
    out = tmp_path / "out"
    for number, place in enumerate(("here", "there")):
        write_linear(tmp_path / place / "teacher.pt", number)
        os.utime(tmp_path / place / "teacher.pt", (1e9, 1e9))
    shutil.copytree(tmp_path / "here", tmp_path / "copied")
    spec = "torchscript:teacher.pt?size=8&mean=0.5&std=0.5"
    monkeypatch.chdir(tmp_path / "here")
    fd.build(few, out, teachers=[spec], **TINY)
    assert fd.build(few, out, teachers=[spec], **TINY).already_finished
    monkeypatch.chdir(tmp_path / "copied")
    assert fd.build(few, out, teachers=[spec], **TINY).already_finished
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(SettingsMismatchError, match=r"teachers\[0\].digest"):
        fd.build(few, out, teachers=[spec], **TINY)
    with pytest.raises(SettingsMismatchError, match=r"teachers\[0\].digest"):
        build_part(few, out, part="1/2", teachers=[spec], **TINY)


def test_other_weights_of_a_python_teacher_are_seen(few, tiny_teachers, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fd.build(few, out, teachers=[tiny_teachers], **TINY)
    teachers = importlib.import_module("ferkd_tiny_teachers")
    monkeypatch.setattr(teachers, "first", teachers.second)
    with pytest.raises(SettingsMismatchError, match=r"teachers\[0\].digest"):
        fd.build(few, out, teachers=[tiny_teachers], **TINY)


def test_a_precision_that_was_chosen_by_another_host_is_no_difference(few, tiny_teachers, tmp_path):
    """A GPU chooses bf16; the labels are there, and right."""
    out = tmp_path / "out"
    fd.build(few, out, teachers=[tiny_teachers], **TINY)
    edit_manifest(out, lambda content: content["teachers"][0].update(precision="bf16"))
    assert fd.build(few, out, teachers=[tiny_teachers], **TINY).already_finished
    with pytest.raises(SettingsMismatchError, match="precision"):
        fd.build(few, out, teachers=[tiny_teachers], precision="fp32", **TINY)


@pytest.mark.parametrize(
    "spec",
    [
        "onnx:{0}/model.onnx",
        "torchscript:model.onnx",
        "timm:resnet18@model.onnx",
        "torchvision:resnet18@{0}/model.onnx",
        "hf:./folder",
        "hf:folder",
        "hf:mine@{0}/folder",
        "timm:local-dir:{0}/folder",
        "timm:local-dir:folder",
        "openclip:ViT-B-32@model.onnx?names=imagenet",
        "openclip:ViT-B-32?names={0}/model.onnx",
        "openclip:ViT-B-32?names=imagenet&templates=model.onnx",
        "python:module:function",
    ],
)
def test_teachers_that_a_text_does_not_tell(tmp_path, monkeypatch, spec):
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"old")
    monkeypatch.chdir(tmp_path)
    assert _is_on_this_host(fd.TeacherSpec.parse(spec.format(tmp_path)))


@pytest.mark.parametrize(
    "spec", ["timm:resnet18", "hf:google/vit-base-patch16-224", "openclip:ViT-B-32?names=imagenet"]
)
def test_a_library_s_model_is_told_by_its_name(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    assert not _is_on_this_host(fd.TeacherSpec.parse(spec))


def test_parts_are_not_advised_to_give_what_parts_refuse(few, tiny_teachers, tmp_path, capsys):
    out = tmp_path / "out"
    command = [*arguments_of(few, out, tiny_teachers), "--part", "1/2"]
    assert run(command) == 0
    assert run([*command, "--seed", "5"]) == 1
    said = capsys.readouterr().err
    assert "another folder, or empty OUT before the first part begins" in said and "--overwrite" not in said
    assert run([*command[:-1], "2/2"]) == 0 and run(["finish", str(out)]) == 0
    capsys.readouterr()
    assert run([*command, "--seed", "5"]) == 1
    said = capsys.readouterr().err
    assert "use another folder, or empty OUT before the first part begins" in said
    assert "--overwrite" not in said and "--extend" not in said
    (out / "labels/00001-001.parquet").unlink()
    assert run(command) == 1
    said = capsys.readouterr().err
    assert "bring them back, or empty OUT" in said and "--overwrite" not in said


def test_missing_files_of_a_finished_set_are_no_success(few, tiny_teachers, tmp_path):
    out = tmp_path / "out"
    fd.build(few, out, teachers=[tiny_teachers], **TINY)
    (out / "labels/00001-001.parquet").unlink()
    with pytest.raises(BuildError, match=r"1 of its 8 files are gone, such as labels/00001-001\.parquet"):
        fd.build(few, out, teachers=[tiny_teachers], **TINY)


def test_a_set_that_no_build_wrote_is_not_taken_for_this_build(few, tiny_teachers, tmp_path):
    out = tmp_path / "out"
    fd.build(few, out, teachers=[tiny_teachers], **TINY)
    edit_manifest(out, lambda content: content.update(merged_from=["a", "b"]))
    with pytest.raises(BuildError, match="that was merged, not built"):
        fd.build(few, out, teachers=[tiny_teachers], **TINY)


@pytest.mark.parametrize("in_parts", [False, True])
def test_every_image_rejected_writes_no_label_set_and_the_same_command_goes_on(
    make_photos, tiny_teachers, tmp_path, in_parts
):
    photos, out = make_photos(tmp_path / "photos", 10), tmp_path / "out"
    good = files_below(photos)
    for name in good:
        (photos / name).write_bytes(b"\xff\xd8\xff broken")

    def command():
        if not in_parts:
            return fd.build(photos, out, teachers=[tiny_teachers], **TINY)
        for part in ("1/2", "2/2"):
            build_part(photos, out, part=part, teachers=[tiny_teachers], **TINY)
        return finish(out)

    for _ in range(2):
        with pytest.raises(
            BuildError, match=r"every one of the 10 images was rejected \(10 truncated\).*rejects.parquet"
        ):
            command()
        assert not (out / "manifest.json").exists() and (out / ".build/rejects.parquet").exists()
        assert not (out / "rejects.parquet").exists()
        with pytest.raises(ManifestError):
            fd.verify(out)
    for name, data in good.items():
        (photos / name).write_bytes(data)
    assert command().manifest.num_images == 10
    fd.build(photos, tmp_path / "whole", teachers=[tiny_teachers], **TINY)
    assert same_files(out, tmp_path / "whole")


def test_a_kill_while_an_old_set_is_overwritten(few, tiny_teachers, tmp_path, quick_process):
    """More shards than the new build has: none of the old ones may stay."""
    old, out, whole = tmp_path / "old", tmp_path / "out", tmp_path / "whole"
    fd.build(few, old, teachers=[tiny_teachers], **{**TINY, "images_per_shard": 1})
    fd.build(few, whole, teachers=[tiny_teachers], **TINY)
    for step in (1, 2, 4, 7, 12, 20, 30):
        shutil.copytree(old, out)
        arguments = (step, False, build, few, out, tiny_teachers, {**TINY, "overwrite": True})
        process = quick_process.Process(target=die_before_step, args=arguments)
        process.start()
        process.join()
        if (out / "manifest.json").exists():
            assert fd.verify(out).ok
            fd.build(few, out, teachers=[tiny_teachers], overwrite=True, **TINY)
        else:
            fd.build(few, out, teachers=[tiny_teachers], **TINY)
        assert same_files(out, whole), step
        shutil.rmtree(out)


def test_nothing_is_left_where_no_build_began(few, tiny_teachers, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(fd.FerkdError):
        fd.build(few, out, teachers=["python:ferkd_tiny_teachers:eleven_classes"], **TINY)
    assert not out.exists()
    out.mkdir()
    fd.build(few, out, teachers=[tiny_teachers], **TINY)
    before = files_below(out)
    with pytest.raises(fd.FerkdError):
        fd.build(few, out, extend=True, crops=3, device="cpu")
    assert files_below(out) == before


def test_a_larger_pixel_limit_is_remembered(make_photos, tiny_teachers, tmp_path):
    """An image beyond the default limit: labelled, verified, loaded, and the limit kept for an extension."""
    photos, out = make_photos(tmp_path / "photos", 10), tmp_path / "out"
    Image.new("1", (9_500, 9_500), 1).save(photos / "class0/large.png")
    limits = {"max_pixels": 10**8, "layout": "webdataset"}
    result = fd.build(photos, out, teachers=[tiny_teachers], **{**TINY, **limits})
    assert result.rejects == 0 and result.manifest.max_pixels == 10**8
    assert fd.verify(out).ok
    loader = fd.CropLoader(fd.open_labels(out), batch_size=11, size=16, crops_per_image=1)
    assert [len(batch) for batch, _ in loader] == [11]
    make_photos(photos, 11)
    assert fd.build(photos, out, extend=True, device="cpu").manifest.num_images == 12


def test_a_picture_with_more_pixels_than_were_labelled_is_not_decoded(few, tiny_teachers, tmp_path, make_photos):
    photos, out = make_photos(tmp_path / "photos", 10), tmp_path / "out"
    fd.build(photos, out, teachers=[tiny_teachers], **TINY)
    Image.new("1", (60_000, 60_000)).save(photos / "class3/photo0003.jpg", "PNG")
    loader = fd.CropLoader(
        fd.open_labels(out), images=photos, batch_size=5, size=16, crops_per_image=1, verify_images="never"
    )
    with pytest.raises(fd.FerkdError, match="it is 60000x60000 pixels, 64x48 were labelled"):
        list(loader)
