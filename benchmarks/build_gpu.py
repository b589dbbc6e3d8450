"""How much of a teacher's bare forward rate a build keeps on a GPU, and where the rest goes.

    python benchmarks/build_gpu.py [--teachers resnet50,mobilenetv3_large_100] [--images 240] [--compile] [--no-fkd]
    python benchmarks/build_gpu.py --syncs
    python benchmarks/build_gpu.py --device cpu --images 4 --crops 20 --batch-size 8 --rounds 1 --seconds 0.5

Teachers are timm's with random weights, in bf16; images are JPEGs of 500x375 made of smooth colours and noise. In turn,
several rounds:

- forward: the teacher alone, on uint8 crops that lie on the GPU, the host never waiting for an answer
- build: fd.build, from JPEG files to Parquet, the rate between its first tenth and its last
- cut: the crops alone, out of images that lie on the GPU, in batches as a build cuts them
- FKD: Pillow, one forward per image, one torch.save per image, on a tenth of the images

The goal is a build at 95 % of forward for resnet50 and at 85 % for mobilenetv3_large_100. A profile of the middle of
one more build follows for each teacher: what the GPU was busy with, and for how much of the time with anything.

--syncs measures nothing: it lists the lines at which the host waited for the GPU in the middle of a build, which should
be none (the one wait for each batch's answers is an event's, and not counted). Without a GPU it all says so and ends;
--device cpu is there to try the script itself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_rate import fkd_rate
from PIL import Image

import ferkd_data as fd
from ferkd_data.replay import empty_batch, replay_on_device
from ferkd_data.teachers import Teacher, load_teachers
from ferkd_data.teachers.compiled import compile_teachers

PROFILED_BATCHES = 40


def write_photos(folder: Path, count: int) -> list[Path]:
    generator = np.random.default_rng(0)
    photos = []
    for number in range(count):
        colours = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = (smooth + generator.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        photos.append(folder / f"photo{number:05d}.jpg")
        Image.fromarray(pixels).save(photos[-1], quality=90)
    return photos


def write_teacher(name: str, folder: Path) -> str:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model(name).state_dict(), str(folder / f"{name}.safetensors"))
    return f"timm:{name}@{folder / f'{name}.safetensors'}"


def rate(once: Callable[[], object], crops: int, seconds: float, device: str) -> float:
    """Crops per second, the device waited for every ten rounds."""

    def ten_rounds() -> None:
        for _ in range(10):
            once()
        if device != "cpu":
            torch.cuda.synchronize(device)

    ten_rounds()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        ten_rounds()
        done += 10 * crops
    return done / (time.perf_counter() - started)


def forward_rate(teacher: Teacher, arguments: argparse.Namespace) -> float:
    batch = empty_batch(arguments.batch_size, teacher.preprocessing.size).random_(0, 256).to(arguments.device)
    return rate(lambda: teacher.logits(batch), len(batch), arguments.seconds, arguments.device)


def cut_rate(teacher: Teacher, arguments: argparse.Namespace) -> float:
    """Batches of as many images as a build's have, from 375x500 pixels."""
    crops = [min(arguments.crops, arguments.batch_size)] * max(1, arguments.batch_size // arguments.crops)
    images = [torch.randint(0, 256, (3, 375, 500), dtype=torch.uint8).to(arguments.device) for _ in crops]
    drawn = [
        fd.draw_crops(str(number), 375, 500, seed=0, count=count, distribution=fd.CropDistribution())
        for number, count in enumerate(crops)
    ]
    wanted = teacher.preprocessing

    def once() -> torch.Tensor:
        return replay_on_device(images, drawn, size=wanted.size, interpolation=wanted.interpolation)

    return rate(once, sum(crops), arguments.seconds, arguments.device)


def build(photos: Path, spec: str, arguments: argparse.Namespace, on_progress: Callable[[Any], None]) -> None:
    with tempfile.TemporaryDirectory() as out:
        fd.build(
            photos,
            Path(out) / "labels",
            teachers=[spec],
            crops=arguments.crops,
            batch_size=arguments.batch_size,
            device=arguments.device,
            compile=arguments.compile,
            on_progress=on_progress,
        )


def build_rate(photos: Path, spec: str, arguments: argparse.Namespace) -> float:
    marks: list[tuple[float, int]] = []
    build(photos, spec, arguments, lambda progress: marks.append((time.perf_counter(), progress.crops_done)))
    total = marks[-1][1]
    start, before = next(mark for mark in marks if mark[1] >= 0.1 * total)
    end, after = next(mark for mark in marks if mark[1] >= 0.9 * total)
    return (after - before) / (end - start)


class Middle:
    """Calls `begin` and `end` about PROFILED_BATCHES in the middle of a build."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.begin, self.end = begin, end
        self.batches, self.started, self.seconds = 0, 0.0, 0.0

    def __call__(self, progress: object) -> None:
        self.batches += 1
        if self.batches == PROFILED_BATCHES // 2:
            self.begin()
            self.started = time.perf_counter()
        elif self.batches == PROFILED_BATCHES // 2 + PROFILED_BATCHES:
            self.seconds = time.perf_counter() - self.started
            self.end()


def print_profile(photos: Path, spec: str, arguments: argparse.Namespace) -> None:
    from torch.profiler import ProfilerActivity, profile

    on_gpu = arguments.device != "cpu"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    middle = Middle(profiler.start, profiler.stop)
    build(photos, spec, arguments, middle)
    if not middle.seconds:
        print("  too few images for a profile\n")
        return
    if on_gpu:
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = covered([(event.time_range.start, event.time_range.end) for event in kernels]) / 1e6
        print(f"  GPU busy {busy / middle.seconds:.1%} of {middle.seconds:.2f} s ({PROFILED_BATCHES} batches, ", end="")
        print(f"{len(kernels) / PROFILED_BATCHES:.0f} kernels and copies each)")
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70))


def print_syncs(photos: Path, spec: str, arguments: argparse.Namespace) -> None:
    middle = Middle(lambda: torch.cuda.set_sync_debug_mode("warn"), lambda: torch.cuda.set_sync_debug_mode("default"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(photos, spec, arguments, middle)
    if not middle.seconds:
        print("  too few images to look for waits\n")
        return
    lines = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    print(f"  {lines.total()} waits in {PROFILED_BATCHES} batches")
    for line, count in lines.most_common():
        print(f"  {count:>6} {line}")


def covered(spans: list[tuple[float, float]]) -> float:
    """How much of the time at least one span lies over."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", default="resnet50,mobilenetv3_large_100", help="timm's names.")
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="Of each bare measurement.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="Both the bare teacher and the build's.")
    parser.add_argument("--fkd", action=argparse.BooleanOptionalAction, default=True, help="FKD's way beside it.")
    parser.add_argument("--syncs", action="store_true", help="List where the host waits for the GPU; measure nothing.")
    arguments = parser.parse_args()
    on_gpu = arguments.device != "cpu"
    if on_gpu and not torch.cuda.is_available():
        print("build_gpu: PyTorch finds no GPU here, so there is nothing to measure")
        return
    if arguments.syncs and not on_gpu:
        parser.error("--syncs needs a GPU")
    name = torch.cuda.get_device_name(arguments.device) if on_gpu else "CPU (a trial of this script, no more)"
    print(f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}, {'bf16' if on_gpu else 'fp32'},")
    print(f"{arguments.images} images x {arguments.crops} crops, batch {arguments.batch_size}, ", end="")
    print(f"compile {arguments.compile}, median of {arguments.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        files = write_photos(photos, arguments.images)
        for name in arguments.teachers.split(","):
            measure(name, photos, files, Path(folder), arguments)


def measure(name: str, photos: Path, files: list[Path], folder: Path, arguments: argparse.Namespace) -> None:
    spec = write_teacher(name, folder)
    print(name)
    if arguments.syncs:
        print_syncs(photos, spec, arguments)
        return
    teachers = load_teachers([spec], device=arguments.device)
    if arguments.compile:
        teachers = compile_teachers(teachers, arguments.batch_size)
    ways: dict[str, Callable[[], float]] = {
        "forward": lambda: forward_rate(teachers[0], arguments),
        "build": lambda: build_rate(photos, spec, arguments),
        "cut": lambda: cut_rate(teachers[0], arguments),
    }
    if arguments.fkd:
        few = files[: max(1, len(files) // 10)]
        ways["FKD"] = lambda: fkd_rate(few, teachers[0], arguments.crops, arguments.device)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way, run in ways.items():
            rates[way].append(run())
    for way, values in rates.items():
        kept = statistics.median(b / f for b, f in zip(values, rates["forward"], strict=True))
        print(f"  {way:<8} {statistics.median(values):>9.0f} crops/s   {kept:>7.1%} of forward")
    if arguments.fkd:
        beside = statistics.median(b / f for b, f in zip(rates["build"], rates["FKD"], strict=True))
        print(f"  build / FKD {beside:.1f}")
    print_profile(photos, spec, arguments)


if __name__ == "__main__":
    main()
