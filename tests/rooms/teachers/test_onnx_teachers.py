"""ONNX files as exporters write them."""

from __future__ import annotations

import contextlib
import io
import shutil
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

from ferkd_data.errors import DeviceFailedError, TeacherError
from ferkd_data.evaluate import evaluate
from ferkd_data.teachers import TeacherSpec, load_teacher
from ferkd_data.teachers.digest import onnx_digest

OPTIONS = "mean=0.5&std=0.25"
CLASSES = 9


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, CLASSES)).astype(np.float32)


def model(
    *,
    shape=("batch", 3, 8, 8),
    dtype=TensorProto.FLOAT,
    seed=0,
    outputs=("logits",),
    reshape_to=None,
    extra_input=False,
    tail=False,
    softmax=False,
    integers=False,
):
    """A network whose logits are the channels' means times (3, 9) weights; `features` are the means."""
    numpy_dtype = helper.tensor_dtype_to_np_dtype(dtype)
    working = TensorProto.FLOAT if dtype == TensorProto.UINT8 else dtype
    nodes = [helper.make_node("Cast", ["images"], ["cast"], to=working)]
    axes = [1, 2] if shape[-1] == 3 else [2, 3]
    nodes.append(helper.make_node("ReduceMean", ["cast"], ["means"], axes=axes, keepdims=0))
    flat = "means"
    if reshape_to is not None:
        nodes.append(helper.make_node("Reshape", ["means", "to"], ["reshaped"]))
        flat = "reshaped"
    nodes.append(helper.make_node("MatMul", [flat, "weights"], ["product"]))
    last = "product"
    if softmax:
        nodes.append(helper.make_node("Softmax", [last], ["soft"], axis=1))
        last = "soft"
    if tail:
        nodes.append(helper.make_node("Unsqueeze", [last, "axes"], ["tailed"]))
        last = "tailed"
    if integers:
        nodes.append(helper.make_node("Cast", [last], ["whole"], to=TensorProto.INT64))
        last = "whole"
    nodes.append(helper.make_node("Identity", [last], ["logits"]))
    nodes.append(helper.make_node("Identity", [flat], ["features"]))
    working_numpy = np.float32 if dtype == TensorProto.UINT8 else numpy_dtype
    channels = 1 if shape[1] == 1 else 3
    initialisers = [numpy_helper.from_array(weights(seed)[:channels].astype(working_numpy), "weights")]
    if tail:
        initialisers.append(numpy_helper.from_array(np.array(axes, np.int64), "axes"))
    if reshape_to is not None:
        initialisers.append(numpy_helper.from_array(np.array(reshape_to, np.int64), "to"))
    inputs = [helper.make_tensor_value_info("images", dtype, shape)]
    if extra_input:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, (1,)))
    shapes = {"logits": None if tail else ("batch", CLASSES), "features": ("batch", "means")}
    kinds = {"logits": TensorProto.INT64 if integers else working, "features": working}
    outs = [helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in outputs]
    graph = helper.make_graph(nodes, "g", inputs, outs, initialisers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 9
    return made


def load(path, options=OPTIONS):
    return load_teacher(TeacherSpec.parse(f"onnx:{path}?{options}"))


@pytest.fixture
def save(tmp_path):
    def save(name="t.onnx", **arguments):
        onnx.save(model(**arguments), str(tmp_path / name))
        return tmp_path / name

    return save


@pytest.fixture
def batch():
    return torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def expected(batch, mean=0.5, std=0.25):
    return torch.from_numpy(((batch / 255 - mean) / std).mean(dim=(2, 3)).numpy() @ weights())


@pytest.mark.parametrize(
    ("arguments", "options", "tolerance"),
    [
        ({}, "", 1e-5),
        ({"shape": ("batch_size", "num_channels", "height", "width")}, "&size=8", 1e-5),
        ({"shape": ("b", "c", "h", "w"), "dtype": TensorProto.FLOAT16}, "&size=8", 0.02),
        ({"dtype": TensorProto.DOUBLE}, "", 1e-5),
        ({"shape": ("batch", 8, 8, 3)}, "", 1e-5),
        ({"shape": ("batch", "h", "w", 3)}, "&size=8", 1e-5),
        ({"shape": (1, 3, 8, 8)}, "", 1e-5),
        ({"shape": (4, 3, 8, 8)}, "", 1e-5),
        ({"reshape_to": (1, 3)}, "", 1e-5),
        ({"tail": True}, "", 1e-5),
        ({"outputs": ("features", "logits")}, "&output=logits", 1e-5),
    ],
)
def test_exports_of_every_kind_run(save, batch, arguments, options, tolerance):
    teacher = load(save(**arguments), OPTIONS + options)
    assert teacher.num_classes == CLASSES and teacher.preprocessing.size == 8
    torch.testing.assert_close(teacher.logits(batch), expected(batch), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(teacher.logits(batch[:1]), expected(batch[:1]), atol=tolerance, rtol=tolerance)


def test_uint8_input_means_that_the_model_normalises(save, batch):
    path = save(dtype=TensorProto.UINT8)
    teacher = load_teacher(TeacherSpec.parse(f"onnx:{path}"))
    torch.testing.assert_close(teacher.logits(batch), expected(batch, 0, 1 / 255), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("arguments", [{"shape": (1, 3, 8, 8)}, {"reshape_to": (1, 3)}])
def test_one_image_at_a_time_is_slow_and_said(save, arguments):
    assert load(save(**arguments)).hints == (
        "takes one image at a time, which is slow; export it with an open batch size",
    )
    assert load(save("other.onnx")).hints == ()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            {"outputs": ("features", "logits")},
            "",
            r"2 outputs: features \['batch', 3\], logits .*\?output=logits",
        ),
        ({"outputs": ("logits",)}, "&output=scores", "no output 'scores'; its outputs are logits"),
        ({"shape": ("b", "c", "h", "w")}, "", r"its size is not known; add the option, such as \?size=224"),
        ({}, "&size=16", "takes 8x8 images and no other size"),
        ({"shape": ("b", 3, 8, 9)}, "", "8, 9.*only square images"),
        ({"shape": ("b", 1, 8, 8)}, "", r"expected \(B, 3, S, S\) or \(B, S, S, 3\)"),
        ({"dtype": TensorProto.BFLOAT16}, "", r"takes tensor\(bfloat16\)|cannot load it"),
        ({"extra_input": True}, "", r"2 inputs \(images .*, mask .*\), expected one"),
        ({"softmax": True}, "", "gives probabilities .*activation=probabilities"),
        ({"dtype": TensorProto.UINT8}, "", "takes uint8 images, so it normalises them itself; drop the options"),
        ({"integers": True}, "", "its output is of type int64, expected logits"),
        ({}, "&classes=7", "gives 9 numbers for each image, expected 7 classes"),
    ],
)
def test_what_cannot_be_run_says_what_to_do(save, arguments, options, message):
    path = save(**arguments)
    with pytest.raises(TeacherError, match=rf"^teacher onnx:{path}.*(?s:{message})"):
        load(path, OPTIONS + options)


