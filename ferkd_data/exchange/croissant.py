"""Croissant metadata (ML Commons, version 1.0), so that other tools find and load the labels."""

from __future__ import annotations

import json
from typing import Any

from ferkd_data.exchange.card import CardFields
from ferkd_data.label_set import LabelSet

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
COLUMNS = {
    "key": ("sc:Text", "The image's unique key."),
    "height": ("sc:Integer", "Pixels of the decoded image."),
    "width": ("sc:Integer", "Pixels of the decoded image."),
    "target": ("sc:Integer", "Ground-truth class, null where unknown."),
    "box_top": ("sc:Integer", "First row of each crop."),
    "box_left": ("sc:Integer", "First column of each crop."),
    "box_height": ("sc:Integer", "Rows of each crop."),
    "box_width": ("sc:Integer", "Columns of each crop."),
    "flip": ("sc:Boolean", "Whether each crop is mirrored."),
    "class_index": ("sc:Integer", "The most probable classes of each crop, k for each."),
    "class_prob": ("sc:Float", "Their probabilities, k for each crop, descending."),
    "bucket": ("sc:Integer", "Difficulty: 0 extreme hard, 1 moderate hard, 2 hard positive, 3 easy positive."),
}
PER_IMAGE = ("key", "height", "width", "target")


def render_croissant(labels: LabelSet, fields: CardFields, url: str) -> str:
    """JSON-LD. Every file is listed with its SHA-256; records are those of the first crop block (layout parquet)."""
    manifest = labels.manifest
    content: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": fields.name,
        "description": f"Soft labels of {manifest.num_crops} crops for each of {manifest.num_images} images.",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "license": fields.license,
        "url": fields.homepage or url,
        "version": "1.0.0",
        "datePublished": fields.published,
        "creator": {"@type": "sc:Organization", "name": fields.author or fields.name},
        "citeAs": fields.citation or fields.name,
        "distribution": [_file_object(file) for shard in manifest.shards for file in shard.files],
    }
    if manifest.layout == "parquet":
        files = [shard.files[0].path for shard in manifest.shards if shard.rows]
        content["recordSet"] = [_records(f"labels-{number:05d}", path) for number, path in enumerate(files)]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _file_object(file: Any) -> dict[str, Any]:
    parquet = file.path.endswith(".parquet")
    return {
        "@type": "cr:FileObject",
        "@id": file.path,
        "name": file.path,
        "contentUrl": file.path,
        "contentSize": f"{file.bytes} B",
        "encodingFormat": "application/x-parquet" if parquet else "application/x-tar",
        "sha256": file.sha256,
    }


def _records(name: str, path: str) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": f"One record per image of {path}.",
        "field": [_field(name, path, column) for column in COLUMNS],
    }


def _field(records: str, path: str, column: str) -> dict[str, Any]:
    data_type, description = COLUMNS[column]
    field: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": f"{records}/{column}",
        "name": column,
        "description": description,
        "dataType": data_type,
        "source": {"fileObject": {"@id": path}, "extract": {"column": column}},
    }
    return field if column in PER_IMAGE else {**field, "repeated": True}
