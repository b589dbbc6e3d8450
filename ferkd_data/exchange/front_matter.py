"""Parts of a card that other programs read: its YAML head, for the hub and `datasets`, and code that loads the labels.

A test runs each piece of code.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from ferkd_data.crop_kinds import kind_of_crop
from ferkd_data.exchange.card_facts import CardFields, Contents
from ferkd_data.format import crop_arrays, parquet
from ferkd_data.format.manifest import Manifest
from ferkd_data.labels.rows import class_index_dtype
from ferkd_data.remote import parse_hub_url

SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)
LARGEST = "n>1T"
MAX_NAMED_CLASSES = 5_000
"""The hub's viewer handles class names up to about this number; beyond, a target is a plain number."""


def front_matter(manifest: Manifest, fields: CardFields, contents: Contents) -> str:
    """Render the YAML head of a card, as the hub and `datasets` read it."""
    lines = [
        f"pretty_name: {quoted(fields.title)}",
        f"license: {quoted(fields.license or '')}",
        *([f"license_name: {quoted(fields.license_name or '')}"] if fields.license == "other" else []),
        *([f"license_link: {quoted(fields.license_link or 'LICENSE')}"] if fields.license == "other" else []),
        "task_categories: [image-classification]",
        "annotations_creators: [machine-generated]",
        f"size_categories: [{quoted(size_category(manifest.num_images))}]",
        *([f"source_datasets: [{', '.join(map(quoted, fields.source_datasets))}]"] if fields.source_datasets else []),
        "tags: [knowledge-distillation, soft-labels, ferkd-data]",
        "configs:",
        *_configs(manifest),
        "dataset_info:",
        *_features(manifest, contents),
    ]
    return "\n".join(["---", *lines, "---"])


def size_category(num_images: int) -> str:
    """Return the hub's name for a number of rows, such as 1M<n<10M."""
    return next((name for limit, name in SIZES if num_images < limit), LARGEST)


def patterns(manifest: Manifest, block: int) -> list[str]:
    """Return the globs of a crop block's files, one for each depth of folders."""
    top, name = ("shards", "*.tar") if manifest.layout == "webdataset" else ("labels", f"*-{block:03d}.parquet")
    # Depths differ: from the 500th shard on, files lie in folders below (`shard_folder`).
    levels = {file.path.count("/") for shard in manifest.shards for file in shard.files}
    return [f"{top}/{'*/' * (level - 1)}{name}" for level in sorted(levels)] or [f"{top}/{name}"]


def _configs(manifest: Manifest) -> Iterator[str]:
    # A configuration for each crop block: `datasets` would read blocks of one configuration as further rows.
    for block, name in enumerate(config_names(manifest)):
        files = ", ".join(map(quoted, patterns(manifest, block)))
        yield from (f"- config_name: {name}", f"  data_files: [{files}]")
        if block == 0:
            yield "  default: true"


def config_names(manifest: Manifest) -> list[str]:
    """Return the name of each crop block's configuration, by its crop kind where there are any; `default` for tars."""
    if manifest.layout == "webdataset":
        return ["default"]
    if not manifest.kinds:
        return [f"crops-{block:03d}" for block in range(manifest.num_blocks)]
    kinds = [kind_of_crop(manifest.kinds, block * manifest.crops_per_block) for block in range(manifest.num_blocks)]
    names = [kind.name for kind in kinds if kind is not None]
    return [f"{name}-{names[:block].count(name):03d}" for block, name in enumerate(names)]


def _features(manifest: Manifest, contents: Contents) -> Iterator[str]:
    target = ["dtype: int32"]
    if manifest.class_names is not None and manifest.num_classes <= MAX_NAMED_CLASSES:
        names = enumerate(distinct(manifest.class_names))
        target = ["dtype:", "  class_label:", "    names:", *(f"      '{i}': {quoted(name)}" for i, name in names)]
    for name in config_names(manifest):
        yield from (f"- config_name: {name}", "  features:")
        for column, kind in _columns(manifest, contents):
            yield f"  - name: {column}"
            yield from (f"    {line}" for line in (target if kind == "target" else [kind]))


def _columns(manifest: Manifest, contents: Contents) -> Iterator[tuple[str, str]]:
    """Yield names and types as `datasets` writes them in YAML; `target` stands for the class."""
    index_dtype = class_index_dtype(manifest.num_classes)
    if manifest.layout == "webdataset":
        # `datasets` adds these two to every sample of a tar.
        yield from (("__key__", "dtype: string"), ("__url__", "dtype: string"))
        if contents.images_of_class:
            yield "cls", "target"
        # One crop and one class: only the number of axes matters here.
        for suffix, (dtype, shape) in crop_arrays.shapes(1, 1, index_dtype).items():
            yield suffix, f"list: {dtype.name}" if len(shape) == 1 else f"list: {{list: {dtype.name}}}"
        if manifest.augmentations:
            yield crop_arrays.OPERATIONS, "list: {list: uint16}"
        for suffix in contents.image_suffixes:
            yield suffix, "dtype: image"
        return
    for field in parquet.schema(1, 1, np.dtype(index_dtype), manifest.operation_words):
        if field.name == "target":
            yield "target", "target"
        elif pa.types.is_fixed_size_list(field.type):
            # Arrow prints float32 as "float", which `datasets` does not know.
            yield field.name, f"list: {str(field.type.value_type).replace('float', 'float32')}"
        else:
            yield field.name, f"dtype: {field.type}"


