"""Dataset Reinforcement's files (ICCV 2023, "ImageNet+"): `ID.pth.tar` per image, `config.pth.tar` for all of them.

A file is `torch.save((ID, [{"params": ..., "prob": (probabilities, classes)}, ...]))`, one entry per crop. Its params
are those of the image transforms that the configuration enables, by name or, compressed, as a list in their order of
application. Only crops and flips can be replayed here; every other transform is refused by name.

Legend: N crops, k kept classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ferkd_data.errors import ForeignFileError, UsageError, check_at_least
from ferkd_data.format.manifest import (
    DEFAULT_CROPS_PER_BLOCK,
    DEFAULT_IMAGES_PER_SHARD,
    CropDistributionEntry,
    Manifest,
    TeacherEntry,
    check_limits,
)
from ferkd_data.format.progress import OnProgress
from ferkd_data.images import FolderSource, open_source
from ferkd_data.importers.foreign_arrays import load_arrays
from ferkd_data.importers.foreign_labels import (
    ForeignLabels,
    check_boxes,
    check_foreign_labels,
    foreign_teacher,
    whole_class_numbers,
)
from ferkd_data.importers.import_labels import content_of, run_import
from ferkd_data.storage import local_path, read_text

CONFIG = "config.pth.tar"
CROP, FLIP = "random_resized_crop", "random_horizontal_flip"
WITHOUT_PARAMS = ("uint8", "to_tensor", "normalize")
"""Transforms that change how pixels are stored, not their values."""
NOT_REPLAYED = {
    "mixup": "a label of two images mixed is no label of a crop",
    "cutmix": "a label of two images mixed is no label of a crop",
    "rand_augment": "the teacher saw other colours and shapes than the crop's",
    "random_erase": "the teacher saw the crop with a hole in it",
    "resize": "boxes count pixels of the resized image",
    "center_crop": "boxes count pixels of the cut image",
    "random_crop": "its crops may reach over the image's edge",
}
ADVICE = "take the variant of this set that was made with crops and flips alone (RRC)"


@dataclass(frozen=True, kw_only=True)
class ReinforcedFiles:
    """A folder of Dataset Reinforcement's files."""

    folder: Path
    config: dict[str, Any]
    """The content of config.pth.tar."""
    ids: dict[str, int]
    """The ID of each key."""
    num_classes: int
    teacher: str | None = None
    """The teacher's name, in place of those in the configuration."""

    format: ClassVar[str] = "Dataset Reinforcement"
    seed: ClassVar[None] = None
    expected: ClassVar[str] = "FOLDER/ID.pth.tar"

    @cached_property
    def transforms(self) -> dict[str, dict[str, Any]]:
        """Settings of each transform that the configuration enables, by name."""
        return _transforms(self.folder / CONFIG, self.config)

    @property
    def distribution(self) -> CropDistributionEntry:
        crop, flip = self.transforms[CROP], self.transforms.get(FLIP)
        return CropDistributionEntry(
            scale=tuple(crop.get("scale", (0.08, 1.0))),
            ratio=tuple(crop.get("ratio", (3 / 4, 4 / 3))),
            hflip=0 if flip is None else flip.get("p", 0.5),
        )

    @property
    def teachers(self) -> tuple[TeacherEntry, ...]:
        """The teachers that the configuration names; the probabilities of several were averaged."""
        entry = self.config.get("teacher", {})
        named = self.teacher or entry.get("name") or entry.get("arch") or "unknown"
        # An ensemble is a list of names, or one text with commas.
        names = named.split(",") if isinstance(named, str) else [str(name) for name in named]
        size = self.transforms[CROP]["size"]
        normalize = self.transforms.get("normalize", {})
        return tuple(
            foreign_teacher(
                f"dr:{name}",
                name,
                num_classes=self.num_classes,
                size=size if isinstance(size, int) else size[0],
                # torchvision's default for RandomResizedCrop; the configuration does not say.
                interpolation="bilinear",
                mean=tuple(normalize.get("mean", (0, 0, 0))),
                std=tuple(normalize.get("std", (1, 1, 1))),
            )
            for name in names
        )

    def read(self, key: str, size: tuple[int, int]) -> ForeignLabels:
        """Read an image's crops. Raises ForeignFileError for a malformed file, ValueError for impossible crops."""
        if key not in self.ids:
            raise ForeignFileError(f"image {key!r} has no ID")
        number = self.ids[key]
        path = self.folder / f"{number}.pth.tar"
        content = load_arrays(path)
        try:
            found, samples = content
            boxes, flips = zip(*(self._box_and_flip(sample["params"]) for sample in samples), strict=True)
            probs, classes = zip(*(sample["prob"] for sample in samples), strict=True)
            box, flip = np.array(boxes, np.float64).reshape(-1, 4), np.array(flips, np.bool_)
            # float64 holds every class exactly. Cast to integers here, 1.7 would become class 1.
            index = np.array(classes, np.float64)
            with np.errstate(over="ignore"):
                prob = np.array(probs, np.float32)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise ForeignFileError(f"{path}: is not Dataset Reinforcement's (ID, crops) ({error})") from error
        if index.ndim != 2 or index.shape != prob.shape or len(box) != len(index) or not index.size:
            raise ForeignFileError(f"{path}: boxes {box.shape}, classes {index.shape}, probabilities {prob.shape}")
        # A file that was renamed would put its labels on another image.
        if found != number:
            raise ForeignFileError(f"{path}: says that it belongs to ID {found!r}")
        numbers = whole_class_numbers(path, index, self.num_classes)
        check_foreign_labels(path, numbers, prob, self.num_classes)
        return ForeignLabels(boxes=check_boxes(box, *size), flip=flip, class_index=numbers, class_prob=prob)

    def _box_and_flip(self, params: Any) -> tuple[Any, bool]:
        """Return (box, flip) of a crop. Raises ValueError for params that hold more than these."""
        if isinstance(params, dict):
            more = sorted(set(params) - {CROP, FLIP, *WITHOUT_PARAMS})
            if more:
                raise ValueError(f"params of {more[0]!r}, which cannot be replayed")
            # Each is a pair: for the image, and for one that it might have been mixed with.
            return params[CROP][0], bool(params[FLIP][0]) if FLIP in params else False
        # Compressed: a list in the order of the transforms. A flip is there where the configuration has one.
        box, *flip = params
        # A bool counts as 0 or 1.
        if len(flip) != (FLIP in self.transforms):
            raise ValueError(f"{len(params)} params where crop and flip are expected")
        return box, bool(flip[0]) if flip else False


