"""Tell images from the other files of a data set, by their names and first bytes, and tell its splits apart by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

HEAD_BYTES = 32
"""First bytes of a file that tell every format listed here."""
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib")
"""Extensions of formats that are decoded. Such a file is listed as an image without being read."""
UNSUPPORTED = tuple(
    """
    .tif .tiff .heic .heif .hif .avif .jp2 .j2k .jxl .ppm .pgm .pbm .pnm .svg .tga .psd .dng .cr2 .nef .arw .ico
    """.split()
)
"""Extensions of other image formats: rejects, unless their first bytes are those of a format that is decoded."""
NO_IMAGES = tuple(
    """
    .txt .json .jsonl .xml .csv .tsv .md .html .htm .yaml .yml .log .py .sh .pdf .npy .npz .mat .pt .pth .pkl
    .h5 .tar .gz .tgz .zip .parquet .arrow .mp4 .mov .avi .wav .mp3 .cls
    """.split()
)
"""Extensions left out without reading the file, so that annotations beside images cost nothing."""
SYSTEM_NAMES = frozenset(
    """
    #recycle #snapshot $recycle.bin .appledouble .cache .directory .documentrevisions-v100 .ds_store .fseventsd
    .git .gitattributes .gitignore .hg .ipynb_checkpoints .lsoverride .snapshot .snapshots .spotlight-v100 .svn
    .temporaryitems .trashes .zfs @eadir @recently-snapshot @recycle @tmp __macosx __pycache__ desktop.ini
    ehthumbs.db ehthumbs_vista.db lost+found lost.dir thumbs.db thumbs.db:encryptable
    """.split()
) | {"system volume information"}
"""Files and folders that systems, file servers and tools leave among images, in lower case."""
SYSTEM_STARTS = ("._", ".trash-", ".nfs", ".fuse_hidden", ".synologyworkingdirectory")
"""macOS's AppleDouble files (`._cat.jpg` beside cat.jpg, in tars too), desktops' trash, files that NFS and FUSE keep
for a process that still has them open, a Synology server's own."""
SPLITS = {
    "train": ("train", "training", "trainset"),
    "validation": ("val", "valid", "validation", "dev", "eval", "valset"),
    "test": ("test", "testing", "testset"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}
SPLIT_FOLDER = re.compile(
    rf"({'|'.join(sorted(SPLIT_OF_WORD, key=len, reverse=True))})([-_. ]?(set|data|images?|imgs|split|\d+))*"
)
"""Folders named after a split, also with an addition: val2017, test_images."""
HUGGING_FACE_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}")
"""Names that `push_to_hub` gives, after any split: unlabeled-00000-of-00004."""

_DECODED = (
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("GIF", 0, b"GIF87a"),
    ("GIF", 0, b"GIF89a"),
    # The RIFF container's size lies before it.
    ("WEBP", 8, b"WEBPVP8"),
)
_OTHERS = (
    ("TIFF", 0, b"II*\0"),
    ("TIFF", 0, b"MM\0*"),
    ("TIFF", 0, b"II+\0"),
    ("TIFF", 0, b"MM\0+"),
    ("AVIF", 4, b"ftypavi"),
    ("HEIF", 4, b"ftyphe"),
    ("HEIF", 4, b"ftypmif1"),
    ("HEIF", 4, b"ftypmsf1"),
    ("JPEG 2000", 4, b"jP  "),
    ("JPEG 2000", 0, b"\xff\x4f\xff\x51"),
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 4, b"JXL "),
    ("Photoshop", 0, b"8BPS"),
    *(("PNM", 0, b"P%d" % kind + space) for kind in range(1, 7) for space in (b"\n", b" ")),
)
"""Signatures: (format, offset in the file, bytes)."""
_DIB_HEADERS = (12, 40, 52, 56, 64, 108, 124)
"""Sizes in bytes that the second header of a BMP file can have."""


def decoded_kind(head: bytes) -> str | None:
    """Name the decoded format (JPEG, PNG, GIF, WEBP or BMP) that `head` begins like; None for any other bytes.

    `head` is the first HEAD_BYTES of a file, or all of a shorter file.
    """
    found = _match(head, _DECODED)
    if found or not head.startswith(b"BM"):
        return found
    # The signature has only two letters, and a text may begin with them.
    return "BMP" if int.from_bytes(head[14:18], "little") in _DIB_HEADERS else None


def other_kind(head: bytes) -> str | None:
    """Name the image format, such as TIFF, that `head` begins like and that is not decoded here; else None."""
    return _match(head, _OTHERS)


def _match(head: bytes, kinds: tuple[tuple[str, int, bytes], ...]) -> str | None:
    return next((kind for kind, offset, magic in kinds if head.startswith(magic, offset)), None)


def skip_reason(name: str) -> str | None:
    """Classify a file or folder that is never an image or a class as `system` or `hidden`; None for any other."""
    lower = name.lower()
    if lower in SYSTEM_NAMES or lower.startswith(SYSTEM_STARTS):
        return "system"
    return "hidden" if name.startswith(".") else None


def skip_reason_of_path(path: str) -> str | None:
    """Apply `skip_reason` to each component of a path with forward slashes; the first reason counts."""
    # ./ in front is how tar names members, and nothing hidden.
    parts = (part for part in path.split("/") if part not in ("", ".", ".."))
    return next(filter(None, map(skip_reason, parts)), None)


def split_of_folder(name: str) -> str | None:
    """Name the split (train, validation or test) of a folder named after one, such as `val2017`; else None."""
    found = SPLIT_FOLDER.fullmatch(name.lower())
    return SPLIT_OF_WORD[found[1]] if found else None


def split_of_file(path: str) -> str | None:
    """Name the split in a file's path: `train` for data/train-00000-of-00005.parquet; None where there is none."""
    pure = PurePosixPath(path)
    stem = pure.name.partition(".")[0]
    # The file's own name counts before the folders', and of these the nearest: train/val-0.tar is of the split val.
    by_words = _split_in(stem)
    if by_words is None and (found := HUGGING_FACE_FILE.fullmatch(stem)):
        return found[1]
    return by_words or next(filter(None, map(split_of_folder, reversed(pure.parts[:-1]))), None)


def splits_of_files(paths: Iterable[str]) -> dict[str, list[str]]:
    """Group files by the split that they name; the empty string holds the files that name none."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(split_of_file(path) or "", []).append(path)
    return found


def _split_in(stem: str) -> str | None:
    return next((SPLIT_OF_WORD[word] for word in re.split(r"[^a-z]+", stem.lower()) if word in SPLIT_OF_WORD), None)
