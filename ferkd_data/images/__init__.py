"""Sources of images (folders, tars, Parquet files), and decoding.

`open_source` turns SOURCE into one of three classes that fulfil the protocol `ImageSource` (in `refs.py`): they list
references to images, and read the bytes of references. `decode_rgb` turns bytes into pixels.
"""

from __future__ import annotations

from ferkd_data.errors import ImageError
from ferkd_data.images.class_list import ClassList, read_class_list
from ferkd_data.images.class_names import contradictions, order_note
from ferkd_data.images.decode import DEFAULT_MAX_PIXELS, decode_rgb, image_extension, image_size
from ferkd_data.images.folder import FolderSource
from ferkd_data.images.keys import check_key
from ferkd_data.images.opening import open_source
from ferkd_data.images.parquet import ParquetSource
from ferkd_data.images.refs import (
    REJECT_REASONS,
    ImageRef,
    ImageSource,
    LeftOut,
    Reject,
    describe_left_out,
    in_groups,
)
from ferkd_data.images.retrying import while_it_answers
from ferkd_data.images.tars import TarSource

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "REJECT_REASONS",
    "ClassList",
    "FolderSource",
    "ImageError",
    "ImageRef",
    "ImageSource",
    "LeftOut",
    "ParquetSource",
    "Reject",
    "TarSource",
    "check_key",
    "contradictions",
    "decode_rgb",
    "describe_left_out",
    "image_extension",
    "image_size",
    "in_groups",
    "open_source",
    "order_note",
    "read_class_list",
    "while_it_answers",
]
