"""The card: README.md of a published label set, in the hub's data set card format."""

from __future__ import annotations

import re
from typing import Any

from ferkd_data.crop_kinds import kind_starts
from ferkd_data.crops import CropDistribution
from ferkd_data.exchange.card_facts import CardFields, Contents, check_fields, columns_table, mark, read_contents
from ferkd_data.exchange.front_matter import front_matter, loading
from ferkd_data.exchange.origins import drawn_elsewhere, draws_in_words, seeds_in_words
from ferkd_data.format.manifest import UNKNOWN_SHA256, CropDistributionEntry, Manifest
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.statistics import summarise
from ferkd_data.words import count, in_percent, percent

METHOD = (
    "Z. Shen and E. Xing, A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022 (FKD), "
    "https://arxiv.org/abs/2112.01528",
    "Z. Shen, FerKD: Surgical Label Adaptation for Efficient Distillation, ICCV 2023, https://arxiv.org/abs/2312.17473",
)
CLASSES_SHOWN = 20


def render_card(labels: LabelSet, fields: CardFields, url: str) -> str:
    """Render a card as Markdown with YAML front matter. `fields` must be `completed`; raises UsageError otherwise."""
    manifest = labels.manifest
    check_fields(fields, manifest)
    # Reads targets, or the headers of all tars: the one part of a card that the manifest does not hold.
    contents = read_contents(labels)
    sections = [
        front_matter(manifest, fields, contents),
        f"# {fields.title}\n\n{_summary(manifest)}",
        *_part(manifest),
        loading(manifest, url),
        _images(labels),
        columns_table(manifest),
        _classes(manifest, contents),
        _teachers(manifest),
        _crops(manifest),
        _statistics(manifest),
        _files(labels),
        _uses(manifest),
        _licence(manifest, fields),
        _citation(labels, fields, url),
    ]
    text = "\n\n".join(sections)
    return f"{text}\n\n{mark(fields, labels.identity, text)}\n"


def _summary(manifest: Manifest) -> str:
    what = "images and their labels" if manifest.layout == "webdataset" else "labels only, without the images"
    teachers = "one teacher" if len(manifest.teachers) == 1 else f"an ensemble of {len(manifest.teachers)} teachers"
    return (
        f"Soft labels of {count(manifest.num_crops, 'crop')} for each of {count(manifest.num_images, 'image')} "
        f"({count(manifest.statistics.crops, 'crop')}): the {manifest.top_k} most probable of "
        f"{manifest.num_classes:,} classes according to {teachers}, for knowledge distillation after FKD and FerKD. "
        f"Layout `{manifest.layout}`: {what}. Written by "
        f"{_code(f'{manifest.created_by.name} {manifest.created_by.version}')} from: "
        f"{_code(manifest.source.description)}."
    )


def _part(manifest: Manifest) -> list[str]:
    """Make a note on where the rest is, for a part that `pull` took out of a larger label set."""
    origin: Any = (manifest.model_extra or {}).get("pulled_from")
    if not isinstance(origin, dict):
        return []
    images, crops, url = origin.get("images", "?"), origin.get("crops", "?"), str(origin.get("url"))
    known = isinstance(images, int) and isinstance(crops, int)
    # More images or crops were added to the part since, so it is none any more.
    if known and (manifest.num_images > images or manifest.num_crops > crops):
        return []
    # A path on the publisher's disk is no address, and nobody else's business.
    place = f", pulled from {_code(url)}" if "://" in url else ""
    return [
        f"**This is a part of a larger label set**: {manifest.num_images} images with {manifest.num_crops} crops each, "
        f"out of {images} images with {crops} crops each{place}. Everything below describes the part."
    ]


def _images(labels: LabelSet) -> str:
    if labels.manifest.layout == "webdataset":
        return (
            "## Images\n\nThe images lie beside their labels, byte for byte as they came. Crop boxes are in pixels of "
            "the decoded image; EXIF orientation is ignored."
        )
    key = next(labels.keys(), None)
    example = f" For example, one key is {_code(key)}." if key else ""
    return (
        "## Images\n\nThe images are not included. Labels and images are joined by `key`, the image's path below its "
        f"folder (or its name in a tar) without the extension.{example} `image_digest` is BLAKE2b of the image "
        "file's bytes with a digest of 16 bytes (`hashlib.blake2b(data, digest_size=16)`), so other versions of an "
        "image are noticed. Crop boxes are in pixels of the decoded image; EXIF orientation is ignored."
    )


