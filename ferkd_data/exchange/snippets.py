"""How to load a published label set, as a card shows it. A test runs each of these pieces of code."""

from __future__ import annotations

from ferkd_data.exchange.front_matter import config_names, patterns
from ferkd_data.manifest import Manifest
from ferkd_data.remote import parse_hub_url

LOCAL = "labels"
"""The folder that the snippets of other places than the hub pull a label set into."""


def loading(manifest: Manifest, url: str) -> str:
    """A Markdown section: ferkd-data, datasets, and DuckDB and Polars or webdataset."""
    on_hub = url.startswith("hf://")
    sections = ["## Use", _ferkd_data(manifest, url)]
    if not on_hub:
        place = url if "://" in url else "PATH/OR/URL"
        sections.append(f"The libraries below read a copy: `ferkd-data pull {place} {LOCAL}`.")
    sections.append(_datasets(manifest, url if on_hub else None))
    sections += [_webdataset(manifest, url if on_hub else None)] if manifest.layout == "webdataset" else []
    sections += _tables(manifest, url if on_hub else None) if manifest.layout == "parquet" else []
    return "\n\n".join(sections)


def _ferkd_data(manifest: Manifest, url: str) -> str:
    place = url if "://" in url else "PATH/OR/URL"
    images = "" if manifest.layout == "webdataset" else 'images="your/images", '
    crops = min(4, manifest.num_crops)
    return (
        "With `ferkd-data`, which cuts each crop out of its image again:\n\n"
        "```python\nimport ferkd_data as fd  # pip install ferkd-data\n\n"
        f'labels = fd.open_labels("{place}")\n'
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
    place = LOCAL if hub is None else hub.rstrip("/")
    files = [f"{place}/{pattern}" for pattern in patterns(manifest, 0)]
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
        place = parse_hub_url(hub)
        base = f"https://huggingface.co/datasets/{place.repository}/resolve/{place.revision or 'main'}/{place.folder}"
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
