"""Teachers whose models return something other than plain logits."""

from __future__ import annotations

import pytest
import torch
from label_sets import same_label_sets

import ferkd_data as fd
from ferkd_data.builder.labelling.forwards import Forwards
from ferkd_data.errors import SettingsMismatchError, TeacherError
from ferkd_data.evaluate import evaluate
from ferkd_data.teachers import TeacherSpec, load_teacher
from ferkd_data.teachers.compiled import is_plain_module
from ferkd_data.teachers.outputs import looks_like


def load(name: str):
    return load_teacher(TeacherSpec.parse(f"python:odd_teachers:{name}"))


@pytest.fixture
def batch():
    return torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name",
    [
        "tuple_of_one",
        "tuple_of_two?output=1",
        "list_of_two?output=0",
        "dict_with_logits",
        "dict_with_logits?output=logits",
        "dict_without_logits?output=scores",
        "named_tuple",
        "a_dataclass",
        "one_dimensional_tail",
        "preprocessing_with_pairs",
        "double",
        "log_probabilities",
        "probabilities?activation=probabilities",
    ],
)
def test_logits_are_found_in_what_a_model_returns(name, batch):
    plain, teacher = load("plain"), load(name)
    expected = plain.logits(batch).softmax(1)
    torch.testing.assert_close(teacher.logits(batch).softmax(1), expected, atol=1e-5, rtol=1e-4)
    assert teacher.num_classes == 10 and teacher.logits(batch).dtype == torch.float32
    assert teacher.digest != plain.digest, "another model"


def test_modules_in_half_precision_get_images_in_it(batch):
    torch.testing.assert_close(load("half").logits(batch), load("plain").logits(batch), atol=0.1, rtol=0.02)
    bf16 = load("half_probabilities?activation=probabilities")
    assert bf16.logits(batch).dtype == torch.float32


def test_a_sigmoid_is_undone(batch):
    torch.testing.assert_close(
        load("sigmoid?activation=sigmoid").logits(batch),
        load("plain").logits(batch).clamp(-15, 15),
        atol=0.5,
        rtol=0.05,
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tuple_of_two", r"2 outputs: 0 \(1, 48\), 1 \(1, 10\).*option output, such as \?output=1"),
        ("dict_without_logits", r"2 outputs: features \(1, 48\), scores \(1, 10\).*\?output=scores"),
        ("tuple_of_two?output=logits", r"no output 'logits'; its outputs are 0 \(1, 48\), 1 \(1, 10\)"),
        ("plain?output=logits", "a single tensor; drop the option output"),
        ("a_text", "returns an object of type str, expected a tensor of logits"),
        ("logits_that_are_none", "object of type dict"),
        ("a_list_in_logits", "takes for logits is an object of type list"),
        ("features_map", r"shape \(1, 3, 4, 4\), expected \(B, classes\)"),
        ("probabilities", r"gives probabilities .*\?activation=probabilities"),
        ("half_probabilities", r"gives probabilities .*\?activation=probabilities"),
        ("plain?activation=probabilities", r"is declared to give probabilities, but .*drop the option activation"),
        ("plain?activation=sigmoid", "is declared to give outputs of a sigmoid"),
        ("plain?classes=7", "gives 10 numbers for each image, expected 7 classes"),
        ("needs_64", r"one 32x32 image: AssertionError: input is 32, the model takes 64.*the option size sets another"),
        ("key_error", "KeyError"),
        ("attribute_error", "AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
        ("parses_arguments", "failed: SystemExit"),
        ("needs_arguments", "failed: TypeError"),
        ("preprocessing_is_no_dict", "must be a dict .* got Transforms"),
        ("preprocessing_not_square", "only square images"),
    ],
)
def test_what_cannot_be_taken_for_logits_says_what_to_do(name, message):
    with pytest.raises(TeacherError, match=rf"^teacher python:odd_teachers:{name.partition('?')[0]}.*{message}"):
        load(name)


def test_another_size_helps(batch):
    assert load("needs_64?size=64").preprocessing.size == 64


@pytest.mark.parametrize("name", ["one_row_for_all", "a_row_less"])
def test_one_row_for_each_image_is_asked_for_with_every_batch(name, batch):
    teacher = load(name)
    with pytest.raises(TeacherError, match=rf"{name}: gives \d rows for 8 images"):
        teacher.logits(batch)
    with pytest.raises(TeacherError, match=rf"{name}: gives \d rows for 8 images"):
        Forwards().logits(teacher, batch)


