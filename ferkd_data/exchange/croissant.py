"""Croissant metadata (ML Commons, version 1.1), by which other tools find and load the labels."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ferkd_data.exchange.card_facts import COLUMNS, CardFields
from ferkd_data.format.parquet import schema
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
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
PER_IMAGE = ("key", "image_digest", "height", "width", "target")


def render_croissant(labels: LabelSet, fields: CardFields, url: str) -> str:
    """Render JSON-LD: every file with its SHA-256, and the records of the first crop block (layout parquet)."""
    manifest = labels.manifest
    content: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": fields.title,
        "description": f"Soft labels of {manifest.num_crops} crops for each of {manifest.num_images} images.",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "license": fields.license,
        "url": fields.homepage or url,
        # Croissant wants a semantic version; a label set is known by its digest.
        "version": "1.0.0",
        "datePublished": fields.day,
        "creator": {"@type": "sc:Organization", "name": fields.author or fields.title},
        "citeAs": fields.citation or fields.title,
        "distribution": [_file_object(file) for shard in manifest.shards for file in shard.files],
    }
    if manifest.layout == "parquet":
        # Only the names, which do not depend on the numbers of crops and classes.
        columns = schema(1, 1, np.uint16, manifest.operation_words).names
        # The first block alone: every block has the same columns, and a large set would take a megabyte for each.
        files = [shard.files[0].path for shard in manifest.shards if shard.rows]
        content["recordSet"] = [_records(f"labels-{number:05d}", path, columns) for number, path in enumerate(files)]
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


def _records(name: str, path: str, columns: list[str]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": f"One record per image of {path}.",
        "field": [_field(name, path, column) for column in columns],
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
    # Lists of N or N * k values.
    return field if column in PER_IMAGE else {**field, "repeated": True}
