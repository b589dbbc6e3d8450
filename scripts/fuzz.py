"""Fuzz the readers of manifests, crop records, tars, Parquet blocks and foreign files, guided by coverage (atheris).

    pip install atheris
    python scripts/fuzz.py [--seconds 300] [--keep tests/attacks/found] [manifest npy tar parquet foreign]

Each reader is fed changed copies of the golden label sets. Anything but rows or one of our own errors ends the run: the
input is written to --keep, as a fixture for tests/attacks/test_found.py, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "version-1"
TARGETS = ("manifest", "npy", "tar", "parquet", "foreign")
MAX_INPUT_BYTES = 65536
MEMORY_MB, SLOW_SECONDS = 2048, 20


def seeds(target: str) -> list[bytes]:
    from ferkd_data.format import webdataset

    if target == "manifest":
        return [path.read_bytes() for path in GOLDEN.rglob("manifest.json")]
    if target == "parquet":
        return [path.read_bytes() for path in GOLDEN.rglob("*.parquet")]
    if target == "tar":
        return [path.read_bytes() for path in GOLDEN.rglob("*.tar")]
    if target == "npy":
        cut = [(tar.read_bytes(), sample) for tar in GOLDEN.rglob("*.tar") for sample in webdataset.scan(tar)]
        return [data[at : at + size] for data, sample in cut for at, size in sample.arrays.values()]
    return [path.read_bytes() for path in _foreign_files()]


def _foreign_files() -> list[Path]:
    import numpy as np
    import torch

    contents = [
        [np.zeros((2, 4)), np.zeros(2, bool), np.zeros((2, 2, 3), np.float32)],
        [torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool), torch.zeros(2, 2, 3)],
        (3, [{"params": [(1, 2, 3, 4), True], "prob": ([0.5, 0.25], [7, 9])}] * 2),
    ]
    folder = Path(tempfile.mkdtemp(prefix="ferkd-data-fuzz-"))
    for number, content in enumerate(contents):
        torch.save(content, folder / f"{number}.tar", pickle_protocol=2 + number)
    return sorted(folder.iterdir())


def reader(target: str, folder: Path) -> Callable[[bytes], object]:
    """What reads such bytes; a file has to be one for most readers."""
    from ferkd_data.format import crop_arrays, parquet, webdataset
    from ferkd_data.format.manifest_file import parse_manifest
    from ferkd_data.importers.foreign_arrays import load_arrays

    path = folder / "input"

    def written(data: bytes) -> Path:
        path.write_bytes(data)
        return path

    def block(data: bytes) -> object:
        parquet.read_keys(written(data), rows=2)
        return parquet.read_labels(path, rows=2, num_crops=3, top_k=2, num_classes=6)

    return {
        "manifest": lambda data: parse_manifest(data, "manifest.json"),
        "npy": lambda data: crop_arrays.parse_npy(data, "crops.npy"),
        "tar": lambda data: list(webdataset.read_rows(written(data))),
        "parquet": block,
        "foreign": lambda data: load_arrays(written(data)),
    }[target]


def fuzz(target: str, seconds: int, keep: Path) -> None:
    """Runs in a process of its own, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["ferkd_data", "tarfile", "zipfile"]):
        pass
    from ferkd_data.errors import FerkdError

    with tempfile.TemporaryDirectory(prefix="ferkd-data-fuzz-") as name:
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        for number, data in enumerate(seeds(target)):
            (corpus / str(number)).write_bytes(data)
        read = reader(target, Path(name))

        def one(data: bytes) -> None:
            try:
                read(data)
            except FerkdError:
                pass

        options = [
            f"-max_total_time={seconds}",
            f"-max_len={MAX_INPUT_BYTES}",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-timeout={SLOW_SECONDS}",
            f"-artifact_prefix={keep}/{target}-",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *options, str(corpus)], one)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help=f"Of: {', '.join(TARGETS)}.")
    parser.add_argument("--seconds", type=int, default=300, help="For each of them.")
    parser.add_argument("--keep", type=Path, default=ROOT / "tests" / "attacks" / "found")
    parser.add_argument("--one", choices=TARGETS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.keep.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        fuzz(arguments.one, arguments.seconds, arguments.keep.absolute())
        return
    failed = []
    for target in arguments.targets or TARGETS:
        command = [sys.executable, __file__, "--one", target, "--seconds", str(arguments.seconds)]
        if subprocess.run([*command, "--keep", str(arguments.keep)]).returncode:
            failed.append(target)
    if failed:
        raise SystemExit(f"{', '.join(failed)}: see {arguments.keep}")


if __name__ == "__main__":
    main()