def distinct(names: tuple[str, ...]) -> list[str]:
    """Make class names unique, as `datasets` requires. ImageNet has two cranes; the second becomes `crane (517)`."""
    seen: set[str] = set()
    found = []
    for number, name in enumerate(names):
        # Again, as "crane (517)" may be a class's real name too.
        while name in seen:
            name = f"{name} ({number})"
        seen.add(name)
        found.append(name)
    return found


def quoted(text: str) -> str:
    """Return any text as a YAML string in double quotes."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    if character in '"\\':
        return f"\\{character}"
    if 0xD800 <= code < 0xE000:
        # Half of a pair, which no UTF-8 file can hold.
        return "?"
    # U+FEFF is no byte order mark in the middle of a text, but YAML readers take it for one.
    if character.isprintable() and code != 0xFEFF:
        return character
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


LOCAL = "labels"
"""Folder that the code of the card pulls a label set into, where it is not on the hub."""


def loading(manifest: Manifest, url: str) -> str:
    """Make the section with code for ferkd-data, datasets, and DuckDB and Polars or webdataset."""
    on_hub = url.startswith("hf://")
    sections = ["## Use", _ferkd_data(manifest, url)]
    if not on_hub:
        location = url if "://" in url else "PATH/OR/URL"
        sections.append(f"The libraries below read a copy: `ferkd-data pull {location} {LOCAL}`.")
    sections.append(_datasets(manifest, url if on_hub else None))
    sections += [_webdataset(manifest, url if on_hub else None)] if manifest.layout == "webdataset" else []
    sections += _tables(manifest, url if on_hub else None) if manifest.layout == "parquet" else []
    return "\n\n".join(sections)


def _ferkd_data(manifest: Manifest, url: str) -> str:
    location = url if "://" in url else "PATH/OR/URL"
    images = "" if manifest.layout == "webdataset" else 'images="your/images", '
    crops = min(4, manifest.num_crops)
    return (
        "With `ferkd-data`, which cuts each crop out of its image again:\n\n"
        "```python\nimport ferkd_data as fd  # pip install ferkd-data\n\n"
        f'labels = fd.open_labels("{location}")\n'
        f"loader = fd.CropLoader(labels, {images}batch_size=256, crops_per_image={crops}, size=224)\n"
        "for images, targets in loader:  # uint8 (B, 3, 224, 224), and sparse soft targets\n"
        "    loss = fd.soft_cross_entropy(model(fd.normalize(images)), targets)\n```"
    )


def _datasets(manifest: Manifest, hub: str | None) -> str:
    name = LOCAL if hub is None else parse_hub_url(hub).repository
    config = config_names(manifest)[0]
    return (
        "With `datasets` (and in the hub's viewer):\n\n```python\nimport datasets\n\n"
        f'rows = datasets.load_dataset("{name}", "{config}", split="train", streaming=True)\n'
        f"print(next(iter(rows)))\n```"
    )


def _tables(manifest: Manifest, hub: str | None) -> list[str]:
    location = LOCAL if hub is None else hub.rstrip("/")
    files = [f"{location}/{pattern}" for pattern in patterns(manifest, 0)]
    k = manifest.top_k
    sql = ", ".join(f"'{file}'" for file in files)
    return [
        "With DuckDB, the classes whose crops the teachers are least sure of:\n\n```python\nimport duckdb\n\n"
        'print(duckdb.sql("""\n'
        "    select target, count(*) as images, avg(target_prob[1]) as first_crop_target_prob\n"
        f"    from read_parquet([{sql}]) group by target order by first_crop_target_prob limit 10\n"
        '"""))\n```',
        "With Polars, the mean probability of the most probable class:\n\n```python\nimport polars as pl\n\n"
        f'rows = pl.read_parquet({files}, columns=["key", "class_prob"])\n'
        f'print(rows["class_prob"].to_numpy().reshape(len(rows), -1, {k})[:, :, 0].mean())\n```',
    ]


def _webdataset(manifest: Manifest, hub: str | None) -> str:
    if hub is None:
        read, files = "", '[f"labels/{file}" for file in files]'
    else:
        on_hub = parse_hub_url(hub)
        repository = f"https://huggingface.co/datasets/{on_hub.repository}"
        base = f"{repository}/resolve/{on_hub.revision or 'main'}/{on_hub.folder}"
        read, files = base, f'[f"{base}{{file}}" for file in files]'
    manifest_text = (
        f'urllib.request.urlopen("{read}manifest.json").read()' if read else f'open("{LOCAL}/manifest.json").read()'
    )
    imports = "import json\nimport urllib.request\n" if read else "import json\n"
    return (
        f"With plain `webdataset`:\n\n```python\n{imports}\nimport webdataset as wds\n\n"
        f'shards = json.loads({manifest_text})["shards"]\n'
        'files = [file["path"] for shard in shards for file in shard["files"]]\n'
        f'for sample in wds.WebDataset({files}, shardshuffle=False).decode("rgb"):\n'
        '    boxes, prob = sample["crops.npy"][:, :4], sample["class_prob.npy"]  # (N, 4), (N, k)\n'
        '    image = next(sample[suffix] for suffix in ("jpg", "png", "webp") if suffix in sample)\n```'
    )
