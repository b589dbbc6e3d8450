"""Teachers of transformers and open_clip, with random weights that the libraries saved themselves; all offline."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import ferkd_data as fd
from ferkd_data.errors import MissingExtraError, TeacherError, UsageError
from ferkd_data.teachers import TeacherSpec, load_teacher
from ferkd_data.teachers.hf_models import measure_processor

COLOURS = [(0, 0, 0), (200, 30, 90), (30, 200, 255)]
LABELS = {0: "tench, Tinca tinca", 1: "goldfish", 2: "great white shark"}


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3)
    return config, transformers.ViTForImageClassification, processor, ("bilinear", 1.0)


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    processor = transformers.ConvNextImageProcessor(
        size={"shortest_edge": 56}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], resample=3
    )
    return config, transformers.ConvNextForImageClassification, processor, ("bicubic", 0.875)


def efficientnet():
    """A processor that rescales with an offset, and normalises twice."""
    config = transformers.EfficientNetConfig(
        image_size=40, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, num_labels=3
    )
    processor = transformers.EfficientNetImageProcessor(
        size={"height": 48, "width": 48},
        do_center_crop=True,
        crop_size={"height": 40, "width": 40},
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        include_top=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.478, 0.473, 0.474],
        resample=2,
    )
    return config, transformers.EfficientNetForImageClassification, processor, ("bilinear", 40 / 48)


def mobilevit():
    """A processor that gives BGR, and does not normalise."""
    config = transformers.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], num_attention_heads=2
    )
    processor = transformers.MobileViTImageProcessor(
        size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}, do_flip_channel_order=True, resample=2
    )
    return config, transformers.MobileViTForImageClassification, processor, ("bilinear", 64 / 72)


@pytest.fixture
def saved(tmp_path):
    def save(make):
        torch.manual_seed(0)
        config, cls, processor, known = make()
        config.id2label, config.label2id = LABELS, {name: number for number, name in LABELS.items()}
        model = cls(config).eval()
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        return tmp_path / "model", model, processor, known

    return save


def load(text):
    return load_teacher(TeacherSpec.parse(text))


@pytest.mark.parametrize("make", [vit, convnext, efficientnet, mobilevit], ids=lambda make: make.__name__)
def test_a_model_of_transformers_sees_what_its_processor_gives(saved, make):
    folder, model, processor, (interpolation, share) = saved(make)
    teacher = load(f"hf:org/tiny@{folder}")
    wanted = teacher.preprocessing
    assert wanted.interpolation == interpolation and wanted.crop_pct == pytest.approx(share, abs=0.02)
    assert teacher.class_names == tuple(LABELS.values()) and teacher.num_classes == 3
    for colour in COLOURS:
        image = np.full((wanted.size, wanted.size, 3), colour, np.uint8)
        inputs = processor(images=Image.fromarray(image), return_tensors="pt")
        assert inputs["pixel_values"].shape[-2:] == (wanted.size, wanted.size)
        with torch.no_grad():
            expected = model(**inputs).logits
        given = teacher.logits(torch.from_numpy(image).permute(2, 0, 1)[None])
        torch.testing.assert_close(given, expected, atol=2e-4, rtol=2e-4)


def test_weights_in_half_precision_are_computed_in_float32(saved):
    folder, model, *_ = saved(vit)
    model.half().save_pretrained(folder)
    teacher = load(f"hf:org/tiny@{folder}")
    assert teacher.precision == "fp32" and teacher.input_dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, r"its size is not known; add the option, such as \?size=224"),
        ({"do_resize": False, "do_center_crop": True, "crop_size": {"height": 300, "width": 300}}, "does more than"),
        ({"size": {"height": 32, "width": 24}}, r"turns a square image into \(3, 32, 24\)"),
    ],
)
def test_processors_that_crops_cannot_be_given(saved, changes, message):
    folder, *_ = saved(convnext)
    transformers.BitImageProcessor(**{"do_center_crop": False, **changes}).save_pretrained(folder)
    with pytest.raises(TeacherError, match=message):
        load(f"hf:org/tiny@{folder}")


class Grey(transformers.BitImageProcessor):
    def __call__(self, images, **options):
        return super().__call__(images.convert("L").convert("RGB"), **options)


def test_a_processor_that_mixes_the_colours():
    processor = Grey(size={"shortest_edge": 32}, do_center_crop=False)
    with pytest.raises(TeacherError, match="mixes the colours"):
        measure_processor(processor, TeacherSpec.parse("hf:org/tiny"))


def test_the_settings_of_a_processor_are_kept_to_the_last_digit(saved):
    folder, *_ = saved(convnext)
    wanted = load(f"hf:org/tiny@{folder}").preprocessing
    assert (wanted.mean, wanted.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    other = load(f"hf:org/tiny@{folder}?size=64&mean=0.5&interpolation=bilinear").preprocessing
    assert (other.size, other.mean, other.interpolation) == (64, (0.5,) * 3, "bilinear")


def test_a_timm_model_within_transformers(tmp_path):
    import timm

    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig.from_dict(
        {
            "architecture": "mobilenetv3_small_050",
            "num_classes": 3,
            "label_names": list(LABELS.values()),
            "pretrained_cfg": {
                "input_size": [3, 64, 64], "interpolation": "bicubic", "crop_pct": 0.9,
                "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "num_classes": 3,
            },
        }
    )  # fmt: skip
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    teacher = load(f"hf:timm/tiny@{tmp_path}")
    wanted = teacher.preprocessing
    assert (wanted.size, wanted.interpolation, wanted.mean) == (64, "bicubic", (0.1, 0.2, 0.3))
    assert wanted.crop_pct == pytest.approx(0.9, abs=0.02) and teacher.num_classes == 3
    plain = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    plain.load_state_dict(model.timm_model.state_dict())
    batch = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    images = (batch / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(batch), plain(images), atol=1e-4, rtol=1e-4)


def test_a_head_that_is_not_in_the_checkpoint_is_not_made_up(saved):
    folder, *_ = saved(vit)
    state = load_file(str(folder / "model.safetensors"))
    save_file(
        {k: v for k, v in state.items() if "classifier" not in k}, str(folder / "model.safetensors"), {"format": "pt"}
    )
    with pytest.raises(TeacherError, match=r"lacks 2 weights \(classifier.bias, classifier.weight\).*no classifier"):
        load(f"hf:org/tiny@{folder}")


def test_transformers_models_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TeacherError, match=r"^teacher hf:org/none: transformers cannot load it .*hf:org/none@FOLDER"):
        load("hf:org/none")
    with pytest.raises(TeacherError, match=r"no folder .*nowhere"):
        load(f"hf:org/none@{tmp_path / 'nowhere'}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ferkd-data\[hf\]'"):
        load("hf:org/none")


def test_the_classes_are_compared_with_those_of_the_images(saved, make_photos, tmp_path):
    folder, *_ = saved(vit)
    photos = make_photos(tmp_path / "photos", 6, classes=3)
    (tmp_path / "wrong.txt").write_text("class0\tgoldfish\nclass1\ttench\nclass2\tgreat white shark\n")
    (tmp_path / "right.txt").write_text("class0\ttench\nclass1\tgoldfish\nclass2\tgreat white shark\n")
    settings = {"teachers": [f"hf:org/tiny@{folder}"], "crops": 2, "top_k": 2}
    with pytest.raises(UsageError, match=r"class 0 is 'goldfish' here and 'tench, Tinca tinca' there"):
        fd.build(photos, tmp_path / "out", classes=tmp_path / "wrong.txt", **settings)
    fd.build(photos, tmp_path / "out", classes=tmp_path / "right.txt", **settings)
    (entry,) = fd.open_labels(tmp_path / "out").manifest.teachers
    assert entry.name == "tiny" and entry.size == 32


def test_model_outputs_of_a_python_factory(saved, monkeypatch):
    import odd_teachers

    folder, model, _, _ = saved(vit)

    def make():
        again = transformers.ViTForImageClassification.from_pretrained(folder)
        again.preprocessing = {"size": 32, "mean": 0.5, "std": 0.5}
        return again

    monkeypatch.setattr(odd_teachers, "own_vit", make, raising=False)
    teacher = load("python:odd_teachers:own_vit")
    batch = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model((batch / 255 - 0.5) / 0.5).logits
    torch.testing.assert_close(teacher.logits(batch), expected, atol=1e-4, rtol=1e-4)


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """Register the architecture `tiny-clip` with open_clip, and save weights for it."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "configs" / "tiny-clip.json")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model("tiny-clip").eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    return model, tmp_path