def _classes(manifest: Manifest, contents: Contents) -> str:
    counts = contents.images_of_class
    without = manifest.num_images - counts.total()
    if not counts:
        return "## Classes\n\nNo image has a ground truth."
    # The largest and smallest classes show what is unbalanced; a thousand rows in between would hide it.
    common = counts.most_common()
    names = manifest.class_names
    rows = [
        f"| {index} | {_code(names[index]) if names and index < len(names) else ''} | {number:,} | "
        f"{number * manifest.num_crops:,} |"
        for index, number in (common if len(common) <= CLASSES_SHOWN else common[: CLASSES_SHOWN // 2])
    ]
    if len(common) > CLASSES_SHOWN:
        rows.append("| … | | | |")
        rows += [
            f"| {index} | {_code(names[index]) if names and index < len(names) else ''} | {number:,} | "
            f"{number * manifest.num_crops:,} |"
            for index, number in common[-CLASSES_SHOWN // 2 :]
        ]
    return "\n".join(
        [
            "## Classes",
            "",
            f"{len(counts):,} of {manifest.num_classes:,} classes have images: {common[-1][1]:,} to {common[0][1]:,} "
            f"each. {count(without, 'image')} without ground truth.",
            "",
            "| class | name | images | crops |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
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
        # Merged and imported sets, and parts, have no statistics for each teacher.
        if statistics.crops_with_target and len(statistics.teacher_top1_matches_target) > number:
            right = percent(statistics.teacher_top1_matches_target[number] / statistics.crops_with_target)
        # Imports write zeros: other formats do not say which weights were used.
        digest = "unknown" if teacher.digest == UNKNOWN_SHA256 else f"`{teacher.digest[:16]}`"
        rows.append(
            f"| {_code(teacher.name)} | {teacher.size} px {teacher.interpolation} | {teacher.weight:g} | "
            f"{teacher.temperature:g} | {right} | {digest} |"
        )
    if statistics.crops_with_target:
        share = statistics.top1_matches_target / statistics.crops_with_target
        rows += [
            "",
            f"Together (`{manifest.ensemble}`): the ground truth is the most probable class of {percent(share)} of "
            "the crops.",
        ]
    return "\n".join(rows)


def _crops(manifest: Manifest) -> str:
    thresholds = manifest.thresholds
    measured = "p_max" if thresholds.confidence == "max" else "the ground truth's probability"
    return (
        f"## Crops\n\nRandomResizedCrop, {_drawn(manifest)}, {seeds_in_words(manifest)}; in blocks of "
        f"{manifest.crops_per_block}. Buckets by {measured}: below {thresholds.low:g} extreme hard, below "
        f"{thresholds.mid:g} moderate hard, below {thresholds.top:g} hard positive, else easy positive."
        + _draws(manifest)
        + _augmentations(manifest)
        + _kinds(manifest)
    )


def _draws(manifest: Manifest) -> str:
    """Make the table of the draws of a merged label set, where they have different distributions."""
    draws = draws_in_words(manifest, _distribution)
    if not draws:
        return ""
    rows = [f"| {crops.removeprefix('crops ')} | {drawn} |" for crops, drawn in draws]
    return "\n\n" + "\n".join(["| crops | drawn with |", "| --- | --- |", *rows])


def _drawn(manifest: Manifest) -> str:
    if manifest.kinds:
        return "with a distribution for each crop kind"
    if draws_in_words(manifest, _distribution):
        return "with the distributions below"
    return _distribution(manifest.crop_distribution)


def _distribution(crops: CropDistribution | CropDistributionEntry) -> str:
    return (
        f"scale {crops.scale[0]:g} to {crops.scale[1]:g}, ratio {crops.ratio[0]:.4g} to "
        f"{crops.ratio[1]:.4g}, horizontal flip {crops.hflip:g}"
    )


def _kinds(manifest: Manifest) -> str:
    """Make the table of crop kinds, and say how to train on them."""
    if not manifest.kinds:
        return ""
    rows = [
        f"| `{kind.name}` | {start} to {start + kind.crops - 1} | {kind.size} px | {_distribution(kind.distribution)} |"
        for kind, start in zip(manifest.kinds, kind_starts(manifest.kinds), strict=True)
    ]
    table = "\n".join(["| crop kind | crops | for students of | drawn with |", "| --- | --- | --- | --- |", *rows])
    example = ", ".join(f'"{kind.name}": 2' for kind in manifest.kinds)
    return (
        f"\n\n{table}\n\nThe crops of one kind are a label set of their own "
        f'(`labels.crop_kind("{manifest.kinds[0].name}")`); `fd.CropLoader(labels, kinds={{{example}}}, …)` gives a '
        "batch of each kind."
    )


def _augmentations(manifest: Manifest) -> str:
    if not manifest.augmentations:
        return ""
    listed = ", ".join(f"`{text}`" for text in manifest.augmentations)
    return (
        f"\n\nAfter it was cut, resized and flipped, each crop went through recorded operations: {listed}. A reader "
        "must replay them (`op_code`, `op_value`, `erase_*`), or it shows other pixels than were labelled."
    )


def _statistics(manifest: Manifest) -> str:
    summary = summarise(manifest.statistics)
    rows = ["## What the labels say", "", "| p_max | share % | aggregate % | ImageNet in the FerKD paper % |"]
    rows.append("| --- | --- | --- | --- |")
    for row in summary["p_max"]:
        rows.append(
            f"| {row['low']:.2f}-{row['high']:.2f} | "
            + " | ".join(in_percent(row[name] / 100, 2) for name in ("share", "aggregate", "paper_share"))
            + " |"
        )
    rows += ["", "| bucket | crops | share % |", "| --- | --- | --- |"]
    rows += [
        f"| `{name}` | {bucket['crops']:,} | {in_percent(bucket['share'] / 100, 2)} |"
        for name, bucket in summary["buckets"].items()
    ]
    rows += ["", f"The stored classes hold {percent(summary['mean_kept_prob'])} of the probability on average."]
    return "\n".join(rows)


def _files(labels: LabelSet) -> str:
    manifest = labels.manifest
    files = [file for shard in manifest.shards for file in shard.files]
    size = sum(file.bytes for file in files)
    per_crop = size / max(manifest.statistics.crops, 1)
    rejects = count(manifest.rejects.rows, "image")
    return (
        f"## Files\n\n{count(len(files), 'shard file')}, {size / 1e6:,.1f} MB ({per_crop:.1f} bytes per crop), each "
        "with its size and SHA-256 in `manifest.json`. `ferkd-data verify` checks all of it; `ferkd-data pull` copies "
        f"all or the first crop blocks. {rejects} could not be used: see `{manifest.rejects.path}`.\n\n"
        f"The identity of this label set, the SHA-256 of `manifest.json`, is `{labels.identity}`.\n\n"
        "The format is that of the Python package `ferkd-data`, version 1, which its docs/format.md specifies; "
        "examples/standalone_reader.py there is a short reader that does without the package."
    )


def _uses(manifest: Manifest) -> str:
    return (
        "## Uses and limits\n\n"
        "Meant for training image classifiers of the same classes by knowledge distillation, and for studying how "
        "teachers label crops. Not meant as ground truth: a soft label is a model's opinion, with that model's errors "
        "and biases, and the teachers' own training data and licences apply to what is learned from them. "
        f"Of each crop only the {manifest.top_k} most probable classes are kept, as float16. "
        + ("Crops were drawn by another tool. " if drawn_elsewhere(manifest) else "")
        + "A student that cuts its crops with another resize than the teachers saw (bicubic kernels differ between "
        "libraries by up to 7 grey levels, which moved probabilities by up to 0.019) sees slightly other pixels than "
        "its labels were made from."
    )


def _licence(manifest: Manifest, fields: CardFields) -> str:
    labels = (
        fields.license if fields.license != "other" else f"{fields.license_name} ({fields.license_link or 'LICENSE'})"
    )
    lines = ["## Licence", "", f"Labels: {labels}."]
    lines.append(f"Images: {fields.image_license}." if fields.image_license else "The images are not included.")
    if fields.source_datasets:
        lines.append(f"The images come from {', '.join(fields.source_datasets)}.")
    if fields.author or fields.homepage:
        lines.append(f"Published by {', '.join(part for part in (fields.author, fields.homepage) if part)}.")
    return "\n".join(lines)


def _citation(labels: LabelSet, fields: CardFields, url: str) -> str:
    """Cite the label set, in its publisher's words or as generated BibTeX; then the method."""
    # A path on the publisher's disk is no address, and nobody else's business.
    address = fields.homepage or (url if "://" in url else None)
    entry = {
        "title": fields.title,
        "author": fields.author,
        "year": fields.day[:4],
        "url": address,
        "note": f"soft labels, manifest {labels.identity[:16]}",
    }
    # Doubled braces are single ones in an f-string, and BibTeX needs those.
    said = ",\n".join(f"  {name} = {{{value}}}" for name, value in entry.items() if value)
    own = fields.citation or f"```bibtex\n@misc{{{_bibtex_key(fields)},\n{said}\n}}\n```"
    return f"## Citation\n\n{own}\n\nThe method:\n\n" + "\n".join(f"- {work}" for work in METHOD)


def _bibtex_key(fields: CardFields) -> str:
    return re.sub(r"[^a-z0-9]+", "-", fields.title.lower()).strip("-") + fields.day[:4]


def _code(text: str) -> str:
    """Put a stranger's text into a code span on one line, where it is no HTML, no link and no cell of a table."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    # A backtick would end the span, and a bare | the cell of the table.
    return f"`{' '.join(shown.split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"
