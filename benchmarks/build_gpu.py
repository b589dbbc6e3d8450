"""How much of a teacher's bare forward rate a build keeps on a GPU, and where the rest goes.

    python benchmarks/build_gpu.py [--teachers resnet50,mobilenetv3_large_100] [--images 240] [--compile] [--fkd]

Teachers are timm's with random weights, in bf16; images are JPEGs of 500x375 made of smooth colours and noise. In turn,
several rounds:

- forward: the teacher alone, on uint8 crops that lie on the GPU, the host never waiting for an answer
- build: fd.build, from JPEG files to Parquet, the rate between its first tenth and its last
- FKD (--fkd): Pillow, one forward per image, one torch.save per image

A profile of the middle of one more build follows for each teacher: what the GPU was busy with, and for how much of the
time with anything. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_rate import fkd_rate
from PIL import Image

import ferkd_data as fd
from ferkd_data.replay import empty_batch
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


def forward_rate(teacher: Teacher, batch_size: int, seconds: float, device: str) -> float:
    batch = empty_batch(batch_size, teacher.preprocessing.size).random_(0, 256).to(device)
    for _ in range(5):
        teacher.logits(batch)
    torch.cuda.synchronize()
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(10):
            teacher.logits(batch)
        torch.cuda.synchronize()
        rounds += 10
    return rounds * batch_size / (time.perf_counter() - started)


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


def print_profile(photos: Path, spec: str, arguments: argparse.Namespace) -> None:
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    batches, started, seconds = 0, 0.0, 0.0

    def on_progress(progress: Any) -> None:
        nonlocal batches, started, seconds
        batches += 1
        if batches == PROFILED_BATCHES // 2:
            profiler.start()
            started = time.perf_counter()
        elif batches == PROFILED_BATCHES // 2 + PROFILED_BATCHES:
            seconds = time.perf_counter() - started
            profiler.stop()

    build(photos, spec, arguments, on_progress)
    if not seconds:
        print("  too few images for a profile")
        return
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = covered([(event.time_range.start, event.time_range.end) for event in kernels]) / 1e6
    print(f"  GPU busy {busy / seconds:.1%} of {seconds:.2f} s ({PROFILED_BATCHES} batches)")
    print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=70))


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
    parser.add_argument("--fkd", action="store_true", help="Also FKD's way, on a tenth of the images.")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("build_gpu: PyTorch finds no GPU here, so there is nothing to measure")
        return
    print(f"{time.strftime('%Y-%m-%d')}, {torch.cuda.get_device_name(arguments.device)}, torch {torch.__version__}, ")
    print(f"{arguments.images} images x {arguments.crops} crops, batch {arguments.batch_size}, bf16, ", end="")
    print(f"compile {arguments.compile}, median of {arguments.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        files = write_photos(photos, arguments.images)
        for name in arguments.teachers.split(","):
            measure(name, photos, files, Path(folder), arguments)


def measure(name: str, photos: Path, files: list[Path], folder: Path, arguments: argparse.Namespace) -> None:
    spec = write_teacher(name, folder)
    teachers = load_teachers([spec], device=arguments.device)
    if arguments.compile:
        teachers = compile_teachers(teachers, arguments.batch_size)
    ways: dict[str, Callable[[], float]] = {
        "forward": lambda: forward_rate(teachers[0], arguments.batch_size, arguments.seconds, arguments.device),
        "build": lambda: build_rate(photos, spec, arguments),
    }
    if arguments.fkd:
        few = files[: max(1, len(files) // 10)]
        ways["FKD"] = lambda: fkd_rate(few, teachers[0], arguments.crops, arguments.device)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way, run in ways.items():
            rates[way].append(run())
    print(name)
    for way, values in rates.items():
        kept = statistics.median(b / f for b, f in zip(values, rates["forward"], strict=True))
        print(f"  {way:<8} {statistics.median(values):>9.0f} crops/s   {kept:>7.1%} of forward")
    print_profile(photos, spec, arguments)


if __name__ == "__main__":
    main()