def test_evaluate_passes_the_hint_on(save, photos, tmp_path):
    path = save(shape=(1, 3, 8, 8))
    for number, photo in enumerate(sorted(photos.rglob("*.jpg"))[:CLASSES]):
        folder = tmp_path / "photos" / f"class{number}"
        folder.mkdir(parents=True)
        shutil.copy(photo, folder)
    said = evaluate(tmp_path / "photos", teachers=[f"onnx:{path}?{OPTIONS}"]).warnings
    assert any(f"onnx:{path}?mean=0.5&std=0.25: takes one image at a time" in warning for warning in said)


def external(path, seed, **options):
    """Write a model with its weights in other files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model(seed=seed), str(path), save_as_external_data=True, size_threshold=32, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"all_tensors_to_one_file": True, "location": "t.onnx.data"},
        {"all_tensors_to_one_file": True, "location": "weights.bin"},
        {"all_tensors_to_one_file": False},
    ],
)
def test_weights_in_other_files_are_in_the_digest(tmp_path, batch, options):
    external(tmp_path / "a" / "t.onnx", 0, **options)
    external(tmp_path / "b" / "t.onnx", 1, **options)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    a, b, c = (load(tmp_path / name / "t.onnx") for name in "abc")
    assert (tmp_path / "a" / "t.onnx").read_bytes() == (tmp_path / "b" / "t.onnx").read_bytes(), "only others differ"
    assert not torch.equal(a.logits(batch), b.logits(batch))
    assert a.digest == c.digest != b.digest


def test_an_offset_and_a_larger_file_around_it(tmp_path):
    external(tmp_path / "t.onnx", 0, all_tensors_to_one_file=True, location="w.bin")
    before = load(tmp_path / "t.onnx").digest
    data = tmp_path / "w.bin"
    data.write_bytes(data.read_bytes() + b"of another model")
    assert load(tmp_path / "t.onnx").digest == before
    content = bytearray(data.read_bytes())
    stored = weights().tobytes()
    content[content.index(stored)] ^= 1
    data.write_bytes(bytes(content))
    assert load(tmp_path / "t.onnx").digest != before


def test_weights_within_a_subgraph(tmp_path):
    def branch(seed):
        value = numpy_helper.from_array(weights(seed), "inner")
        output = helper.make_tensor_value_info("chosen", TensorProto.FLOAT, (3, CLASSES))
        return helper.make_graph([helper.make_node("Identity", ["inner"], ["chosen"])], "branch", [], [output], [value])

    def write(name, seed):
        made = model()
        condition = numpy_helper.from_array(np.array(True), "condition")
        made.graph.initializer.append(condition)
        made.graph.node.insert(
            0, helper.make_node("If", ["condition"], ["picked"], then_branch=branch(seed), else_branch=branch(9))
        )
        product = next(node for node in made.graph.node if node.op_type == "MatMul")
        product.input[1] = "picked"
        (tmp_path / name).mkdir()
        onnx.save_model(
            made, str(tmp_path / name / "t.onnx"), save_as_external_data=True, location="w.bin", size_threshold=32
        )
        # ONNX Runtime itself cannot load such a file from everywhere.
        return onnx_digest(tmp_path / name / "t.onnx", TeacherSpec.parse("onnx:t.onnx"))

    assert write("a", 0) == write("b", 0) != write("c", 1)


def test_weights_that_are_missing(tmp_path):
    external(tmp_path / "t.onnx", 0, all_tensors_to_one_file=True, location="w.bin")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(TeacherError, match=r"w\.bin"):
        load(tmp_path / "t.onnx")


def test_the_exporters_default_form(tmp_path):
    """PyTorch's exporter puts the weights beside the model."""
    import odd_teachers

    module = odd_teachers.plain().eval()
    digests = []
    for name, change in (("a", 0.0), ("b", 1.0)):
        with torch.no_grad():
            module.head.weight[0, 0] += change
        (tmp_path / name).mkdir()
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            example = (torch.zeros(2, 3, 32, 32),)
            torch.onnx.export(module, example, str(tmp_path / name / "t.onnx"), dynamo=True, verbose=False)
        assert (tmp_path / name / "t.onnx.data").is_file()
        digests.append(load(tmp_path / name / "t.onnx").digest)
    assert digests[0] != digests[1]


