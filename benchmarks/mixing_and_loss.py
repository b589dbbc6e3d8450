"""What calibration, SelfMix and the loss on sparse targets cost, next to the work they come with.

    python benchmarks/mixing_and_loss.py [--rounds 9] [--device cpu] [--step-batch 16]

Three tables, each with its ways in turn over several rounds; medians, and medians of each round's ratio:

- workers: calibration and SelfMix per crop in CPU time of one thread, as a share of the least that loading costs
  (a JPEG decoded for 4 crops, and a crop cut); photos re-encoded at 500x375 (quality 90), 224 px, top-5. Below them
  what a core's memory allows at least (every crop copied to one that stays in the cache, and back), and the sum of all
  that our targets cost: the default SelfMix, calibration, and forward and backward of the loss at 1,000 classes
  Predicted for Mixup at probability 1, from trials of the kernel alone on these two cores: 15 us a crop in place of 61
  (PyTorch's 16-bit integers), 5 % of loading in place of 22 %. Found in three runs: 13.8 alone, 17.7 to 18.8 in turn
  with the other ways, 6.3 to 6.7 % of loading, where copying and back takes 6.0 (2.1 %)
- loss: forward and backward of soft_cross_entropy on sparse targets, against cross_entropy on dense ones, made or ready
- step: what of this a training step of a ResNet-50 has on the device: SelfMix there, moving the targets, the loss
"""

from __future__ import annotations

import argparse
import functools
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn import functional

import ferkd_data as fd
from ferkd_data.calibration import calibrate
from ferkd_data.crops import Crops, draw_crops
from ferkd_data.demo import write_demo
from ferkd_data.images import decode_rgb
from ferkd_data.replay import empty_batch, replay

SIZE, TOP_K, CROPS_PER_IMAGE, WORKER_BATCH = 224, 5, 4, 256
LOSS_CASES = ((1000, 256), (21_841, 64))
Ways = dict[str, Callable[[], Any]]


def measure(ways: Ways, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each way in each round: CPU time on a CPU, wall time on anything else."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, work in ways.items():
            wait(device)
            started = clock()
            work()
            wait(device)
            if number:  # The first round warms up.
                seconds[way].append(clock() - started)
    return seconds


def wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def ratio(seconds: dict[str, list[float]], way: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[way], seconds[base], strict=True))


def labels(rows: int, num_classes: int, seed: int = 0) -> dict[str, Any]:
    """Soft labels of all four buckets, as stored."""
    rng = np.random.default_rng(seed)
    prob = np.sort(rng.dirichlet(np.full(50, 0.1), rows))[:, : -TOP_K - 1 : -1]
    return {
        "class_index": rng.integers(0, num_classes, (rows, TOP_K)).astype(np.uint16),
        "class_prob": prob.astype(np.float16),
        "codes": rng.integers(0, 4, rows).astype(np.uint8),
        "target": rng.integers(0, num_classes, rows),
        "num_classes": num_classes,
    }


def photos() -> list[bytes]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(write_demo(Path(folder)).photos.rglob("*.jpg")):
            data = io.BytesIO()
            Image.open(path).convert("RGB").resize((500, 375)).save(data, "jpeg", quality=90)
            found.append(data.getvalue())
    return found


def load(jpegs: list[bytes], drawn: list[Crops], images: torch.Tensor) -> None:
    """Fill images with 4 crops of each decoded photo."""
    for first in range(0, len(images), CROPS_PER_IMAGE):
        photo = first // CROPS_PER_IMAGE % len(jpegs)
        pixels = decode_rgb(jpegs[photo], max_pixels=2**32)
        into = images[first : first + CROPS_PER_IMAGE]
        replay(pixels, drawn[photo], size=SIZE, interpolation="bilinear", out=into)


def workers(rounds: int) -> None:
    jpegs, images = photos(), empty_batch(WORKER_BATCH, SIZE)
    crops = functools.partial(draw_crops, seed=0, count=CROPS_PER_IMAGE, distribution=fd.CropDistribution())
    drawn = [crops(f"photo {number}", 375, 500) for number in range(len(jpegs))]
    stored = labels(WORKER_BATCH, 1000)
    targets = calibrate(fd.Calibration(), **stored)
    # Any one draw may mix much or nothing: the same eight for all.
    draws = range(8)

    def mix(selfmix: fd.SelfMix) -> None:
        for draw in draws:
            rng = np.random.default_rng(draw)
            selfmix(images, targets, crops_per_image=CROPS_PER_IMAGE, rng=rng, inplace=True)

    flat, aside = images.permute(0, 2, 3, 1).numpy(), np.empty((SIZE, SIZE, 3), np.uint8)
    logits = torch.randn(WORKER_BATCH, 1000, requires_grad=True)

    def copy_and_back() -> None:
        for _ in draws:
            for image in flat:
                aside[:] = image
                image[:] = aside

    def sparse_loss() -> None:
        for _ in draws:
            forward_and_backward(lambda: fd.soft_cross_entropy(logits, targets), logits)

    ways: Ways = {
        "decode / 4 + cut": lambda: load(jpegs, drawn, images),
        "calibrate": lambda: [calibrate(fd.Calibration(), **stored) for _ in draws],
        "SelfMix(), the default": functools.partial(mix, fd.SelfMix()),
    }
    for mode in ("cutmix", "mixup"):
        for per in ("batch", "sample"):
            selfmix = fd.SelfMix(prob=1.0, mode=mode, per=per)
            ways[f"SelfMix(prob=1, {mode}, per {per})"] = functools.partial(mix, selfmix)
    ways |= {"floor: copied and back": copy_and_back, "loss, sparse": sparse_loss}
    seconds = measure(ways, rounds, "cpu")
    parts = [seconds[way] for way in ("calibrate", "SelfMix(), the default", "loss, sparse")]
    seconds["default SelfMix + calibrate + loss"] = [sum(part) for part in zip(*parts, strict=True)]
    size = statistics.mean(map(len, jpegs)) / 1000
    print(f"workers: batches of {WORKER_BATCH}, photos of {size:.0f} KB on average\n")
    print(f"{'':<36} {'us a crop':>9} {'of loading':>11}")
    for way in seconds:
        times = 1 if way == "decode / 4 + cut" else len(draws)
        each = statistics.median(seconds[way]) / times / WORKER_BATCH * 1e6
        print(f"{way:<36} {each:>9.2f} {ratio(seconds, way, 'decode / 4 + cut') / times:>11.2%}")


