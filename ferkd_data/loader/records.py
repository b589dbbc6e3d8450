"""A crop block's rows as records of one size, which many processes map into their memory.

Legend: N crops of a block, k kept classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.label_set import LabelSet
from ferkd_data.shards.columns import class_index_dtype

Records = npt.NDArray[np.void]
PLACE = ("image_offset", "image_bytes")
"""Where an image lies in its shard's tar, in layout webdataset."""


def record_dtype(labels: LabelSet, block: int) -> np.dtype[np.void]:
    manifest = labels.manifest
    num_crops, top_k = manifest.block_crops(block), manifest.top_k
    return np.dtype(
        [
            ("key_hash", "<u8"),
            ("image_digest", "u1", (16,)),
            ("height", "<u2"),
            ("width", "<u2"),
            ("target", "<i4"),
            ("boxes", "<u2", (num_crops, 4)),
            ("class_index", class_index_dtype(manifest.num_classes), (num_crops, top_k)),
            ("class_prob", "<f2", (num_crops, top_k)),
            ("target_prob", "<f2", (num_crops,)),
            ("flip", "?", (num_crops,)),
            ("bucket", "u1", (num_crops,)),
            ("operations", "<u2", (num_crops, manifest.operation_words)),
            *((name, "<i8") for name in PLACE if manifest.layout == "webdataset"),
        ]
    )


def fill(part: Records, labels: LabelSet, shard: int, block: int) -> None:
    """Write the rows of one shard. Raises ShardError for a damaged one, RemoteError."""
    rows = labels.block(shard, block)
    part["key_hash"] = rng.hashes64(rows.keys)
    if labels.manifest.layout == "webdataset":
        for name, places in zip(PLACE, labels.image_places(shard).T, strict=True):
            part[name] = places
    for name in part.dtype.names or ():
        if name != "key_hash" and name not in PLACE:
            part[name] = getattr(rows, name)