class Failing:
    """The inner session of an ONNX session, which fails as one on a GPU does."""

    def __init__(self, session, error):
        self.session = session
        self.error = error

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run(self, *asked):
        raise self.error


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("cannot do that", TeacherError, "cannot run on"),
        (
            "CUDA failure 700: an illegal memory access was encountered",
            DeviceFailedError,
            r"^device cuda:1 failed while it ran teacher onnx:.*illegal",
        ),
        (
            "CUDA failure 209: no kernel image is available for execution",
            TeacherError,
            "cannot run on .*no kernel image",
        ),
        ("CUDA failure 2: out of memory", torch.cuda.OutOfMemoryError, "out of memory"),
    ],
)
def test_a_gpu_that_fails_does_not_turn_the_teacher_to_the_cpu(save, capsys, said, kind, words):
    teacher = load(save())
    teacher.device = "cuda:1"  # this machine's ONNX Runtime need not have CUDA
    teacher.session._sess = Failing(teacher.session._sess, EPFail(said))
    with pytest.raises(kind, match=words):
        teacher.logits(torch.zeros((2, 3, 8, 8), dtype=torch.uint8))
    assert "Falling back" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("errors", "batch"),
    [
        (["Failed to allocate memory for requested buffer of size 939524096"], 2),
        (["the graph takes batches of one", "CUDA failure 2: out of memory"], 1),
    ],
)
def test_memory_too_small_for_the_first_images(save, monkeypatch, errors, batch):
    path, coming = save(), iter(errors)

    def full(self, *asked):
        raise EPFail(next(coming))

    monkeypatch.setattr("onnxruntime.InferenceSession.run", full)
    words = f"^teacher onnx:.*: cpu has too little memory for a batch of {batch} beside its weights .*{errors[-1]}"
    with pytest.raises(TeacherError, match=words):
        load(path)
