"""The table of columns that a card shows, from the same descriptions as the Croissant metadata."""

from __future__ import annotations

import numpy as np

from ferkd_data.manifest import Manifest
from ferkd_data.shards import crop_arrays, parquet
from ferkd_data.shards.columns import class_index_dtype

COLUMNS = {
    "key": ("sc:Text", "The image's unique key."),
    "image_digest": ("sc:Text", "BLAKE2b-128 of the image file's bytes."),
    "height": ("sc:Integer", "Height of the decoded image in pixels."),
    "width": ("sc:Integer", "Width of the decoded image in pixels."),
    "target": ("sc:Integer", "Ground-truth class, null where unknown."),
    "box_top": ("sc:Integer", "First row of each crop."),
    "box_left": ("sc:Integer", "First column of each crop."),
    "box_height": ("sc:Integer", "Rows of each crop."),
    "box_width": ("sc:Integer", "Columns of each crop."),
    "flip": ("sc:Boolean", "Whether each crop is mirrored left to right after it was cut."),
    "class_index": (
        "sc:Integer",
        "The k most probable classes of each crop, flat: entry n * k + j is class j of crop n.",
    ),
    "class_prob": ("sc:Float", "Their probabilities in the same order, descending in each crop; float16 values."),
    "target_prob": ("sc:Float", "The probability of the ground truth in each crop, null where unknown."),
    "op_code": (
        "sc:Integer",
        "Recorded augmentations of each crop, flat, 0 where none: see docs/format.md.",
    ),
    "op_value": ("sc:Integer", "Their values in the same order."),
    "erase_top": ("sc:Integer", "First row of the erased box of each crop; its height is 0 where nothing is erased."),
    "erase_left": ("sc:Integer", "First column of the erased box."),
    "erase_height": ("sc:Integer", "Rows of the erased box."),
    "erase_width": ("sc:Integer", "Columns of the erased box."),
    "bucket": (
        "sc:Integer",
        "Difficulty of each crop: 0 extreme hard, 1 moderate hard, 2 hard positive, 3 easy positive.",
    ),
}
"""Croissant's type and the meaning of each column of layout parquet."""
MEMBERS = {
    "crops.npy": "Boxes (top, left, height, width), flip (0 or 1) and bucket (0 to 3) of each crop.",
    "class_index.npy": "The k most probable classes of each crop.",
    "class_prob.npy": "Their probabilities, descending in each crop; float16 values.",
    "target_prob.npy": "The probability of the ground truth in each crop, NaN where unknown.",
}


def columns_table(manifest: Manifest) -> str:
    """A Markdown section; N crops per image (of a block), k kept classes."""
    index_dtype = np.dtype(class_index_dtype(manifest.num_classes))
    if manifest.layout == "webdataset":
        members = crop_arrays.shapes(manifest.num_crops, manifest.top_k, index_dtype)
        rows = [
            f"| `{name}` | {dtype.name}{list(shape)} | {MEMBERS[name]} |" for name, (dtype, shape) in members.items()
        ]
        if manifest.augmentations:
            rows += [
                f"| `{crop_arrays.OPERATIONS}` | uint16 | Recorded augmentations of each crop: see docs/format.md. |"
            ]
        rows += ["| `cls` | text | Ground-truth class; absent where unknown. |"]
        rows += ["| `jpg`, `png`, … | bytes | The image as it came, under the extension of its format. |"]
        title = "One sample for each image, with these members:"
    else:
        crops = manifest.block_crops(0)
        rows = []
        for field in parquet.schema(crops, manifest.top_k, index_dtype, manifest.operation_words):
            kind = str(field.type).replace("fixed_size_list<element: ", "list<").replace("float", "float32")
            rows.append(f"| `{field.name}` | {kind} | {COLUMNS[field.name][1]} |")
        title = f"One row for each image. A file holds a block of {crops} crops of its images; k is {manifest.top_k}."
    return "\n".join(["## Columns", "", title, "", "| column | type | content |", "| --- | --- | --- |", *rows])
