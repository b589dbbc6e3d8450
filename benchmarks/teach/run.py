"""Train students from a label set, method by method and seed by seed; compare them.

    python benchmarks/teach/run.py --labels LABELS --train PHOTOS/train --val PHOTOS/val --runs runs.jsonl
    python benchmarks/teach/run.py … --quick        4 methods, 1 seed, 400 steps: minutes on two cores
    python benchmarks/teach/run.py … --summary      only print the table

A run is one line of JSON: method, seed, settings, curve. Runs that the file has are not repeated, so a command that was
killed goes on where it stopped. README.md beside this file says how to make LABELS, and what was fixed beforehand.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from methods import MAIN, METHODS, QUICK
from summary import every_run, table
from train import Setup, load_photos, run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", required=True, help="a label set that `ferkd-data build` made of the train photos")
    parser.add_argument("--train", required=True, help="the photos that it was built from")
    parser.add_argument("--val", required=True, help="class folders named like those of the label set")
    parser.add_argument("--val-labels", default="", help="a label set of VAL, one crop: the whole photo (README.md)")
    parser.add_argument("--teacher", default="", help="an ONNX teacher, for the method online")
    parser.add_argument("--classes", required=True, help="the class file that the build was given")
    parser.add_argument("--runs", default="runs.jsonl", help="where the runs are kept  [default: runs.jsonl]")
    parser.add_argument("--methods", default=",".join(MAIN), help="names out of methods.py  [default: the main ones]")
    parser.add_argument(
        "--against", default="hard,fkd", help="methods that the table compares with  [default: hard,fkd]"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=Setup.steps)
    parser.add_argument("--batch-size", type=int, default=Setup.batch_size)
    parser.add_argument("--evaluations", type=int, default=Setup.evaluations, help="points of a run's curve")
    parser.add_argument("--crops-per-image", type=int, default=Setup.crops_per_image)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each on a CPU")
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--summary", action="store_true")
    return parser.parse_args()


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same run."""
    return (line["method"], line["seed"], *sorted((k, str(v)) for k, v in line["setup"].items()))


def known_runs(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def drop_half_a_line(path: Path) -> None:
    """Cut off what a killed command left of its last line."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


# Decoded once by each process, which trains several students.
cached_photos = functools.cache(load_photos)


def one(setup: Setup, method: str, seed: int, classes: tuple[str, ...]) -> dict[str, Any]:
    # A method may have a size of its own.
    size = METHODS[method].changes.get("size", setup.size)
    photos = cached_photos(Path(setup.val), classes, size, setup.val_labels)
    return {**run(setup, method, seed, photos), "setup": asdict(setup)}


def main() -> None:
    arguments = parse()
    setup = Setup(
        labels=arguments.labels,
        train=arguments.train,
        val=arguments.val,
        val_labels=arguments.val_labels,
        teacher=arguments.teacher,
        steps=400 if arguments.quick else arguments.steps,
        batch_size=arguments.batch_size,
        evaluations=4 if arguments.quick else arguments.evaluations,
        crops_per_image=arguments.crops_per_image,
        device=arguments.device,
        bf16=not arguments.fp32,
    )
    methods = QUICK if arguments.quick else arguments.methods.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        sys.exit(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    lines = Path(arguments.classes).read_text(encoding="utf-8").splitlines()
    classes = tuple(line.split("\t")[0] for line in lines)
    path = Path(arguments.runs)
    drop_half_a_line(path)
    done = {key(line) for line in known_runs(path)}
    # Seeds outermost: a comparison that is stopped early is still paired.
    wanted = [(m, seed) for seed in range(1 if arguments.quick else arguments.seeds) for m in methods]
    left = [(m, s) for m, s in wanted if key({"method": m, "seed": s, "setup": asdict(setup)}) not in done]
    if left and not arguments.summary:
        with (
            ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
            path.open("a", encoding="utf-8") as out,
        ):
            started = [pool.submit(one, setup, method, seed, classes) for method, seed in left]
            for number, future in enumerate(as_completed(started), 1):
                line = future.result()
                print(json.dumps(line), file=out, flush=True)
                print(
                    f"{number}/{len(left)}  {line['method']:16} seed {line['seed']}: top-1 {line['top1']:.1f} %, "
                    f"{line['seconds']:.0f} s",
                    flush=True,
                )
    wanted_keys = {key({"method": m, "seed": s, "setup": asdict(setup)}) for m, s in wanted}
    runs = [line for line in known_runs(path) if key(line) in wanted_keys]
    print(table(runs, methods, [base for base in arguments.against.split(",") if base in methods] or None))
    if len({line["seed"] for line in runs}) > 1:
        print(f"\n{every_run(runs, methods)}")


if __name__ == "__main__":
    main()
