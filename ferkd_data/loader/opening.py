"""Join labels and images for `CropLoader` and `CropDataset`, and warn of what users should know before the first batch.

Apart from `batch_maker.py`, which runs in workers: this happens once, in the training process.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ferkd_data.errors import UsageError
from ferkd_data.images import ImageSource
from ferkd_data.label_set import LabelSet
from ferkd_data.label_set.joined_images import Missing
from ferkd_data.loader.batch_maker import BatchMaker
from ferkd_data.loader.images_and_keys import KeyTable, open_images
from ferkd_data.loader.kinds import check_one_kind
from ferkd_data.loader.label_cache import LabelCache
from ferkd_data.loader.settings import LoaderSettings
from ferkd_data.loader.streaming import StreamedLabels
from ferkd_data.loader.transform import cuts_again, draws_elsewhere


def check_is_label_set(labels: Any) -> None:
    """Raise UsageError for anything but an open label set, such as the path of one."""
    if not isinstance(labels, LabelSet):
        raise UsageError(f"labels must be a label set, as fd.open_labels({labels!r}) opens it")


def open_maker(
    labels: LabelSet,
    images: str | Path | ImageSource | None,
    settings: LoaderSettings,
    cache_dir: Path,
    *,
    at_random: bool = False,
) -> tuple[LabelSet, BatchMaker]:
    """Join images and labels. Returns the labels of the images that are there, and what makes batches of them.

    Labels whose images are missing are left out where the settings say so. With `at_random`, any row may be asked for
    next, whatever `settings.order` is.

    Raises UsageError when there are no images, LabelSetError when images and labels do not match.
    """
    if not settings.kinds:
        check_one_kind(labels)
    elif len(settings.kinds) == 1:
        # Keys, too, are then read out of this kind's files alone.
        labels = labels.crop_kind(settings.kinds[0].name)
    streamed = settings.streamed and not at_random
    missing: Missing = settings.images_missing
    # A missing image is one that cannot be used: it is skipped when its turn comes, and not an error at the start.
    if missing == "raise" and settings.on_error == "skip":
        missing = "later"
    kept, table = open_images(labels, images, missing=missing, streamed=streamed)
    if len(kept) < len(labels):
        warnings.warn(
            f"{labels.location}: {len(labels) - len(kept)} of {len(labels)} labelled images are missing and were "
            f"dropped (images_missing='drop'): {len(kept)} are left",
            stacklevel=3,
        )
    if settings.transform is not None and (second := cuts_again(settings.transform)):
        warnings.warn(
            f"transform contains {second}, and the images are crops already: the teachers labelled the whole of each, "
            "so a part of it would train on another crop's label. Leave it out; size= sets the size of crops",
            stacklevel=3,
        )
    # A hint only: what such a transform draws cannot be seeded here, and a training may not need to be repeatable.
    if settings.transform is not None and draws_elsewhere(settings.transform, settings.size_at(0)):
        warnings.warn(
            "transform gives different crops for the same seed: it draws from a generator of its own, not from those "
            "of torch, NumPy or random, which are seeded for each crop. A resume, or another number of workers, gives "
            "other crops. Seed it in the transform, from int(torch.randint(2**31, ()))",
            stacklevel=3,
        )
    # The cache holds stored labels, so that label sets mapped to other classes share it.
    stored = kept.unmapped
    if not streamed:
        # A crop block's space is reserved as a whole: for files that are there, not for what a manifest claims.
        stored.check_sizes()
    keys = KeyTable(kept) if settings.keys else None

    def make(part: LabelSet, own: LoaderSettings, others: Sequence[BatchMaker] = ()) -> BatchMaker:
        stored = part.unmapped
        cache = StreamedLabels(stored, cache_dir) if streamed else LabelCache(stored, cache_dir)
        return BatchMaker(part, cache, table, own, keys, others)

    if not settings.kinds:
        return kept, make(kept, settings)
    # Of one kind, `kept` is the view of it already. A view of that would be another label set to the cache.
    views = [kept] if len(settings.kinds) == 1 else [kept.crop_kind(kind.name) for kind in settings.kinds]
    first, *others = ((view, settings.of_kind(kind)) for view, kind in zip(views, settings.kinds, strict=True))
    return kept, make(*first, [make(*each) for each in others])
