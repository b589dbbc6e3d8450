"""Read a label set without ferkd-data, as docs/format.md says: python examples/standalone_reader.py LABELS"""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

SIDES = ("box_top", "box_left", "box_height", "box_width")
PER_CROP = ("class_index", "class_prob", "flip", "bucket", "target_prob")
# Recorded operations are further columns, read by standalone_operations.py; crop kinds name ranges of crop numbers.
KNOWN = {"recorded-operations-1", "crop-kinds-1"}


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Every image's labels: boxes (N, 4), class_index and class_prob (N, k), flip, bucket, target_prob, kind (N,)."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if (manifest["format"], manifest["version"]) != ("ferkd-data", 1):
        raise SystemExit(f"{folder}: not a label set of version 1")
    if unknown := set(manifest.get("requires", [])) - KNOWN:
        raise SystemExit(f"{folder}: requires {unknown}, which this reader does not know")
    kinds = [kind["name"] for kind in manifest.get("crop_kinds", []) for _ in range(kind["crops"])]
    for shard in manifest["shards"]:
        if shard["rows"]:
            files = [folder / file["path"] for file in sorted(shard["files"], key=lambda file: file["block"])]
            rows = read_tar(files[0]) if files[0].suffix == ".tar" else read_blocks(files, manifest["top_k"])
            yield from ({**row, "kind": kinds} for row in rows)


def read_blocks(files: list[Path], top_k: int) -> Iterator[dict[str, Any]]:
    """A row has its crops spread over the shard's block files."""
    for parts in zip(*(pq.read_table(file).to_pylist() for file in files), strict=True):
        crops = {name: np.concatenate([part[name] for part in parts]) for name in (*SIDES, *PER_CROP)}
        crops |= {name: crops[name].reshape(-1, top_k) for name in ("class_index", "class_prob")}
        yield row(parts[0]["key"], parts[0]["target"], crops)


def read_tar(file: Path) -> Iterator[dict[str, Any]]:
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(file) as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            sample, data = samples.setdefault(folder + slash + stem, {}), tar.extractfile(member).read()
            if suffix == "cls":
                sample["target"] = int(data)
            elif suffix.endswith(".npy"):
                sample[suffix.removesuffix(".npy")] = np.load(io.BytesIO(data), allow_pickle=False)
    for key, sample in samples.items():
        crops = dict(zip((*SIDES, "flip", "bucket"), sample["crops"].T, strict=True))
        yield row(key, sample.get("target"), sample | crops)


def row(key: str, target: int | None, crops: Any) -> dict[str, Any]:
    crops |= {"key": key, "target": target, "boxes": np.stack([crops[side] for side in SIDES], axis=1)}
    return {name: crops[name] for name in ("key", "target", "boxes", *PER_CROP)}


if __name__ == "__main__":
    for image in read_rows(Path(sys.argv[1])):
        print(image["key"], image["target"], image["boxes"][0], image["class_index"][0], image["class_prob"][0])
