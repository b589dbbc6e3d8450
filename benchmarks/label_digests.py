"""What it costs to compare label files with the manifest's digests: unpacking with `verify_labels` and without.

    python benchmarks/label_digests.py [--images 4096] [--rounds 7]

Each round reads every row of a label set as if for the first time: once with each setting, in turn, from files that are
in the page cache. Prints medians and their ratio, for both layouts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image

import ferkd_data as fd
from ferkd_data import storage
from ferkd_data.format import parquet, webdataset
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.rows import ShardLabels

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "version-1"
CROPS, TOP_K, CLASSES = 50, 5, 1000
IMAGE_BYTES = 110_000


def rows(images: int, digest_of: bytes | None) -> ShardLabels:
    """Labels as a build has them: 50 crops of each image, top-5 of 1,000 classes."""
    draw = np.random.default_rng(0)
    prob = np.sort(draw.dirichlet(np.full(10, 0.3), (images, CROPS)), axis=2)[:, :, ::-1][:, :, :TOP_K]
    boxes = np.concatenate([draw.integers(0, 100, (images, CROPS, 2)), draw.integers(50, 200, (images, CROPS, 2))], 2)
    index = np.argsort(draw.random((images, CROPS, 20)), axis=2)[:, :, :TOP_K]
    digests = draw.integers(0, 256, (images, 16), np.uint8)
    if digest_of is not None:
        digests[:] = np.frombuffer(storage.image_digest(digest_of), np.uint8)
    return ShardLabels(
        keys=[f"class{number % 1000:04d}/image{number:08d}" for number in range(images)],
        image_digest=digests,
        height=np.full(images, 375, np.uint16),
        width=np.full(images, 500, np.uint16),
        target=np.full(images, -1, np.int32),
        boxes=boxes.astype(np.uint16),
        flip=draw.random((images, CROPS)) < 0.5,
        class_index=index.astype(np.uint16),
        class_prob=prob.astype(np.float16),
        target_prob=np.full((images, CROPS), np.nan, np.float16),
        bucket=np.zeros((images, CROPS), np.uint8),
    )


def label_set(folder: Path, layout: str, images: int) -> LabelSet:
    """One shard, with a manifest that is the golden one's but for its numbers."""
    picture = BytesIO()
    Image.new("RGB", (500, 375)).save(picture, "JPEG")
    image = picture.getvalue().ljust(IMAGE_BYTES, b"\0")
    labels = rows(images, image if layout == "webdataset" else None)
    name = parquet.file_name(0, 0) if layout == "parquet" else webdataset.file_name(0)
    path = folder / name
    path.parent.mkdir(parents=True)
    if layout == "parquet":
        parquet.write(path, labels)
    else:
        with webdataset.Writer(path) as writer:
            for row in labels:
                writer.add(row, image)
    manifest = fd.open_labels(GOLDEN / layout).manifest
    entry = (
        manifest.shards[0]
        .files[0]
        .model_copy(update={"path": name, "bytes": path.stat().st_size, "sha256": storage.sha256_file(path)})
    )
    changed = manifest.model_copy(
        update={
            "num_images": images,
            "num_crops": CROPS,
            "crops_per_block": CROPS,
            "top_k": TOP_K,
            "num_classes": CLASSES,
            "class_names": None,
            "shards": (manifest.shards[0].model_copy(update={"rows": images, "files": (entry,)}),),
            "source": manifest.source.model_copy(update={"images_seen": images + manifest.rejects.rows}),
        }
    )
    (folder / "manifest.json").write_text(changed.to_json())
    return fd.open_labels(folder)


def seconds(labels: LabelSet, verify_labels: str) -> float:
    storage._DIGESTS.clear()
    opened = labels.verified(verify_labels)
    start = time.perf_counter()
    opened.block(0, 0)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"pyarrow {pyarrow.__version__}, numpy {np.__version__}, {CROPS} crops, top-{TOP_K}, {options.rounds} rounds")
    for layout, images in (("parquet", options.images), ("webdataset", options.images // 4)):
        with tempfile.TemporaryDirectory() as folder:
            labels = label_set(Path(folder), layout, images)
            taken = {"first_read": [], "never": []}
            for _ in range(options.rounds):
                for setting, times in taken.items():
                    times.append(seconds(labels, setting))
            with_digests, without = (statistics.median(taken[setting]) for setting in ("first_read", "never"))
            size = labels.manifest.shards[0].files[0].bytes
            print(
                f"{layout}: a shard of {images:,} images, {size / 1e6:.1f} MB: {1000 * with_digests:.0f} ms with "
                f"digests, {1000 * without:.0f} ms without, ratio {with_digests / without:.2f}"
            )


if __name__ == "__main__":
    main()
