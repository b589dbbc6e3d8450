"""Teachers of every kind, with real models where they are available."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import sys
import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ferkd_data as fd
from ferkd_data import teachers
from ferkd_data.crops import Crops
from ferkd_data.demo import efficientnet_lite
from ferkd_data.errors import MissingExtraError, TeacherError, UsageError
from ferkd_data.images import decode_rgb
from ferkd_data.replay import replay
from ferkd_data.teachers import LoadTeacher, Preprocessing, TeacherSpec, load_teacher, load_teachers
from ferkd_data.teachers.onnx_models import export_onnx
from ferkd_data.teachers.spec import TEACHER_KINDS, TeacherKind, parse_specs

LITE = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
NAMES = st.text("abcXYZ019_-./", min_size=1, max_size=20)
POSITIVE = st.floats(1e-3, 1e3)
TRIPLES = st.tuples(POSITIVE, POSITIVE, POSITIVE)


@given(
    st.builds(
        TeacherSpec,
        kind=st.sampled_from(["timm", "torchvision", "python"]),
        name=NAMES,
        checkpoint=st.none() | NAMES,
        size=st.none() | st.integers(1, 999),
        interpolation=st.none() | st.sampled_from(["bilinear", "bicubic"]),
        mean=st.none() | TRIPLES,
        std=st.none() | TRIPLES,
        weight=POSITIVE,
        temperature=POSITIVE,
    )
)
def test_a_spec_survives_its_own_text(spec):
    assert TeacherSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("kind", TEACHER_KINDS)
def test_every_kind_has_a_loader_that_fulfils_the_protocol(kind):
    module, _, function = TEACHER_KINDS[kind].load.partition(".")
    source = Path(teachers.__file__).parent / f"{module}.py"
    # Read, not imported: the kind's library may be missing.
    found = {node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
    wanted = inspect.signature(LoadTeacher.__call__)
    assert [a.arg for a in found[function].args.args] == ["spec"] and list(wanted.parameters)[:2] == ["self", "spec"]
    assert [a.arg for a in found[function].args.kwonlyargs] == list(wanted.parameters)[2:]


def test_kinds_are_those_of_the_type():
    assert tuple(TEACHER_KINDS) == get_args(TeacherKind)


def test_parsing():
    spec = TeacherSpec.parse("onnx:a@b.onnx?size=224&mean=127/255&std=1,2,3&weight=2")
    assert (spec.kind, spec.name, spec.checkpoint, spec.size) == ("onnx", "a@b.onnx", None, 224)
    assert (spec.mean, spec.std, spec.weight) == ((127 / 255,) * 3, (1.0, 2.0, 3.0), 2.0)
    assert TeacherSpec.parse("timm:resnet50@w.pth").checkpoint == "w.pth"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet50", "must start with one of timm:"),
        ("keras:x", "must start with one of timm:"),
        ("timm:", "names no model"),
        ("timm:x?colour=1", "unknown option 'colour=1'"),
        ("timm:x?size", "unknown option 'size'"),
        ("timm:x?size=big", "size=big"),
        ("timm:x?mean=1,2", "one value, or three"),
        ("timm:x?mean=1/0", "mean=1/0"),
        ("timm:x?interpolation=nearest", "bilinear, bicubic"),
        ("timm:x?weight=0", "must be positive"),
    ],
)
def test_specs_that_cannot_be_right(text, message):
    with pytest.raises(UsageError, match=message):
        TeacherSpec.parse(text)


def central(photo, preprocessing):
    image = decode_rgb(photo.read_bytes())
    side = int(min(image.shape[:2]) * 0.875)
    box = [(image.shape[0] - side) // 2, (image.shape[1] - side) // 2, side, side]
    crops = Crops(boxes=np.array([box], np.uint16), flip=np.array([False]))
    return replay(image, crops, size=preprocessing.size, interpolation=preprocessing.interpolation)


def lite0():
    module = efficientnet_lite(0)
    module.preprocessing = {"size": 224, **LITE}
    return module


@pytest.fixture(scope="module")
def lite0_onnx(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "lite0.onnx"
    export_onnx(efficientnet_lite(0), path, preprocessing=Preprocessing(size=224, **LITE))
    return path


def test_the_real_teacher_through_two_runtimes(real_photos, lite0_onnx, monkeypatch):
    monkeypatch.setitem(sys.modules, "lite_teachers", sys.modules[__name__])
    eager = load_teacher(TeacherSpec.parse("python:lite_teachers:lite0"))
    fast = load_teacher(TeacherSpec.parse(f"onnx:{lite0_onnx}"))
    assert fast.preprocessing == eager.preprocessing
    batch = torch.cat([central(photo, eager.preprocessing) for photo in real_photos])
    targets = torch.tensor([int(photo.stem.rpartition("_")[2]) for photo in real_photos])
    logits = eager.logits(batch)
    assert logits.shape == (20, 1000) and logits.dtype == torch.float32
    assert int((logits.argmax(1) == targets).sum()) >= 17
    torch.testing.assert_close(fast.logits(batch), logits, atol=2e-3, rtol=1e-3)
    wrong = eager.renormalised((0.0,) * 3, (1 / 255,) * 3)
    assert int((wrong.logits(batch).argmax(1) == targets).sum()) < 10
    assert eager.preprocessing.mean == LITE["mean"]


def test_bf16_is_close(tiny_teachers):
    batch = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    spec = TeacherSpec.parse(tiny_teachers)
    full, half = load_teacher(spec), load_teacher(spec, precision="bf16")
    torch.testing.assert_close(half.logits(batch), full.logits(batch), atol=0.2, rtol=0.05)
    assert half.logits(batch).dtype == torch.float32


TIMM = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory):
    import timm
    from safetensors.torch import save_file

    module = timm.create_model(TIMM, num_classes=1000)
    folder = tmp_path_factory.mktemp("timm")
    save_file(module.state_dict(), str(folder / "w.safetensors"))
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in module.state_dict().items()}}, folder / "w.pth")
    return folder


def test_timm_with_a_local_checkpoint(timm_weights):
    a = load_teacher(TeacherSpec.parse(f"timm:{TIMM}@{timm_weights / 'w.safetensors'}"))
    b = load_teacher(TeacherSpec.parse(f"timm:{TIMM}@{timm_weights / 'w.pth'}?size=160"))
    assert a.digest == b.digest and len(a.digest) == 64
    assert (a.preprocessing.size, b.preprocessing.size) == (224, 160)
    assert a.preprocessing.interpolation == "bicubic"
    assert a.class_names is not None and a.class_names[0] == "tench"
    assert a.logits(torch.zeros(2, 3, 224, 224, dtype=torch.uint8)).shape == (2, 1000)


def test_torchvision_with_a_local_checkpoint(tmp_path):
    import torchvision

    module = torchvision.models.squeezenet1_1()
    torch.save(module.state_dict(), tmp_path / "w.pth")
    teacher = load_teacher(TeacherSpec.parse(f"torchvision:squeezenet1_1@{tmp_path / 'w.pth'}"))
    assert teacher.published_top1 == pytest.approx(0.58178)
    assert teacher.preprocessing.mean == (0.485, 0.456, 0.406)
    assert teacher.class_names is not None and len(teacher.class_names) == 1000


def test_torchscript(tmp_path, tiny_teachers):
    import ferkd_tiny_teachers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(ferkd_tiny_teachers.first(), torch.zeros(1, 3, 32, 32))
        torch.jit.save(script, str(tmp_path / "t.pt"))
    teacher = load_teacher(TeacherSpec.parse(f"torchscript:{tmp_path / 't.pt'}?size=32&mean=0.5&std=0.25"))
    batch = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(teacher.logits(batch), load_teacher(TeacherSpec.parse(tiny_teachers)).logits(batch))


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("/tmp/ferkd-data-checkpoint-ran"),)


def test_a_malicious_checkpoint_does_not_run(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Malicious()}, protocol=2))
    torch.save({"state_dict": Malicious()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(TeacherError, match="could run code"):
            load_teacher(TeacherSpec.parse(f"timm:{TIMM}@{tmp_path / name}"))
    assert not Path("/tmp/ferkd-data-checkpoint-ran").exists()


def test_checkpoints_of_another_model_name_the_keys(tmp_path, timm_weights):
    import timm

    torch.save(timm.create_model(TIMM, num_classes=7).state_dict(), tmp_path / "seven.pth")
    with pytest.raises(TeacherError, match=r"classifier.weight has shape \(7, 1024\), the model needs \(1000, 1024\)"):
        load_teacher(TeacherSpec.parse(f"timm:{TIMM}@{tmp_path / 'seven.pth'}"))
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(TeacherError, match=r"missing \d+ keys \(conv_stem.weight.*unexpected 1 keys \(conv.weight\)"):
        load_teacher(TeacherSpec.parse(f"timm:{TIMM}@{tmp_path / 'other.pth'}"))
    (tmp_path / "rubbish.safetensors").write_bytes(b"rubbish")
    for name in ("rubbish.safetensors", "nowhere.pth"):
        with pytest.raises(TeacherError, match=name):
            load_teacher(TeacherSpec.parse(f"timm:{TIMM}@{tmp_path / name}"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:no_such_model@x.pth", "timm cannot make this model"),
        ("torchvision:no_such_model", "no classifier of this name"),
        ("onnx:nowhere.onnx", "no such file"),
        ("torchscript:nowhere.pt", "no such file"),
        ("python:no_such_package:f", "no_such_package"),
        ("python:ferkd_tiny_teachers", "must be python:package.module:factory"),
        ("python:ferkd_tiny_teachers:no_such_factory", "has no no_such_factory"),
        ("python:ferkd_tiny_teachers:not_a_module", "gave a int"),
        ("python:ferkd_tiny_teachers:not_there", r"not_there\(\) failed: OSError: no weights"),
        ("python:ferkd_tiny_teachers:first?size=3", None),
    ],
)
def test_teachers_that_cannot_be_loaded(spec, message, tiny_teachers):
    if message is None:
        assert load_teacher(TeacherSpec.parse(spec)).preprocessing.size == 3
        return
    with pytest.raises(TeacherError, match=message):
        load_teacher(TeacherSpec.parse(spec))


@pytest.fixture
def checkpoints(tiny_teachers, tmp_path):
    tiny = importlib.import_module("ferkd_tiny_teachers")
    tiny.cached.cache_clear()
    for name, network in (("one.pt", tiny.second()), ("two.pt", tiny.third())):
        torch.save(network.state_dict(), tmp_path / name)
    torch.save({f"0.{key}": value for key, value in tiny.third().state_dict().items()}, tmp_path / "around.pt")
    yield tmp_path
    tiny.cached.cache_clear()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("cached@{0}/one.pt", "cached@{0}/two.pt"),
        ("cached", "cached@{0}/one.pt"),
        ("cached@{0}/one.pt", "cached"),
        ("cached@{0}/one.pt", "around_cached@{0}/around.pt"),
        ("around_cached", "cached@{0}/one.pt"),
        ("cached", "cached_with_weights_of_second"),
    ],
)
def test_two_teachers_that_share_a_network_are_refused(checkpoints, first, second):
    """Both would answer with the weights that were loaded last."""
    specs = [f"python:ferkd_tiny_teachers:{name.format(checkpoints)}" for name in (first, second)]
    with pytest.raises(TeacherError, match=r"gave a network that teacher .* has already.*return a new one"):
        load_teachers(specs)


def test_a_network_that_is_kept_unchanged_may_be_given_again(checkpoints, tiny_teachers):
    one = f"python:ferkd_tiny_teachers:cached@{checkpoints}/one.pt"
    teachers = load_teachers([one, f"{one}?temperature=2"]) + load_teachers([one])
    assert len({teacher.digest for teacher in teachers}) == 1
    # Without a cache, each has its own.
    first = f"{tiny_teachers}@{checkpoints}"
    apart = load_teachers([f"{first}/one.pt", f"{first}/two.pt", tiny_teachers])
    pictures = torch.arange(3 * 32 * 32).view(1, 3, 32, 32).to(torch.uint8)
    answers = [tuple(teacher.logits(pictures)[0].tolist()) for teacher in apart]
    assert len(set(answers)) == 3


@pytest.mark.parametrize("options", ["mean=123.675,116.28,103.53&std=58.395,57.12,57.375", "mean=127&std=1"])
def test_statistics_of_pixels_in_0_to_255_are_refused(tiny_teachers, options):
    """Every image would be nearly the same to the teacher."""
    with pytest.raises(UsageError, match=rf"^teacher {tiny_teachers}.*in units of pixels scaled to 0\.\.1.*divide"):
        load_teacher(TeacherSpec.parse(f"{tiny_teachers}?{options}"))


def test_unknown_preprocessing_names_the_option(tmp_path, lite0_onnx):
    import onnx

    model = onnx.load(str(lite0_onnx))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "bare.onnx"))
    with pytest.raises(TeacherError, match=r"its mean is not known; add the option"):
        load_teacher(TeacherSpec.parse(f"onnx:{tmp_path / 'bare.onnx'}"))
    (tmp_path / "rubbish.onnx").write_bytes(b"rubbish")
    with pytest.raises(TeacherError, match="ONNX Runtime cannot load it"):
        load_teacher(TeacherSpec.parse(f"onnx:{tmp_path / 'rubbish.onnx'}"))


def test_teachers_must_agree_on_the_classes(tiny_teachers):
    with pytest.raises(TeacherError, match=r"knows 10 classes.*knows 11"):
        load_teachers([tiny_teachers, "python:ferkd_tiny_teachers:eleven_classes"])
    with pytest.raises(TeacherError, match="at least one"):
        load_teachers([])


def test_a_missing_extra_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ferkd-data\[timm\]'"):
        load_teacher(TeacherSpec.parse("timm:resnet50"))


def test_one_teacher_is_an_ensemble_of_one_and_a_module_is_none():
    assert parse_specs("timm:resnet18") == parse_specs(["timm:resnet18"]) == (TeacherSpec.parse("timm:resnet18"),)
    with pytest.raises(
        UsageError, match=r"given as text, such as 'timm:resnet50', got Linear; .*'python:MODULE:FUNCTION'"
    ):
        fd.build("photos", "out", teachers=[torch.nn.Linear(2, 2)])
    with pytest.raises(UsageError, match=r"build has no setting 'crop'; did you mean 'crops'\?"):
        fd.build("photos", "out", teachers="timm:resnet18", crop=3)
