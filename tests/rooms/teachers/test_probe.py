"""Teachers and their classes are tried on a few images before a build labels any."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import ferkd_data as fd
from ferkd_data.errors import TeacherError, UsageError
from ferkd_data.evaluate import evaluate
from ferkd_data.images import open_source, order_note
from ferkd_data.teachers import TeacherSpec, load_teacher
from ferkd_data.teachers.probe import (
    STEADY_IMAGES,
    check_class_order,
    check_same_order,
    check_steady,
    probe_teachers,
)


def load(name: str):
    return load_teacher(TeacherSpec.parse(f"python:odd_teachers:{name}"))


def probe(name, photos, **options):
    source = open_source(photos)
    return probe_teachers([load(name)], source, source.list_images(), **options)[0]


def test_the_probe_says_what_a_teacher_thinks(photos):
    found = probe("plain", photos)
    assert (found.images, found.input_size, found.num_classes) == (20, 32, 10)
    assert found.teacher == "python:odd_teachers:plain" and found.hints == ()
    assert found.top1 is not None and 0 <= found.top1 <= 1
    assert 0.1 <= found.p_max[0] <= found.p_max[1] <= found.p_max[2] <= 1 and found.all_equal == 0


def test_the_probe_without_a_truth_or_without_images(photos, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, photo in enumerate(sorted(photos.rglob("*.jpg"))[:5]):
        (flat / f"{number}.jpg").write_bytes(photo.read_bytes())
    assert probe("plain", flat).top1 is None
    (flat / "0.jpg").write_bytes(b"broken")
    assert probe("plain", flat).images == 4
    assert probe_teachers([load("plain")], open_source(photos), []) == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [("constant", "gives the same answer for all of 20 different images")],
)
def test_the_probe_refuses_what_is_no_classifier(photos, name, message):
    with pytest.raises(TeacherError, match=f"{name}.*{message}"):
        probe(name, photos)
    with pytest.raises(TeacherError, match=f"{name}.*(same answer|1 rows)"):
        evaluate(photos, teachers=[f"python:odd_teachers:{name}"])


def test_features_and_sigmoids_are_suspected(photos):
    (hint,) = probe("features_after_a_relu", photos).hints
    assert hint == (
        "none of its 48 numbers is ever negative and many are 0, as features after a ReLU are: are they class logits?"
    )
    (hint,) = probe("sigmoid", photos).hints
    assert hint.startswith("all its numbers are within 0..1") and hint.endswith("add ?activation=sigmoid")
    assert probe("features_after_a_relu?activation=logits", photos).hints == ()


@pytest.mark.parametrize("lines", [11, 12])
def test_a_class_file_has_a_line_for_every_output(photos, tmp_path, lines):
    (tmp_path / "classes.txt").write_text("\n".join(f"class{number}" for number in range(lines)))
    teacher = "python:odd_teachers:plain"
    for run in (
        lambda: evaluate(photos, teachers=[teacher], classes=tmp_path / "classes.txt"),
        lambda: fd.build(photos, tmp_path / "out", teachers=[teacher], classes=tmp_path / "classes.txt", top_k=2),
    ):
        with pytest.raises(UsageError, match=rf"--classes has {lines} lines, the teachers give 10 numbers"):
            run()


def named(*names):
    return SimpleNamespace(class_names=names, spec="timm:x")


ANIMALS = ("cat", "dog", "tench, Tinca tinca", "crane", "crane", "house_finch")


@pytest.mark.parametrize(
    "ours",
    [
        None,
        ("Cat", "dog", "tench", "crane", "crane", "house finch"),
        ("n01", "n02", "n03", "n04", "n05", "n06"),
        ("dog", "cat", "n03", "n04", "n05", "n06"),  # too few are known to say anything
        ("cat", "dog"),
    ],
)
def test_classes_in_the_same_order_or_of_another_vocabulary(ours):
    check_class_order(ours, named(*ANIMALS))
    check_class_order(ANIMALS, named())


def test_classes_in_another_order():
    with pytest.raises(UsageError, match=r"class 0 is 'dog' here and 'cat' there; class 1 is 'cat' here and 'dog'"):
        check_class_order(("dog", "cat", *ANIMALS[2:]), named(*ANIMALS))
    hundred = tuple(f"class {number}" for number in range(100))
    check_class_order((*hundred[:97], "odd", "class 97", "other"), named(*hundred))
    with pytest.raises(UsageError, match="another order"):
        check_class_order((*hundred[:98], "class 99", "class 98"), named(*hundred))


def test_two_lists_of_imagenet_that_tell_its_cranes_and_maillots_apart_or_not():
    ours = ("cat", "dog", "tench", "goldfish", "crane", "crane", "maillot", "maillot, tank suit")
    theirs = ("cat", "dog", "tench", "goldfish", "crane bird", "crane", "maillot", "maillot tank suit")
    check_class_order(ours, named(*theirs))
    check_class_order(theirs, named(*ours))
    with pytest.raises(UsageError, match=r"class 0 is 'dog' here and 'cat' there"):
        check_class_order(("dog", "cat", *ours[2:]), named(*theirs))


def test_an_ensemble_that_numbers_its_classes_in_two_ways():
    """Also where the images' own names are of another vocabulary, or there are none."""
    orders = [named(), named(*ANIMALS), named("n01", "n02", "n03", "n04", "n05", "n06")]
    check_same_order(orders)
    with pytest.raises(UsageError, match=r"timm:x and timm:x: .*class 0 is .cat. here and .dog. there"):
        check_same_order([*orders, named("dog", "cat", *ANIMALS[2:])])


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("python:odd_teachers:dropout_that_stays", "or on chance"),
        ("python:odd_teachers:batch_norm_in_training_mode", "depend on the batch"),
        ("torchscript:traced.pt?size=32&mean=0.5&std=0.25", "Trace or export a model after eval"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_teacher_in_training_mode(photos, tmp_path, monkeypatch, teacher, message):
    import odd_teachers

    monkeypatch.chdir(tmp_path)
    network = torch.nn.Sequential(odd_teachers.plain(), torch.nn.Dropout(0.1))
    torch.jit.save(torch.jit.trace(network.train(), torch.zeros(1, 3, 32, 32), check_trace=False), "traced.pt")
    for run in (
        lambda: fd.build(photos, tmp_path / "out", teachers=[teacher], crops=2, top_k=2),
        lambda: evaluate(photos, teachers=[teacher]),
    ):
        with pytest.raises(TeacherError, match=message):
            run()
    torch.jit.save(torch.jit.trace(network.eval(), torch.zeros(1, 3, 32, 32)), "traced.pt")
    if teacher.startswith("torchscript"):
        fd.build(photos, tmp_path / "other", teachers=[teacher], crops=2, top_k=2)


def test_a_dropout_after_the_last_layer_is_always_noticed():
    import odd_teachers

    network = torch.nn.Sequential(odd_teachers.plain(), torch.nn.Dropout(0.1)).train()
    generator = torch.Generator().manual_seed(1)
    for seed in range(50):
        torch.manual_seed(seed)
        images = (
            torch.randn(STEADY_IMAGES, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
        )
        with torch.no_grad(), pytest.raises(TeacherError, match="or on chance"):
            check_steady(torch.cat([network(image[None]) for image in images]), network(images), named())


def test_half_precision_is_steady_enough(photos, tmp_path):
    settings = {"teachers": ["python:odd_teachers:plain"], "crops": 2, "top_k": 2}
    half = fd.build(photos, tmp_path / "half", precision="bf16", **settings).manifest
    single = fd.build(photos, tmp_path / "single", precision="fp32", **settings).manifest
    assert (half.teachers[0].precision, half.num_images, half.statistics.crops) == ("bf16", 20, 40)
    # It did run in half precision: its probabilities are others.
    assert half.statistics != single.statistics or _labels(tmp_path / "half") != _labels(tmp_path / "single")


def _labels(folder):
    return [image.class_prob.tolist() for image in fd.open_labels(folder)]


@given(st.sets(st.text("ab_AB019 -", min_size=1, max_size=5), min_size=1, max_size=6))
def test_the_note_on_class_names_knows_timm_s_order(names):
    from timm.utils.misc import natural_key

    ours, theirs = sorted(names), sorted(sorted(names), key=natural_key)
    assert (order_note(ours) is None) == (ours == theirs)


@pytest.mark.parametrize("folders", [["1", "10", "2"], ["Bengal", "Sphynx", "beagle"]])
def test_folders_that_timm_and_torchvision_number_differently(folders, tmp_path, make_photos):
    for name in folders:
        make_photos(tmp_path / "made", num_images=4, classes=1).joinpath("class0").rename(tmp_path / "made" / name)
    images = tmp_path / "made"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "w.pth")
    spec = f"timm:test_resnet@{tmp_path / 'w.pth'}?classes=3&size=32"
    message = r"so '(10|Bengal)' is class .*timm's own reader makes '(2|beagle)' class .*--classes"
    for run in (
        lambda **more: fd.build(images, tmp_path / "out", teachers=[spec], crops=2, top_k=2, **more),
        lambda **more: evaluate(images, teachers=[spec], **more),
    ):
        with pytest.raises(UsageError, match=message):
            run()
        (tmp_path / "classes.txt").write_text("\n".join(folders))
        run(classes=tmp_path / "classes.txt")