def loss(rounds: int, device: str) -> None:
    print(f"\nloss, forward and backward\n\n{'':<36} {'C':>6} {'B':>4} {'ms':>9} {'of sparse':>10}")
    for num_classes, rows in LOSS_CASES:
        images = torch.zeros(rows, 3, 1, 1)
        targets = calibrate(fd.Calibration(), **labels(rows, num_classes))
        # Twice the entries, as a mixed batch has.
        rng = np.random.default_rng(0)
        targets = fd.SelfMix(prob=1.0)(images, targets, crops_per_image=2, rng=rng)[1].to(device)
        dense, logits = targets.dense(), torch.randn(rows, num_classes, device=device, requires_grad=True)
        ways: Ways = {
            "soft_cross_entropy, sparse": lambda z=logits, t=targets: fd.soft_cross_entropy(z, t),
            "kl_div, sparse": lambda z=logits, t=targets: fd.kl_div(z, t),
            "cross_entropy, dense() made": lambda z=logits, t=targets: functional.cross_entropy(z, t.dense()),
            "cross_entropy, dense at hand": lambda z=logits, t=dense: functional.cross_entropy(z, t),
        }
        both = {way: functools.partial(forward_and_backward, work, logits) for way, work in ways.items()}
        seconds = measure(both, rounds, device)
        for way in ways:
            each = statistics.median(seconds[way]) * 1e3
            share = ratio(seconds, way, "soft_cross_entropy, sparse")
            print(f"{way:<36} {num_classes:>6} {rows:>4} {each:>9.3f} {share:>9.2f}x")


def forward_and_backward(work: Callable[[], torch.Tensor], logits: torch.Tensor) -> None:
    logits.grad = None
    work().backward()


def step(rounds: int, device: str, rows: int) -> None:
    model = torchvision.models.resnet50().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = empty_batch(rows, SIZE).random_(0, 256).to(device)
    targets = calibrate(fd.Calibration(), **labels(rows, 1000))
    logits = torch.randn(rows, 1000, device=device, requires_grad=True)
    hard = torch.zeros(rows, dtype=torch.int64, device=device)

    def plain() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            z = model(fd.normalize(images))
        optimizer.zero_grad()
        functional.cross_entropy(z.float(), hard).backward()
        optimizer.step()

    def mix(per: str) -> None:
        selfmix = fd.SelfMix(prob=1.0, per=per)
        selfmix(images, targets.to(device), crops_per_image=CROPS_PER_IMAGE, rng=np.random.default_rng(0))

    moved = targets.to(device)
    ways: Ways = {
        "ResNet-50 step": plain,
        "targets to the device": lambda: targets.to(device),
        "SelfMix(prob=1, per batch)": lambda: mix("batch"),
        "SelfMix(prob=1, per sample)": lambda: mix("sample"),
        "loss, sparse": lambda: forward_and_backward(lambda: fd.soft_cross_entropy(logits, moved), logits),
    }
    seconds = measure(ways, rounds, device)
    print(f"\nstep: batch of {rows}, SGD, {'bfloat16 autocast' if device != 'cpu' else 'float32'}\n")
    print(f"{'':<36} {'ms':>9} {'of step':>9}")
    for way in ways:
        each = statistics.median(seconds[way]) * 1e3
        print(f"{way:<36} {each:>9.3f} {ratio(seconds, way, 'ResNet-50 step'):>9.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--step-batch", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = "cpu, CPU time" if args.device == "cpu" else f"{args.device}, wall time (workers: CPU time)"
    print(f"torch {torch.__version__}, 1 thread, {name}, median of {args.rounds} rounds")
    workers(args.rounds)
    loss(args.rounds, args.device)
    step(args.rounds, args.device, args.step_batch)


if __name__ == "__main__":
    main()
