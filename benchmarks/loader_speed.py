"""Crops per second of whole loaders on the same photos, side by side, with their CPU time.

    [BATCH=64] python benchmarks/loader_speed.py [--workers 2] [--rounds 3] [--images 960] [--uint8]

Photos are foolbox's 20 ImageNet photos re-encoded at 500x375 (quality 92, about 70 KB), many times over under other
names. All loaders deliver 224 px crops; those marked M=4 cut four crops of each decoded image and deliver soft labels.
Ours and DALI deliver uint8. The three with Pillow do as their published scripts do and make normalised float tensors on
the CPU (--uint8 leaves that out, for a comparison of the loading alone).

- ours, M=4 / M=1: fd.CropLoader with calibration
- FKD: its reference loader written anew from its description: Pillow, one torch.save file of labels per image, M=4
- ImageFolder: torchvision's ImageFolder + RandomResizedCrop + flip, M=1
- webdataset: tars, Pillow decode, the same transforms, M=1
- DALI: nvidia.dali's CPU pipeline with random-crop decode, where it is installed (nvidia-dali-cuda130), M=1
- FFCV: its loader over its own file of JPEGs (written once, not timed), random-crop decode, flip, uint8, M=1, where it
  is installed (its build wants libopencv-dev, libturbojpeg0-dev and pkg-config from Debian). It has as many threads
  as the others have workers; its resize, OpenCV's INTER_AREA, is not Pillow's
- floor: decode / 4 + one cut, in as many processes as there are workers, nothing else
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from synthetic import write_label_set
from torch.utils.data import DataLoader, Dataset

import ferkd_data as fd
from ferkd_data import extras
from ferkd_data.crops import draw_crops
from ferkd_data.images import decode_rgb, open_source
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.replay import empty_batch, replay
from ferkd_data.storage import image_digest

SIZE, CROPS, TOP_K, CLASSES, M = 224, 50, 5, 1000, 4
BATCH = int(os.environ.get("BATCH", "64"))


def write_photos(folder: Path, num_images: int) -> list[Path]:
    photos = sorted((extras.package_folder("foolbox", extra="demo", what_for="benchmarks") / "data").glob("imagenet*"))
    encoded = []
    for photo in photos:
        buffer = io.BytesIO()
        Image.open(photo).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        encoded.append(buffer.getvalue())
    paths = []
    for i in range(num_images):
        path = folder / f"class{i % 10}" / f"photo{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded[i % len(encoded)])
        paths.append(path)
    print(f"{num_images} JPEGs of 500x375, {sum(map(len, encoded)) / len(encoded) / 1000:.0f} KB on average")
    return paths


def write_labels(photos: Path, out: Path) -> None:
    """A label set with random soft labels: what the teachers said does not change the speed."""
    rng = np.random.default_rng(0)
    rows = []
    source = open_source(photos)
    for ref in source.list_images():
        data = source.read_one(ref)
        height, width = decode_rgb(data).shape[:2]
        crops = draw_crops(ref.key, height, width, seed=0, count=CROPS, distribution=fd.CropDistribution())
        prob = np.sort(rng.dirichlet([0.2] * 10, CROPS), axis=1)[:, ::-1][:, :TOP_K].astype(np.float16)
        labels = ImageLabels(
            key=ref.key,
            image_digest=image_digest(data),
            height=height,
            width=width,
            target=ref.target if ref.target is not None else -1,
            boxes=crops.boxes,
            flip=crops.flip,
            class_index=rng.random((CROPS, CLASSES)).argsort(axis=1)[:, :TOP_K].astype(np.uint16),
            class_prob=prob,
            target_prob=prob[:, 0],
            bucket=np.digitize(prob[:, 0].astype(float), [0.15, 0.3, 0.95]).astype(np.uint8),
        )
        rows.append((labels, data))
    write_label_set(out, [rows], num_crops=CROPS, top_k=TOP_K, num_classes=CLASSES)


class FkdDataset(Dataset[Any]):
    """FKD's way: M of the stored crops per decoded image, cut by Pillow, labels from one file per image."""

    def __init__(self, paths: list[Path], labels: Path, to_tensor: Any) -> None:
        self.paths = paths
        self.labels = labels
        self.to_tensor = to_tensor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        path = self.paths[i]
        boxes, flips, (index, prob) = torch.load(self.labels / f"{path.stem}.pt", weights_only=False)
        image = Image.open(path).convert("RGB")
        chosen = np.random.default_rng(i).choice(len(boxes), M, replace=False)
        crops, targets = [], []
        for n in chosen:
            top, left, height, width = boxes[n]
            patch = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            if flips[n]:
                patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            crops.append(self.to_tensor(patch))
            target = torch.full((CLASSES,), (1 - float(prob[n].sum())) / (CLASSES - TOP_K))
            target[index[n].long()] = prob[n].float()
            targets.append(target)
        return torch.stack(crops), torch.stack(targets)