def test_few_numbers_are_no_evidence():
    assert looks_like(torch.tensor([[0.4, 0.6]])) == "logits"
    assert looks_like(torch.tensor([[0.4, 0.6]] * 4)) == "probabilities"
    assert looks_like(torch.full((1, 1000), 0.001)) == "probabilities"
    assert looks_like(torch.tensor([[40.0, 60.0], [1.0, 99.0]] * 2)) == "probabilities"
    assert looks_like(torch.tensor([[40.0, 60.0]])) == "logits"
    assert looks_like(torch.tensor([[40.0, 60.0]] * 4)) == "logits"
    assert looks_like(torch.tensor([[1.0, 9.0], [3.0, 2.0]] * 2)) == "logits"
    assert looks_like(torch.zeros(8, 10)) == "logits"
    assert looks_like(torch.rand(8, 10)) == "sigmoid"
    assert looks_like(torch.randn(8, 10)) == "logits"
    assert looks_like(torch.full((8, 10), float("nan"))) == "logits"


def test_one_row_for_a_batch_is_noticed_at_the_first_batch():
    with pytest.raises(TeacherError, match=r"one_row_for_all.*1 rows for 8 images"):
        teacher = load("one_row_for_all")
        size = teacher.preprocessing.size
        teacher.logits(torch.zeros((8, 3, size, size), dtype=torch.uint8))


def test_a_build_refuses_probabilities_and_takes_them_when_told(photos, tmp_path):
    settings = {"crops": 4, "top_k": 3}
    with pytest.raises(TeacherError, match="activation=probabilities"):
        fd.build(photos, tmp_path / "a", teachers=["python:odd_teachers:probabilities"], **settings)
    with pytest.raises(TeacherError, match="activation=probabilities"):
        evaluate(photos, teachers=["python:odd_teachers:probabilities"])
    teacher = "python:odd_teachers:probabilities?activation=probabilities"
    fd.build(photos, tmp_path / "a", teachers=[teacher], **settings)
    fd.build(photos, tmp_path / "b", teachers=["python:odd_teachers:plain"], **settings)
    a, b = (fd.open_labels(tmp_path / name).manifest.statistics.p_max_histogram for name in "ab")
    assert a == b


def test_random_weights_are_noticed_by_a_resume_and_by_workers(photos, tmp_path, quick_workers):
    teacher = "python:odd_teachers:random_weights"
    with pytest.raises(
        TeacherError, match=r"random_weights: is another model in this worker .* are its weights random"
    ):
        fd.build(photos, tmp_path / "a", teachers=[teacher], crops=2, top_k=2, workers=2)
    with pytest.raises(SettingsMismatchError, match="digest"):
        fd.build(photos, tmp_path / "a", teachers=[teacher], crops=2, top_k=2)


def test_percentages_and_the_number_of_the_best_class(photos, tmp_path):
    settings = {"crops": 2, "top_k": 2}
    with pytest.raises(TeacherError, match=r"rows that all sum to 100\), .*activation=probabilities"):
        fd.build(photos, tmp_path / "a", teachers=["python:odd_teachers:percentages"], **settings)
    teachers = [f"python:odd_teachers:{name}?activation=probabilities" for name in ("percentages", "probabilities")]
    for teacher, out in zip(teachers, ("b", "c"), strict=True):
        fd.build(photos, tmp_path / out, teachers=[teacher], **settings)
    assert same_label_sets(tmp_path / "b", tmp_path / "c")
    with pytest.raises(TeacherError, match=r"output is of type torch.int64, expected logits"):
        load("best_class")


class TwoOutputs(torch.nn.Module):
    def forward(self, x):
        means = x.mean(dim=(2, 3))
        return means, means @ torch.ones(3, 12)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_file_with_two_outputs(tmp_path):
    torch.jit.save(torch.jit.script(TwoOutputs()), str(tmp_path / "t.pt"))
    spec = f"torchscript:{tmp_path / 't.pt'}?size=8&mean=0&std=1"
    with pytest.raises(TeacherError, match=r"2 outputs: 0 \(1, 3\), 1 \(1, 12\)"):
        load_teacher(TeacherSpec.parse(spec))
    teacher = load_teacher(TeacherSpec.parse(spec + "&output=1"))
    assert teacher.num_classes == 12 and not is_plain_module(teacher), "TorchScript is neither compiled nor exported"
