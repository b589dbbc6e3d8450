"""What photos of 2, 8 and 24 megapixels cost a loader, and what decoding them at a fraction of their sides changes.

    python benchmarks/large_photos.py [--photos 4] [--rounds 3]

In turn, CPU time of one thread for each image, with 4 crops of 224 px (RandomResizedCrop's boxes, scale 0.08..1):

- Pillow: as FKD's loader does, Image.open, then crop and resize of each crop
- exact: this package's decoder and cutter, as a label set's crops are replayed by default
- auto: the same with decode_scale="auto"; the share of images that were reduced, and the differences from exact in grey
  levels, over the crops of reduced images
- DALI: the decoder for random crops of nvidia.dali on a CPU, where it is installed (nvidia-dali-cuda130), one crop for
  each decoded image; CPU time of its process

Two kinds of photos are made of the demo's 20 real ones. `enlarged`: one of them, resized, with some noise, as soft in
its pixels as a camera's. `mosaic`: many of them side by side, as sharp as a photo can be, where pixels differ most.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ferkd_data as fd
from ferkd_data import extras
from ferkd_data.crops import Crops, draw_crops
from ferkd_data.images import decode_rgb
from ferkd_data.images.decode import decode_reduced, divisor_for, reduced_crops
from ferkd_data.replay import replay

SIDES = {"2 MP": (1632, 1224), "8 MP": (3264, 2448), "24 MP": (6000, 4000)}
SIZE, CROPS, QUALITY, DRAWS = 224, 4, 92, 5


def sources() -> list[Image.Image]:
    folder = extras.package_folder("foolbox", extra="demo", what_for="this benchmark")
    return [Image.open(path).convert("RGB") for path in sorted((folder / "data").glob("imagenet_*.jpg"))]


def enlarged(photos: list[Image.Image], number: int, width: int, height: int) -> Image.Image:
    pixels = np.asarray(photos[number].resize((width, height), Image.Resampling.LANCZOS), np.float32)
    noisy = pixels + np.random.default_rng(number).normal(0, 3, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def mosaic(photos: list[Image.Image], number: int, width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(number)
    whole = Image.new("RGB", (width, height))
    for top in range(0, height, 512):
        for left in range(0, width, 512):
            whole.paste(photos[generator.integers(len(photos))], (left, top))
    return whole


def jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def with_pillow(data: bytes, crops: Crops) -> None:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    for (top, left, height, width), flip in zip(crops.boxes.tolist(), crops.flip.tolist(), strict=True):
        patch = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        np.asarray(patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else patch)


def exact(data: bytes, crops: Crops) -> torch.Tensor:
    return replay(decode_rgb(data), crops, size=SIZE)


def auto(data: bytes, crops: Crops) -> torch.Tensor:
    divisor = divisor_for(crops.boxes, SIZE)
    pixels = decode_reduced(data, divisor) if divisor > 1 else None
    if pixels is None:
        return exact(data, crops)
    return replay(pixels, reduced_crops(crops, divisor, *pixels.shape[:2]), size=SIZE)


def dali_milliseconds(folder: Path, count: int) -> float | None:
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError:
        return None

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipeline() -> Any:
        jpegs, _ = fn.readers.file(file_root=str(folder), random_shuffle=True)
        images = fn.decoders.image_random_crop(jpegs, device="cpu", random_area=[0.08, 1.0])
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    pipe = pipeline(prefetch_queue_depth=1)
    pipe.build()
    pipe.run()
    started = time.process_time()
    for _ in range(count // 4):
        pipe.run()
    return (time.process_time() - started) * 1000 / (count // 4 * 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=4, help="Photos of each kind and size.")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"{arguments.photos} photos of each kind and size, {DRAWS} draws of {CROPS} crops each, ", end="")
    print(f"JPEG quality {QUALITY}, median of {arguments.rounds} rounds\n")
    print(f"{'photos':<15} {'Pillow':>8} {'exact':>8} {'auto':>8}   ms an image of {CROPS} crops")
    photos = sources()
    for make in (enlarged, mosaic):
        for name, (width, height) in SIDES.items():
            files = [jpeg(make(photos, number, width, height)) for number in range(arguments.photos)]
            report(f"{make.__name__} {name}", files, width, height, arguments.rounds)


def report(name: str, files: list[bytes], width: int, height: int, rounds: int) -> None:
    work = [
        (
            data,
            draw_crops(str(n), height, width, seed=0, first=k * CROPS, count=CROPS, distribution=fd.CropDistribution()),
        )
        for n, data in enumerate(files)
        for k in range(DRAWS)
    ]
    ways: dict[str, Callable[[bytes, Crops], Any]] = {"Pillow": with_pillow, "exact": exact, "auto": auto}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            started = time.process_time()
            for data, crops in work:
                run(data, crops)
            seconds[way].append((time.process_time() - started) / len(work))
    middle = {way: statistics.median(values) * 1000 for way, values in seconds.items()}
    print(f"{name:<15} {middle['Pillow']:>8.1f} {middle['exact']:>8.1f} {middle['auto']:>8.1f}   ", end="")
    print(
        f"Pillow / exact {middle['Pillow'] / middle['exact']:.2f}, exact / auto {middle['exact'] / middle['auto']:.2f}"
    )
    reduced = [(data, crops) for data, crops in work if divisor_for(crops.boxes, SIZE) > 1]
    if reduced:
        differences = [(exact(*each).int() - auto(*each).int()).abs().float() for each in reduced]
        mean = statistics.fmean(float(each.mean()) for each in differences)
        most = max(int(each.max()) for each in differences)
        high = statistics.fmean(float(each.flatten()[::5].quantile(0.999)) for each in differences)
        print(f"{'':15} {len(reduced) / len(work):.0%} of the images reduced; ", end="")
        print(f"differences: mean {mean:.2f}, 99.9 % below {high:.0f}, largest {most}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "all").mkdir()
        for number, data in enumerate(files):
            (Path(folder) / "all" / f"{number}.jpg").write_bytes(data)
        dali = dali_milliseconds(Path(folder), 16)
        print(f"{'':15} DALI {'is not installed' if dali is None else f'{dali:.1f} ms an image of 1 crop'}", flush=True)


if __name__ == "__main__":
    main()