def write_fkd_labels(labels: Path, out: Path) -> None:
    out.mkdir()
    for image in fd.open_labels(labels):
        label = [torch.from_numpy(image.class_index.astype(np.int64)), torch.from_numpy(image.class_prob.copy())]
        torch.save([image.boxes.tolist(), image.flip.tolist(), label], out / f"{image.key.rpartition('/')[2]}.pt")


def write_tar(paths: list[Path], out: Path) -> None:
    for shard in range(2):
        with tarfile.open(out / f"{shard}.tar", "w") as tar:
            for path in paths[shard::2]:
                tar.add(path, f"{path.stem}.jpg")
                number = str(int(path.parent.name.removeprefix("class"))).encode()
                member = tarfile.TarInfo(f"{path.stem}.cls")
                member.size = len(number)
                tar.addfile(member, io.BytesIO(number))


def tensor_transform(uint8: bool) -> Any:
    from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor

    if uint8:
        return PILToTensor()
    return Compose([ToTensor(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


def pillow_transform(uint8: bool) -> Any:
    from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

    return Compose([RandomResizedCrop(SIZE), RandomHorizontalFlip(), tensor_transform(uint8)])


def image_folder(photos: Path, workers: int, uint8: bool) -> Iterable[Any]:
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(photos), pillow_transform(uint8))
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True)


def with_pillow(sample: Any) -> Any:
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    return TRANSFORM(image), int(sample["cls"])


TRANSFORM: Callable[[Any], Any] = lambda image: image  # noqa: E731


def web_dataset(tars: Path, workers: int, uint8: bool) -> Iterable[Any]:
    import webdataset as wds

    global TRANSFORM
    TRANSFORM = pillow_transform(uint8)
    dataset = wds.WebDataset(str(tars / "{0..1}.tar"), shardshuffle=2, empty_check=False).shuffle(200).map(with_pillow)
    return DataLoader(dataset.batched(BATCH), batch_size=None, num_workers=workers, persistent_workers=True)


def dali(photos: Path, workers: int) -> Iterable[Any] | None:
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError:
        return None

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None)
    def pipeline() -> Any:
        jpegs, labels = fn.readers.file(file_root=str(photos), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(jpegs, device="cpu", random_area=[0.08, 1.0])
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    pipe = pipeline(prefetch_queue_depth=2)
    pipe.build()
    batches = pipe.epoch_size("reader") // BATCH

    class Epochs:
        def __iter__(self) -> Iterator[Any]:
            for _ in range(batches):
                images, labels = pipe.run()
                yield images.as_array(), labels.as_array()

    return Epochs()


def ffcv(paths: list[Path], out: Path, workers: int) -> Iterable[Any] | None:
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
        from ffcv.writer import DatasetWriter
    except ImportError:
        return None

    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=92), "label": IntField()}
    DatasetWriter(str(out), fields, num_workers=1).from_indexed_dataset(PhotosForFfcv(paths))
    # Its decoder hands out OpenCV's memory, whose channels come last: images stay in that order, as ours do.
    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor()]}
    return Loader(
        str(out), batch_size=BATCH, num_workers=workers, order=OrderOption.RANDOM, drop_last=True, pipelines=pipelines
    )  # type: ignore[no-any-return]


class PhotosForFfcv:
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        return Image.open(self.paths[i]), i % 10