def test_zero_shot_is_what_open_clip_does(clip):
    model, folder = clip
    (folder / "names.txt").write_text("cat\nn02\tgolden retriever\ngreat_white_shark\n\n")
    (folder / "prompts.txt").write_text("a photo of a {}.\na drawing of a {} {sic}\n")
    spec = f"openclip:tiny-clip@{folder / 'clip.pt'}?names={folder / 'names.txt'}&templates={folder / 'prompts.txt'}"
    teacher = load(spec)
    assert teacher.class_names == ("cat", "golden retriever", "great white shark")
    batch = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    wanted = teacher.preprocessing
    assert (wanted.size, wanted.interpolation) == (32, "bicubic") and wanted.mean == open_clip.OPENAI_DATASET_MEAN
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (wanted.mean, wanted.std))
    tokenise = open_clip.get_tokenizer("tiny-clip")
    with torch.no_grad():
        texts = [
            torch.nn.functional.normalize(
                model.encode_text(tokenise([f"a photo of a {name}.", f"a drawing of a {name} {{sic}}"])), dim=-1
            ).mean(0)
            for name in teacher.class_names
        ]
        classes = torch.nn.functional.normalize(torch.stack(texts), dim=-1)
        features = torch.nn.functional.normalize(model.encode_image((batch / 255 - mean) / std), dim=-1)
        expected = model.logit_scale.exp() * features @ classes.T
    torch.testing.assert_close(teacher.logits(batch), expected, atol=1e-3, rtol=1e-3)
    for text in (
        "n01 cat\nn02 golden retriever\nn03 great white shark\n".replace("n0", "n0000000"),
        '["cat", "golden_retriever", "great_white_shark"]',
    ):
        (folder / "names.txt").write_text(text)
        assert load(spec).digest == teacher.digest, "the same names in another form of --classes"
    (folder / "names.txt").write_text("cat\ngolden retriever\nshark\n")
    assert load(spec).digest != teacher.digest, "other names are another teacher"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("@{0}/clip.pt", r"needs the names of the classes: \?names=FILE"),
        ("@{0}/clip.pt?names={0}/nowhere.txt", "nowhere.txt: cannot be read"),
        ("@{0}/clip.pt?names={0}/empty.txt", "empty"),
        ("@{0}/clip.pt?names={0}/names.txt&templates={0}/names.txt", "'cat' must have {} once"),
        ("@{0}/clip.pt?names={0}/numbers.txt", "has numbers for its classes"),
        ("?names={0}/names.txt", "name its weights: openclip:tiny-clip@FILE"),
        ("@{0}/none.pt?names={0}/names.txt", "open_clip cannot make it"),
    ],
)
def test_open_clip_teachers_that_cannot_be_had(clip, options, message):
    _, folder = clip
    (folder / "names.txt").write_text("cat\ndog\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "numbers.txt").write_text("n01440764\nn01443537\n")
    with pytest.raises(TeacherError, match=message):
        load("openclip:tiny-clip" + options.format(folder))


def test_open_clip_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ferkd-data\[openclip\]'"):
        load("openclip:ViT-B-32@openai?names=imagenet")
    with pytest.raises(UsageError, match="only openclip takes"):
        load("timm:resnet50?names=imagenet")