def open_reinforced(
    folder: Path, ids: dict[str, int], *, num_classes: int | None = None, teacher: str | None = None
) -> ReinforcedFiles:
    """Open a folder of files. Raises UsageError for no configuration, or one whose crops cannot be replayed."""
    path = folder / CONFIG
    if not path.is_file():
        joblib = next(folder.glob("*.jb"), None) if folder.is_dir() else None
        other = f"; {joblib.name} is of joblib, which only unpickling could read" if joblib else ""
        raise UsageError(f"{folder}: no {CONFIG}, which says what the parameters of each crop mean{other}")
    config = load_arrays(path)
    if not isinstance(config, dict):
        raise ForeignFileError(f"{path}: is not a configuration")
    classes = num_classes or config.get("num_classes")
    if not isinstance(classes, int):
        raise UsageError(f"{path}: does not say how many classes there are; give their number (--num-classes)")
    files = ReinforcedFiles(folder=folder, config=config, ids=ids, num_classes=classes, teacher=teacher)
    try:
        # Evaluated now, so that a configuration that cannot be used fails before the first image.
        _ = files.distribution, files.teachers
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        # UsageError is a ValueError here, and already says what is wrong.
        if isinstance(error, UsageError):
            raise
        raise ForeignFileError(f"{path}: settings of crops or teachers that cannot be ({error})") from error
    return files


