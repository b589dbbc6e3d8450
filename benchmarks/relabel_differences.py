"""How far probabilities move when a crop is labelled again: what machines change, and what mistakes change.

    python benchmarks/relabel_differences.py [--photos FOLDER] [--crops 25] [--teachers 0 2]

For each EfficientNet-Lite of the demo, crops of real photos are labelled once, in float32. Then they are labelled again
with one thing changed. Each row prints, over the crops, each crop's largest difference of a probability as
`verify --deep` computes it from the stored top-5: the mean, the 99th percentile and the maximum. The last column is the
share of the crops with the same most probable class. The first rows are changes that another machine makes, the last
ones are mistakes.

TF32 is emulated: inputs and weights of convolutions and linear layers are rounded to 10 bits of mantissa. So has fp16,
which CPUs compute too slowly to be measured here.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ferkd_data import extras
from ferkd_data.crops import CropDistribution, Crops, draw_crops
from ferkd_data.demo import SIZES, efficientnet_lite
from ferkd_data.images import decode_rgb
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.labels.soft_labels import combine, soft_labels
from ferkd_data.relabelling import difference
from ferkd_data.replay import replay, replay_on_device
from ferkd_data.scratch import Scratch
from ferkd_data.teachers import Teacher, TeacherSpec
from ferkd_data.teachers.module_teacher import ModuleTeacher
from ferkd_data.teachers.onnx_models import OnnxTeacher, export_onnx
from ferkd_data.teachers.spec import Preprocessing

TOP_K = 5
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
Pixels = list[tuple[Any, Crops]]


class Bench:
    """A teacher, its photos and their crops."""

    def __init__(self, number: int, photos: Sequence[Path], crops: int) -> None:
        self.number = number
        self.known = Preprocessing(size=SIZES[number], mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
        self.module = efficientnet_lite(number)
        self.pixels: Pixels = []
        for photo in photos:
            image = decode_rgb(photo.read_bytes())
            drawn = draw_crops(photo.stem, *image.shape[:2], distribution=CropDistribution(), seed=0, count=crops)
            self.pixels.append((image, drawn))
        self.stored = self.labels(self.teacher())

    def teacher(self, precision: Any = "fp32", module: nn.Module | None = None, **changes: Any) -> ModuleTeacher:
        known = replace(self.known, **changes)
        spec = TeacherSpec(kind="python", name=f"lite{self.number}:x")
        return ModuleTeacher(
            copy.deepcopy(module or self.module), spec, known, digest="0" * 64, device="cpu", precision=precision
        )

    def labels(
        self,
        teacher: Teacher,
        *,
        batch: int = 8,
        pixels: Pixels | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
        cut: Callable[[Any, Crops, Preprocessing], Tensor] | None = None,
        temperature: float = 1.0,
    ) -> list[ImageLabels]:
        known, found = teacher.preprocessing, []
        for image, crops in pixels or self.pixels:
            cut_NCSS = (cut or _cut)(image, crops, known)
            cut_NCSS = cut_NCSS if change is None else change(cut_NCSS)
            logits = torch.cat([teacher.logits(part) for part in cut_NCSS.split(batch)])
            prob = combine([logits], weights=[1.0], temperatures=[temperature], mode="mean")
            kept = soft_labels(prob, torch.full((len(crops),), -1), top_k=TOP_K).to_numpy()
            found.append(_row(kept.class_index, kept.class_prob))
        return found

    def show(self, name: str, labels: list[ImageLabels]) -> None:
        pairs = list(zip(self.stored, labels, strict=True))
        worst = np.concatenate([difference(a, b) for a, b in pairs])
        same = np.concatenate([a.class_index[:, 0] == b.class_index[:, 0] for a, b in pairs]).mean()
        print(
            f"    {name:<34} {worst.mean():>8.5f} {np.quantile(worst, 0.99):>8.4f} {worst.max():>8.4f} {same:>8.2%}",
            flush=True,
        )


def _cut(image: Any, crops: Crops, known: Preprocessing) -> Tensor:
    return replay(image, crops, size=known.size, interpolation=known.interpolation)


def _row(class_index: Any, class_prob: Any) -> ImageLabels:
    # `difference` reads these fields alone.
    row = object.__new__(ImageLabels)
    object.__setattr__(row, "target_prob", np.full(len(class_index), np.nan, np.float16))
    object.__setattr__(row, "class_index", class_index)
    object.__setattr__(row, "class_prob", class_prob)
    return row


def _cut_as_pillow(image: Any, crops: Crops, known: Preprocessing) -> Tensor:
    """Cut with Pillow, whose resize differs from the builder's by one grey level here and there."""
    cut = []
    for (top, left, height, width), flip in zip(crops.boxes.tolist(), crops.flip.tolist(), strict=True):
        piece = Image.fromarray(image[top : top + height, left : left + width])
        small = np.asarray(piece.resize((known.size, known.size), Image.Resampling.BILINEAR))
        cut.append(torch.from_numpy(small[:, ::-1].copy() if flip else small.copy()).permute(2, 0, 1))
    return torch.stack(cut)


