"""What a card tells of a label set that its manifest does not: images of each class, and formats of the images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ferkd_data.label_set import LabelSet
from ferkd_data.shards import parquet, webdataset
from ferkd_data.shards.columns import UNKNOWN_TARGET


@dataclass(frozen=True, kw_only=True)
class Contents:
    images_of_class: Counter[int]
    """Images by their ground truth; those without one are left out."""
    image_suffixes: tuple[str, ...]
    """Of the images in tars, such as jpg, the most frequent first; none in layout parquet."""


def read_contents(labels: LabelSet) -> Contents:
    """Reads the column of targets, or the headers of all tars. Raises ShardError, RemoteError."""
    classes: Counter[int] = Counter()
    suffixes: Counter[str] = Counter()
    for shard in labels.manifest.shards:
        if not shard.rows:
            continue
        with labels.open(shard.files[0]) as file:
            if labels.manifest.layout == "parquet":
                classes.update(parquet.read_targets(file.path, rows=shard.rows).tolist())
                continue
            for sample in webdataset.scan(file.path):
                classes[sample.target] += 1
                suffixes[sample.image_suffix] += 1
    del classes[UNKNOWN_TARGET]
    return Contents(images_of_class=classes, image_suffixes=tuple(name for name, _ in suffixes.most_common()))
