"""How much of the teacher's own forward rate a build keeps, and how FKD's way of labelling compares.

    python benchmarks/build_rate.py [--crops 60] [--photos 8] [--rounds 3] [--device cpu]

Three ways of getting the same soft labels of the same crops from the same teacher, in turn, several rounds:

- forward: the teacher alone, on crops that lie in memory (the rate that nothing can exceed)
- build: fd.build, from JPEG files to Parquet
- FKD: decode with Pillow, cut and resize N crops with Pillow, one forward per image, one torch.save per image

Prints the median rate of each in crops per second, and the ratios.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ferkd_data as fd
from ferkd_data.crops import draw_crops
from ferkd_data.demo import write_demo
from ferkd_data.replay import empty_batch
from ferkd_data.teachers import Teacher, TeacherSpec, load_teacher


def forward_rate(teacher: Teacher, total: int, batch_size: int, device: str) -> float:
    batch = empty_batch(batch_size, teacher.preprocessing.size).random_(0, 256).to(device)
    teacher.logits(batch).cpu()
    started = time.perf_counter()
    for _ in range(total // batch_size):
        teacher.logits(batch).cpu()
    return (total // batch_size) * batch_size / (time.perf_counter() - started)


def build_rate(photos: Path, classes: Path, spec: str, crops: int, batch_size: int, device: str) -> float:
    marks: list[tuple[float, int]] = []

    def mark(progress: fd.builder.Progress) -> None:
        marks.append((time.perf_counter(), progress.crops_done))

    with tempfile.TemporaryDirectory() as out:
        fd.build(
            photos,
            Path(out) / "labels",
            teachers=[spec],
            classes=classes,
            crops=crops,
            batch_size=batch_size,
            device=device,
            on_progress=mark,
        )
    # From the first batch done to the last: loading the teacher is not part of a week's rate.
    return (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])


def fkd_rate(photos: list[Path], teacher: Teacher, crops: int, device: str) -> float:
    size = teacher.preprocessing.size
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        for photo in photos:
            image = Image.open(io.BytesIO(photo.read_bytes())).convert("RGB")
            drawn = draw_crops(
                photo.stem, image.height, image.width, seed=0, count=crops, distribution=fd.CropDistribution()
            )
            batch = np.empty((crops, size, size, 3), np.uint8)
            for n, ((top, left, height, width), flip) in enumerate(zip(drawn.boxes.tolist(), drawn.flip, strict=True)):
                patch = image.crop((left, top, left + width, top + height))
                patch = patch.resize((size, size), Image.Resampling.BILINEAR)
                batch[n] = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else patch
            prob = teacher.logits(torch.from_numpy(batch).permute(0, 3, 1, 2).to(device)).softmax(dim=1)
            top5 = prob.topk(5, dim=1)
            torch.save([drawn.boxes, drawn.flip, [top5.indices.cpu(), top5.values.cpu()]], Path(out) / photo.stem)
        return len(photos) * crops / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crops", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--demo", type=Path, default=None, help="A folder that `ferkd-data demo` wrote.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        demo = write_demo(args.demo or Path(name))
        photos = sorted(demo.photos.rglob("*.jpg"))
        print(f"{len(photos)} photos of 512x512, {args.crops} crops each, batch {args.batch_size}, {args.device}, ")
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {args.rounds} rounds\n")
        print(f"{'teacher':<26} {'forward':>9} {'build':>9} {'FKD':>9}  build/forward  build/FKD   (crops/s)")
        for spec in (demo.teachers[0], demo.teachers[2]):
            teacher = load_teacher(TeacherSpec.parse(spec), device=args.device)
            ways: dict[str, Callable[[], float]] = {
                "forward": lambda t=teacher: forward_rate(t, 20 * args.crops // 2, args.batch_size, args.device),
                "build": lambda s=spec: build_rate(
                    demo.photos, demo.classes, s, args.crops, args.batch_size, args.device
                ),
                "fkd": lambda t=teacher: fkd_rate(photos, t, args.crops, args.device),
            }
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(args.rounds):
                for way, measure in ways.items():
                    rates[way].append(measure())
            forward, build, fkd = (statistics.median(rates[way]) for way in ways)
            kept = statistics.median(b / f for b, f in zip(rates["build"], rates["forward"], strict=True))
            print(
                f"{Path(teacher.spec.name).stem:<26} {forward:>9.1f} {build:>9.1f} {fkd:>9.1f}  "
                f"{kept:>12.1%}  {build / fkd:>8.2f}x"
            )


if __name__ == "__main__":
    main()
