"""Fill the generated tables of docs/format.md from the code. A test checks that they are up to date."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from ferkd_data import parquet_guard
from ferkd_data.augment import OPERATIONS
from ferkd_data.format import crop_arrays, manifest, manifest_file, parquet
from ferkd_data.images import REJECT_REASONS
from ferkd_data.images.keys import MAX_KEY_BYTES
from ferkd_data.labels import statistics

DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"


def parquet_table() -> str:
    rows = ["| column | type | null |", "| --- | --- | --- |"]
    # 7 crops at top-5 stand for N crops at top-k.
    for field in parquet.schema(7, 5, np.uint16):
        kind = str(field.type).replace("fixed_size_list<element: ", "list<").replace("<float>", "<float32>")
        kind = kind.replace("[35]", "[N*k]").replace("[7]", "[N]").replace("binary", "binary (16 bytes)")
        elements = "its elements, where unknown" if field.name == "target_prob" else "no"
        rows.append(f"| `{field.name}` | {kind} | {'where unknown' if field.nullable else elements} |")
    return "\n".join(rows)


def members_table() -> str:
    rows = ["| member | type | shape | content |", "| --- | --- | --- | --- |"]
    contents = {
        "crops.npy": f"the columns {', '.join(crop_arrays.CROPS_COLUMNS)}; flip is 0 or 1",
        "class_index.npy": "descending by probability; `<u4` where C is above 65,536",
        "class_prob.npy": "float16 values, as in layout `parquet`",
        "target_prob.npy": "float16 values; NaN where unknown",
    }
    # 7 crops at top-5 stand for N crops at top-k.
    for suffix, (dtype, shape) in crop_arrays.shapes(7, 5, np.uint16).items():
        sides = ", ".join({7: "N", 5: "k"}.get(side, str(side)) for side in shape)
        rows.append(
            f"| `KEY.{suffix}` | `{dtype.str}` | ({sides}{',' if len(shape) == 1 else ''}) | {contents[suffix]} |"
        )
    return "\n".join(rows)


def operations_table() -> str:
    rows = ["| code | operation | value | unit |", "| ---: | --- | --- | --- |"]
    for one in OPERATIONS:
        low, high = one.values
        rows.append(f"| {one.code} | `{one.name}` | {f'{low:,} to {high:,}' if high else ''} | {one.unit} |")
    return "\n".join(rows)


def reasons_table() -> str:
    rows = (f"| `{reason}` | {meaning} |" for reason, meaning in REJECT_REASONS.items())
    return "\n".join(["| reason | meaning |", "| --- | --- |", *rows])


def manifest_tables() -> str:
    models: list[type[BaseModel]] = [
        manifest.Manifest,
        manifest.CreatedBy,
        manifest.TeacherEntry,
        manifest.CropDistributionEntry,
        manifest.CropKindEntry,
        manifest.ThresholdsEntry,
        manifest.SourceEntry,
        manifest.ShardEntry,
        manifest.BlockEntry,
        manifest.RejectsEntry,
        statistics.Statistics,
    ]
    return "\n\n".join(model_table(model) for model in models)


def model_table(model: type[BaseModel]) -> str:
    docs = field_docs(model)
    schema = model.model_json_schema()
    rows = [f"`{model.__name__}`:\n", "| field | type | meaning |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        optional = "" if field.is_required() else " (optional)"
        kind = type_name(schema["properties"][name])
        rows.append(f"| `{name}` | {kind}{optional} | {docs.get(name, '')} |")
    return "\n".join(rows)


def type_name(schema: dict[str, object]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema:
        return f"`{schema['const']!r}`".replace("'", '"')
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])  # type: ignore[attr-defined]
    if "anyOf" in schema:
        return " or ".join(type_name(part) for part in schema["anyOf"])  # type: ignore[attr-defined]
    if schema.get("type") == "array":
        items = schema.get("items") or {"type": "number"}
        if "prefixItems" in schema:
            items = schema["prefixItems"][0]  # type: ignore[index]
        return f"array of {type_name(items)}"  # type: ignore[arg-type]
    return str(schema.get("type", "any"))


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """The string under each field, of the model and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base is BaseModel or not issubclass(base, BaseModel):
            continue
        body = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(body, ast.ClassDef)
        for before, node in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if is_text and isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
                docs[before.target.id] = " ".join(str(node.value.value).split())  # type: ignore[attr-defined]
    return docs


def limits_table() -> str:
    rows = {
        "bytes of `manifest.json`": manifest_file.MAX_MANIFEST_BYTES,
        "bytes of a key": MAX_KEY_BYTES,
        "crops per image": manifest.MAX_CROPS,
        "classes kept for each crop": manifest.MAX_TOP_K,
        "classes": manifest.MAX_CLASSES,
        "any count": statistics.MAX_COUNT,
        "pixels of an image's side": 65535,
        "bytes of a sample's label members": crop_arrays.MAX_ARRAYS_BYTES,
        "bytes of a Parquet footer": parquet_guard.MAX_FOOTER_BYTES,
        "bytes of a Parquet page header": parquet_guard.MAX_PAGE_HEADER_BYTES,
        f"bytes of a block in memory (or {parquet.MAX_EXPANSION} times its file)": parquet.MAX_DECODED_BYTES,
    }
    return "\n".join(
        ["| what | at most |", "| --- | ---: |", *(f"| {name} | {most:,} |" for name, most in rows.items())]
    )


TABLES = {
    "operations": operations_table,
    "limits": limits_table,
    "parquet columns": parquet_table,
    "label members": members_table,
    "reasons": reasons_table,
    "manifest": manifest_tables,
}


def filled(text: str) -> str:
    """The document with every `<!-- generated: NAME -->` block filled in."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)"
        replacement = rf"\g<1>{make()}\n\g<2>"
        text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"docs/format.md must have one generated block {name!r}, has {count}")
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