def floor_worker(paths: list[Path], count: int) -> int:
    """Decode one image, cut M crops of it, over and over."""
    torch.set_num_threads(1)
    data = [path.read_bytes() for path in paths[:20]]
    crops = draw_crops("floor", 375, 500, seed=0, count=4000, distribution=fd.CropDistribution())
    out = empty_batch(M, SIZE)
    for i in range(count // M):
        pixels = decode_rgb(data[i % len(data)])
        start = (i * M) % (4000 - M)
        part = fd.Crops(boxes=crops.boxes[start : start + M], flip=crops.flip[start : start + M])
        replay(pixels, part, size=SIZE, out=out)
    return count


class Floor:
    def __init__(self, paths: list[Path], workers: int) -> None:
        self.paths, self.workers = paths, workers
        self.pool = multiprocessing.get_context("forkserver").Pool(workers)

    def __iter__(self) -> Iterator[Any]:
        share = len(self.paths) * M // self.workers
        counts = self.pool.starmap(floor_worker, [(self.paths, share)] * self.workers)
        yield np.empty(sum(counts)), None


def ours(labels: Path, photos: Path, cache: Path, crops_per_image: int, workers: int) -> fd.CropLoader:
    return fd.CropLoader(
        fd.open_labels(labels),
        images=photos,
        batch_size=BATCH,
        crops_per_image=crops_per_image,
        size=SIZE,
        num_workers=workers,
        cache_dir=cache,
        verify_images="first_epoch",
    )


def cpu_seconds() -> float:
    """CPU time of this process and of the live processes below it."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        total += times.user + times.system
    return total


def measure(loader: Iterable[Any], epochs: int) -> tuple[float, float]:
    """(crops per second, CPU milliseconds per crop) over whole epochs."""
    crops, cpu, started = 0, cpu_seconds(), time.perf_counter()
    for _ in range(epochs):
        for images, *_ in loader:
            shape = images.shape
            crops += shape[0] * shape[1] if len(shape) == 5 else shape[0]
    wall = time.perf_counter() - started
    return crops / wall, (cpu_seconds() - cpu) / crops * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--uint8", action="store_true", help="No float tensors anywhere.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_photos(folder / "photos", args.images)
        write_labels(folder / "photos", folder / "labels")
        write_fkd_labels(folder / "labels", folder / "fkd")
        write_tar(paths, folder)
        fkd = DataLoader(
            FkdDataset(paths, folder / "fkd", tensor_transform(args.uint8)),
            BATCH // M,
            shuffle=True,
            num_workers=args.workers,
            drop_last=True,
            persistent_workers=True,
        )
        photos, labels = folder / "photos", folder / "labels"
        pairs: dict[str, tuple[Iterable[Any] | None, int]] = {
            "ours, M=4": (ours(labels, photos, folder / "c4", M, args.workers), 1),
            "ours, M=1": (ours(labels, photos, folder / "c1", 1, args.workers), 2),
            "FKD reference, M=4": (fkd, 1),
            "ImageFolder, M=1": (image_folder(photos, args.workers, args.uint8), 1),
            "webdataset + Pillow, M=1": (web_dataset(folder, args.workers, args.uint8), 1),
            "DALI CPU, M=1": (dali(photos, args.workers), 2),
            "FFCV, M=1": (ffcv(paths, folder / "photos.beton", args.workers), 2),
            "floor (decode/4 + cut)": (Floor(paths, args.workers), 1),
        }
        loaders = {what: (loader, epochs) for what, (loader, epochs) in pairs.items() if loader is not None}
        results: dict[str, list[tuple[float, float]]] = {what: [] for what in loaders}
        for loader, _ in loaders.values():
            measure(loader, 1)
        for _ in range(args.rounds):
            for what, (loader, epochs) in loaders.items():
                results[what].append(measure(loader, epochs))
        print(f"{args.workers} workers, {os.cpu_count()} cores, batch {BATCH}, median of {args.rounds} rounds\n")
        print(f"{'':<42}  ours M=4 is       ours M=1 is")
        print(f"{'loader':<26} {'crops/s':>8} {'CPU ms':>7}  faster  CPU less  faster  CPU less")
        for what, rounds in results.items():
            rate, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
            by = [ratio for own in ("ours, M=4", "ours, M=1") for ratio in ratios(results[own], rounds)]
            print(f"{what:<26} {rate:>8.0f} {cpu:>7.3f} {by[0]:>6.2f}x {by[1]:>8.2f}x {by[2]:>6.2f}x {by[3]:>8.2f}x")


def ratios(own: list[tuple[float, float]], other: list[tuple[float, float]]) -> tuple[float, float]:
    """How much faster ours is, and how much less CPU time it takes: medians of each round's ratio."""
    pairs = list(zip(own, other, strict=True))
    return statistics.median(a[0] / b[0] for a, b in pairs), statistics.median(b[1] / a[1] for a, b in pairs)


if __name__ == "__main__":
    main()