def _transforms(path: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        listed: dict[str, dict[str, Any]] = config["reinforce"]["image_augmentation"]
        enabled = {name: dict(settings) for name, settings in listed.items() if settings.get("enable", True)}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ForeignFileError(f"{path}: has no reinforce.image_augmentation ({error})") from error
    for name in enabled:
        if name not in (CROP, FLIP, *WITHOUT_PARAMS):
            why = NOT_REPLAYED.get(name, "it is not known here")
            raise UsageError(f"{path.parent}: its crops went through {name!r}: {why}; {ADVICE}")
    if "size" not in enabled.get(CROP, {}):
        raise UsageError(f"{path.parent}: was made without {CROP!r}, so it holds no crops to replay")
    return enabled


def image_folder_ids(root: Path, folder: Path) -> dict[str, int]:
    """Map keys to IDs: an image's number in torchvision's ImageFolder. Raises UsageError for another data set."""
    from torchvision.datasets import ImageFolder

    ids: dict[str, int] = {}
    samples = ImageFolder(str(root), allow_empty=True).samples
    for number, (file, _) in enumerate(samples):
        # cat.jpg and cat.png have one key here; the first keeps it, as in a folder's listing.
        ids.setdefault(Path(file).relative_to(root).with_suffix("").as_posix(), number)
    there = sum(path.name != CONFIG for path in folder.glob("*.pth.tar"))
    # IDs count every image, so one that is missing would shift the labels of all that follow.
    if there != len(samples):
        raise UsageError(
            f"{folder}: has files for {there} images, {root} has {len(samples)}; an ID is an image's number in the "
            "whole training set, so give all of it, or a file with the keys in the order of their IDs (--ids)"
        )
    return ids


def listed_ids(path: Path) -> dict[str, int]:
    """Map keys to IDs by a text file, line n for ID n. Raises UsageError."""
    try:
        # Not `splitlines`, which also splits at characters that a file's name may hold, such as U+2028.
        keys = read_text(path).removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a list of keys ({error})") from error
    ids = {key: number for number, key in enumerate(keys)}
    if len(ids) != len(keys):
        raise UsageError(f"{path}: names a key twice")
    return ids


def import_dr(
    folder: str | Path,
    out: str | Path,
    *,
    images: str | Path,
    ids: str | Path | None = None,
    num_classes: int | None = None,
    teacher: str | None = None,
    crops_per_block: int = DEFAULT_CROPS_PER_BLOCK,
    images_per_shard: int = DEFAULT_IMAGES_PER_SHARD["parquet"],
    classes: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Make a label set of layout parquet from Dataset Reinforcement's FOLDER/ID.pth.tar and FOLDER/config.pth.tar.

    An ID is an image's number in torchvision's ImageFolder of the training set; with `ids`, the line of that text file
    that holds the image's key. The configuration names the teachers and the number of classes unless these are given.

    >>> fd.import_dr("imagenet_plus", "labels", images="imagenet/train")  # doctest: +SKIP

    Raises SourceError; UsageError for crops that cannot be replayed (RandAugment, erasing, mixing) and when nothing can
    be imported.
    """
    check_at_least(1, crops_per_block=crops_per_block, images_per_shard=images_per_shard)
    check_at_least(2, num_classes=num_classes)
    check_limits(crops_per_block=crops_per_block, num_classes=num_classes)
    source = open_source(images, classes=None if classes is None else Path(classes))
    folder = local_path(folder)
    if ids is not None:
        known = listed_ids(local_path(ids))
    elif isinstance(source, FolderSource) and source.class_folders is not None:
        known = image_folder_ids(source.root, folder)
    else:
        raise UsageError(f"{images}: only a folder of class folders numbers its images; give a file of keys with --ids")
    files = open_reinforced(folder, known, num_classes=num_classes, teacher=teacher)
    return run_import(
        files,
        source,
        local_path(out),
        images=images,
        classes=classes,
        crops_per_block=crops_per_block,
        images_per_shard=images_per_shard,
        settings={"ids": content_of(ids), "teacher": teacher, "num_classes": num_classes},
        on_progress=on_progress,
    )