def _shifted(pixels: Pixels, by: int) -> Pixels:
    """Move each box down and right, where the image has room; else up and left."""
    moved = []
    for image, crops in pixels:
        boxes = crops.boxes.astype(np.int64)
        for axis, side in ((0, image.shape[0]), (1, image.shape[1])):
            room = boxes[:, axis] + boxes[:, axis + 2] + by <= side
            boxes[:, axis] += np.where(room, by, np.where(boxes[:, axis] >= by, -by, 0))
        moved.append((image, replace(crops, boxes=boxes.astype(crops.boxes.dtype))))
    return moved


def _tf32(module: nn.Module) -> nn.Module:
    """Round weights and inputs of all products to TF32."""
    rounded = copy.deepcopy(module)
    for part in rounded.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            with torch.no_grad():
                part.weight.copy_(_to_tf32(part.weight))
            part.register_forward_pre_hook(lambda _, inputs: tuple(_to_tf32(each) for each in inputs))
    return rounded


def _to_tf32(values: Tensor) -> Tensor:
    bits = values.contiguous().view(torch.int32)
    # 13 bits of float32's mantissa go; half of the last one that stays is added to round.
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def _noisy(module: nn.Module, share: float) -> nn.Module:
    """Multiply every weight by 1 + share * noise: a later or earlier checkpoint of the same training."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1 + share * torch.randn(weight.shape, generator=generator))
    return other


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def run(number: int, photos: Sequence[Path], crops: int, scratch: Path) -> None:
    bench = Bench(number, photos, crops)
    print(f"\nEfficientNet-Lite{number}, {len(photos)} photos, {len(photos) * crops} crops")
    print(f"    {'':<34} {'mean':>8} {'99 %':>8} {'largest':>8} {'same 1st':>8}")
    plain = bench.teacher()
    bench.show("again", bench.labels(plain))
    for batch in (1, 32):
        bench.show(f"batch of {batch}", bench.labels(plain, batch=batch))
    for count in (1, 2):
        with _threads(count):
            bench.show(f"{count} threads", bench.labels(plain))
    planes = bench.teacher()
    planes.memory_format = torch.contiguous_format
    bench.show("planes, not channels last", bench.labels(planes))
    path = scratch / f"lite{number}.onnx"
    export_onnx(copy.deepcopy(bench.module), path, preprocessing=bench.known)
    onnx = OnnxTeacher(TeacherSpec(kind="onnx", name=str(path)), device="cpu", precision="fp32")
    bench.show("ONNX Runtime", bench.labels(onnx))
    bench.show("cut by the GPU's code", bench.labels(plain, cut=_cut_as_on_a_gpu))
    bench.show("cut by Pillow", bench.labels(plain, cut=_cut_as_pillow))
    bench.show("TF32 (emulated)", bench.labels(bench.teacher(module=_tf32(bench.module))))
    bench.show("bf16", bench.labels(bench.teacher("bf16")))
    print("  mistakes")
    bench.show("boxes moved by 1 pixel", bench.labels(plain, pixels=_shifted(bench.pixels, 1)))
    bench.show("bicubic for bilinear", bench.labels(bench.teacher(interpolation="bicubic")))
    bench.show("ImageNet's mean and std", bench.labels(bench.teacher(**IMAGENET)))
    half: Any = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    bench.show("mean and std 0.5", bench.labels(bench.teacher(**half)))
    bench.show(f"size {SIZES[number] + 16}", bench.labels(bench.teacher(size=SIZES[number] + 16)))
    bench.show("temperature 1.1", bench.labels(plain, temperature=1.1))
    bench.show("temperature 1.02", bench.labels(plain, temperature=1.02))
    bench.show("channels reversed", bench.labels(plain, change=lambda pixels: pixels.flip(1)))
    bench.show("not flipped", bench.labels(plain, pixels=[(i, _unflipped(c)) for i, c in bench.pixels]))
    bench.show("weights 1 % off", bench.labels(bench.teacher(module=_noisy(bench.module, 0.01))))
    bench.show("weights 0.1 % off", bench.labels(bench.teacher(module=_noisy(bench.module, 0.001))))
    bench.show("EfficientNet-Lite1", bench.labels(bench.teacher(module=efficientnet_lite(1))))


def _unflipped(crops: Crops) -> Crops:
    return replace(crops, flip=np.zeros_like(crops.flip))


def _cut_as_on_a_gpu(image: Any, crops: Crops, known: Preprocessing) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return replay_on_device([tensor], [crops], size=known.size, interpolation=known.interpolation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of JPEGs; default: the demo's 20 photos")
    parser.add_argument("--crops", type=int, default=25)
    parser.add_argument("--teachers", type=int, nargs="+", choices=list(SIZES), default=[0, 2])
    asked = parser.parse_args()
    folder = asked.photos or extras.package_folder("foolbox", extra="demo", what_for="this benchmark") / "data"
    photos = sorted(folder.rglob("*.jpg"))
    print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}, seed 0, top-{TOP_K}")
    with Scratch("relabel") as scratch:
        for number in asked.teachers:
            run(number, photos, asked.crops, scratch)


if __name__ == "__main__":
    main()
