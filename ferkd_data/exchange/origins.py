"""Origins of a label set's crops: the draws that it holds, also after `merge` and `pull`.

A merged label set lists the sets that it was made of in `merged_from`; the entry of one that was merged itself has its
`draws`. They are a flat list: nested once for each merge, they would soon be too deep for JSON parsers. The field is
not in the manifest's schema, so a stranger's may hold anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from ferkd_data.format.manifest import CropDistributionEntry, Manifest
from ferkd_data.label_set import LabelSet

MOST_SEEDS = 8
"""Most seeds that are listed for a person."""
MOST_DRAWS = 16
"""Most draws that are listed for a person."""


def origin_of(labels: LabelSet) -> dict[str, Any]:
    """Return the entry of `merged_from` for a label set that is merged into another one."""
    manifest = labels.manifest
    draws = list(_draws(manifest))
    return {
        "manifest_sha256": labels.identity,
        "images": manifest.num_images,
        "crops": manifest.num_crops,
        "seed": manifest.seed,
        "crop_distribution": manifest.crop_distribution.model_dump(mode="json"),
        **({"draws": draws} if len(draws) > 1 else {}),
    }


def draws_of(manifest: Manifest) -> set[str]:
    """Name the draws in a label set: a seed and a distribution give the same crops in every build.

    Of a merged set whose first crops alone were pulled, these are the draws of the sets that they came from. Crops that
    were imported with their boxes were drawn elsewhere, and have none.
    """
    return {f"seed {draw['seed']}, {json.dumps(draw['crop_distribution'])}" for draw in _draws(manifest)}


def drawn_elsewhere(manifest: Manifest) -> bool:
    """Return whether crops were imported with their boxes; ReLabel's maps have none, and ours are drawn for them."""
    imported: Any = (manifest.model_extra or {}).get("imported_from")
    return imported is not None and not (isinstance(imported, dict) and imported.get("crops_follow_seed"))


def seeds_in_words(manifest: Manifest) -> str:
    """Return the seeds of all crops for a person: `seed 0`, `seeds 0, 1` of a merged label set."""
    if drawn_elsewhere(manifest):
        return "drawn elsewhere, without a seed of ours"
    draws = [draw["seed"] for draw in _draws(manifest) if isinstance(draw["seed"], int)]
    seeds = list(dict.fromkeys(draws)) or [manifest.seed]
    if len(seeds) > MOST_SEEDS:
        return f"{len(seeds):,} seeds, the first is {seeds[0]}"
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def draws_in_words(manifest: Manifest, told: Callable[[CropDistributionEntry], str]) -> list[tuple[str, str]]:
    """List the draws of a label set whose crops were drawn with different distributions; empty where one drew all.

    Each is (crops, how they were drawn), such as ("crops 0 to 49", "scale 0.08 to 1, seed 0"). `told` puts a
    distribution into words.
    """
    draws = list(_draws(manifest))
    if len({json.dumps(draw["crop_distribution"], sort_keys=True) for draw in draws}) < 2:
        return []
    listed, start = [], 0
    for draw in draws[:MOST_DRAWS]:
        end = start + draw["crops"] - 1
        seed = f"seed {draw['seed']}" if isinstance(draw["seed"], int) else "unknown seed"
        listed.append((f"crops {start} to {end}", f"{_distribution(draw['crop_distribution'], told)}, {seed}"))
        start = end + 1
    if len(draws) > MOST_DRAWS:
        listed.append((f"crops {start} to {manifest.num_crops - 1}", f"{len(draws) - MOST_DRAWS:,} more draws"))
    return listed


def _distribution(entry: Any, told: Callable[[CropDistributionEntry], str]) -> str:
    try:
        return told(CropDistributionEntry.model_validate(entry))
    except ValidationError:
        return "unknown distribution"


def _draws(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield each draw's seed, distribution and number of crops, in the order of the crops."""
    if drawn_elsewhere(manifest):
        return
    extra = manifest.model_extra or {}
    start = 0
    for draw in _listed(extra.get("merged_from")):
        # Merged crops lie one set after the other. Merged images and teachers share one draw, so the first is theirs.
        crops = draw.get("crops")
        if start < manifest.num_crops and isinstance(crops, int) and crops > 0:
            kept = {"seed": draw.get("seed"), "crop_distribution": draw.get("crop_distribution")}
            yield {**kept, "crops": min(crops, manifest.num_crops - start)}
            start += crops
    if not start:
        own = {"seed": manifest.seed, "crop_distribution": manifest.crop_distribution.model_dump(mode="json")}
        yield {**own, "crops": manifest.num_crops}


def _listed(merged: Any) -> Iterator[dict[str, Any]]:
    for entry in merged if isinstance(merged, list) else []:
        draws = entry.get("draws", [entry]) if isinstance(entry, dict) else None
        yield from (draw for draw in (draws if isinstance(draws, list) else []) if isinstance(draw, dict))
