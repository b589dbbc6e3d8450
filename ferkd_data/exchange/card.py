"""The card: README.md of a published label set, in the hub's data set card format."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone

from ferkd_data.errors import UsageError
from ferkd_data.label_set import LabelSet
from ferkd_data.manifest import Manifest
from ferkd_data.statistics import summarise

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))

METHOD = (
    "Z. Shen and E. Xing, A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022 (FKD)",
    "Z. Shen, FerKD: Surgical Label Adaptation for Efficient Distillation, ICCV 2023",
)


@dataclass(frozen=True, kw_only=True)
class CardFields:
    """What only the publisher knows."""

    name: str
    """How the label set is called."""
    license: str
    """Of the labels: an SPDX identifier such as cc-by-4.0, or `other`."""
    image_license: str | None = None
    """Of the images, where they are included (layout webdataset)."""
    author: str | None = None
    homepage: str | None = None
    published: str = field(default_factory=lambda: datetime.now(timezone.utc).date().isoformat())
    """The day, as YYYY-MM-DD."""
    citation: str | None = None
    """BibTeX, or a sentence."""


def check_fields(fields: CardFields, manifest: Manifest) -> None:
    """Raises UsageError where the card would leave readers without a licence."""
    if manifest.layout == "webdataset" and not fields.image_license:
        raise UsageError("layout webdataset holds the images too: say under which licence with --image-license")


def render_card(labels: LabelSet, fields: CardFields, url: str) -> str:
    """Markdown with YAML front matter. Raises UsageError as `check_fields`."""
    check_fields(fields, labels.manifest)
    sections = [
        _front_matter(labels.manifest, fields),
        f"# {fields.name}\n\n{_summary(labels.manifest)}",
        _loading(labels.manifest, url),
        _teachers(labels.manifest),
        _crops(labels.manifest),
        _statistics(labels.manifest),
        _files(labels),
        _licence(labels.manifest, fields),
        _citation(labels, fields, url),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(manifest: Manifest, fields: CardFields) -> str:
    size = next((name for limit, name in SIZES if manifest.num_images < limit), "10M<n<100M")
    lines = [
        f"pretty_name: {json.dumps(fields.name)}",
        f"license: {json.dumps(fields.license)}",
        "task_categories: [image-classification]",
        "annotations_creators: [machine-generated]",
        f"size_categories: [{json.dumps(size)}]",
        "tags: [knowledge-distillation, soft-labels, ferkd-data]",
        "configs:",
    ]
    if manifest.layout == "webdataset":
        return "\n".join(["---", *lines, "- config_name: default", '  data_files: "shards/*.tar"', "---"])
    for block in range(manifest.num_blocks):
        lines += [f"- config_name: crops-{block:03d}", f'  data_files: "labels/*-{block:03d}.parquet"']
        lines += ["  default: true"] if block == 0 else []
    return "\n".join(["---", *lines, "---"])


def _summary(manifest: Manifest) -> str:
    what = "images and their labels" if manifest.layout == "webdataset" else "labels only, without the images"
    return (
        f"Soft labels of {manifest.num_crops} crops for each of {manifest.num_images:,} images "
        f"({manifest.statistics.crops:,} crops): the {manifest.top_k} most probable of {manifest.num_classes:,} "
        f"classes as {len(manifest.teachers)} teacher{'s' if len(manifest.teachers) > 1 else ''} saw them, for "
        f"knowledge distillation after FKD and FerKD. Layout `{manifest.layout}`: {what}. Written by "
        f"{_code(f'{manifest.created_by.name} {manifest.created_by.version}')} from: "
        f"{_code(manifest.source.description)}."
    )


def _loading(manifest: Manifest, url: str) -> str:
    place = url if "://" in url else "PATH/OR/URL"
    images = "" if manifest.layout == "webdataset" else ', images="your/images"'
    return (
        "## Use\n\n```python\nimport ferkd_data as fd  # pip install ferkd-data\n\n"
        f'loader = fd.CropLoader(fd.open_labels("{place}"){images}, batch_size=256, crops_per_image=4, size=224)\n'
        "for images, targets in loader:\n"
        "    loss = fd.soft_cross_entropy(model(fd.normalize(images)), targets)\n```"
    )


def _teachers(manifest: Manifest) -> str:
    statistics = manifest.statistics
    rows = [
        "## Teachers",
        "",
        "| teacher | input | weight | temperature | top-1 on the crops | SHA-256 of the weights |",
    ]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    for number, teacher in enumerate(manifest.teachers):
        right = "unknown"
        if statistics.crops_with_target and len(statistics.teacher_top1_matches_target) > number:
            right = f"{statistics.teacher_top1_matches_target[number] / statistics.crops_with_target:.1%}"
        digest = "unknown" if set(teacher.digest) == {"0"} else f"`{teacher.digest[:16]}`"
        rows.append(
            f"| {_code(teacher.name)} | {teacher.size} px {teacher.interpolation} | {teacher.weight:g} | "
            f"{teacher.temperature:g} | {right} | {digest} |"
        )
    if statistics.crops_with_target:
        share = statistics.top1_matches_target / statistics.crops_with_target
        rows += [
            "",
            f"Together (`{manifest.ensemble}`): the ground truth comes first in {share:.1%} of the crops.",
        ]
    return "\n".join(rows)


def _crops(manifest: Manifest) -> str:
    crops, thresholds = manifest.crop_distribution, manifest.thresholds
    imported = (manifest.model_extra or {}).get("imported_from")
    seed = f"seed {manifest.seed}" if imported is None else "drawn elsewhere, without a seed of ours"
    measured = "p_max" if thresholds.confidence == "max" else "the ground truth's probability"
    return (
        f"## Crops\n\nRandomResizedCrop, scale {crops.scale[0]:g} to {crops.scale[1]:g}, ratio {crops.ratio[0]:.4g} to "
        f"{crops.ratio[1]:.4g}, horizontal flip {crops.hflip:g}, {seed}; in blocks of {manifest.crops_per_block}. "
        f"Buckets by {measured}: below {thresholds.low:g} extreme hard, below {thresholds.mid:g} moderate hard, below "
        f"{thresholds.top:g} hard positive, above easy positive."
    )


def _statistics(manifest: Manifest) -> str:
    summary = summarise(manifest.statistics)
    rows = ["## What the labels say", "", "| p_max | share % | aggregate % | ImageNet in the FerKD paper % |"]
    rows.append("| --- | --- | --- | --- |")
    for row in summary["p_max"]:
        rows.append(
            f"| {row['low']:.2f}-{row['high']:.2f} | {row['share']:.2f} | {row['aggregate']:.2f} | "
            f"{row['paper_share']:.2f} |"
        )
    rows += ["", "| bucket | crops | share % |", "| --- | --- | --- |"]
    rows += [
        f"| `{name}` | {bucket['crops']:,} | {bucket['share']:.2f} |" for name, bucket in summary["buckets"].items()
    ]
    rows += ["", f"The stored classes hold {summary['mean_kept_prob']:.1%} of the probability on the mean crop."]
    return "\n".join(rows)


def _files(labels: LabelSet) -> str:
    manifest = labels.manifest
    files = [file for shard in manifest.shards for file in shard.files]
    size = sum(file.bytes for file in files)
    per_crop = size / max(manifest.statistics.crops, 1)
    return (
        f"## Files\n\n{len(files)} shard files, {size / 1e6:,.1f} MB ({per_crop:.1f} bytes per crop), each with its "
        "size and SHA-256 in `manifest.json`. `ferkd-data verify` checks all of it; `ferkd-data pull` copies all or "
        f"the first crop blocks. {manifest.rejects.rows:,} images could not be used: see `{manifest.rejects.path}`.\n\n"
        f"Its identity, the SHA-256 of `manifest.json`: `{labels.identity}`"
    )


def _licence(manifest: Manifest, fields: CardFields) -> str:
    lines = ["## Licence", "", f"Labels: {fields.license}."]
    lines.append(f"Images: {fields.image_license}." if fields.image_license else "The images are not included.")
    if fields.author or fields.homepage:
        lines.append(f"Published by {', '.join(part for part in (fields.author, fields.homepage) if part)}.")
    return "\n".join(lines)


def _citation(labels: LabelSet, fields: CardFields, url: str) -> str:
    """How to cite the label set, as its publisher says or as BibTeX from what is known; then the method."""
    place = fields.homepage or (url if "://" in url else None)
    entry = {
        "title": fields.name,
        "author": fields.author,
        "year": fields.published[:4],
        "url": place,
        "note": f"soft labels, manifest {labels.identity[:16]}",
    }
    said = ",\n".join(f"  {name} = {{{value}}}" for name, value in entry.items() if value)
    own = fields.citation or f"```bibtex\n@misc{{{_bibtex_key(fields)},\n{said}\n}}\n```"
    return f"## Citation\n\n{own}\n\nThe method:\n\n" + "\n".join(f"- {work}" for work in METHOD)


def _bibtex_key(fields: CardFields) -> str:
    return re.sub(r"[^a-z0-9]+", "-", fields.name.lower()).strip("-") + fields.published[:4]


def _code(text: str) -> str:
    """Words of others as a code span on one line: there they are neither HTML, nor links, nor cells of a table."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return f"`{' '.join(shown.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"
