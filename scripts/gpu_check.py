"""Runs the steps of benchmarks/gpu_steps.py one by one, each in a process and a time of its own, and writes the report.

Called by scripts/gpu_check.sh. The exit status is 1 where a step failed, missed a bar or ran out of its time.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOTAL_SECONDS = 470
"""No step begins later, and none goes on: 8 minutes with the start of the script."""
NOT_HERE = 75
WANTED = ("ferkd-data", "timm", "onnx", "onnxruntime", "pytest", "hypothesis", "torchcodec")
GPU_PACKAGES = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)$")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    name: str
    about: str
    result: str
    seconds: float
    output: str


def run(name: str, about: str, seconds: float, options: list[str]) -> Outcome:
    """One step; its whole process group is ended when its time is over."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_steps.py"), name, *options]
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            result = {0: "ok", 1: "FAILED", NOT_HERE: "not possible here"}.get(
                process.returncode, f"FAILED (status {process.returncode})"
            )
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            result = f"FAILED: not done within {seconds:.0f} s"
    return Outcome(name=name, about=about, result=result, seconds=time.monotonic() - started, output=output.rstrip())


def report(outcomes: list[Outcome], options: list[str], device: str) -> str:
    """The results file, as Markdown."""
    lines = [
        f"# GPU check, {time.strftime('%Y-%m-%d')}, {device_name(device)}",
        "",
        f"    scripts/gpu_check.sh {' '.join(options)}",
        "",
        "| step | result | seconds |",
        "| --- | --- | --- |",
        *(f"| {each.name} | {each.result} | {each.seconds:.0f} |" for each in outcomes),
        "",
    ]
    for each in outcomes:
        lines += [f"## {each.name}: {each.result}", "", each.about, ""]
        lines += [*("    " + line if line else "" for line in each.output.splitlines()), ""]
    return "\n".join(lines)


def device_name(device: str) -> str:
    import torch

    return f"{platform.machine()} CPU (a rehearsal)" if device == "cpu" else torch.cuda.get_device_name(device)


def wheels(with_torch: bool) -> Iterator[str]:
    """`name==version` of everything that the steps need, as it is installed here."""
    todo, seen = list(WANTED), set()
    while todo:
        name = re.split(r"[^A-Za-z0-9._-]", todo.pop())[0].lower().replace("_", "-")
        if name in seen or (GPU_PACKAGES.match(name) and not with_torch):
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if name == "torchcodec":
                yield name
            continue
        if name != "ferkd-data":
            yield f"{name}=={found.version}"
        todo += [each for each in found.requires or () if "extra ==" not in each]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="So small that it proves the script and nothing else.")
    parser.add_argument("--steps", default="", help="Names separated by commas.  [default: all]")
    parser.add_argument("--out", type=Path, default=None, help="The results file.")
    parser.add_argument("--list", action="store_true", help="Print the packages to carry, and end.")
    parser.add_argument("--with-torch", action="store_true", help="PyTorch and CUDA's libraries among them.")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(sorted(wheels(arguments.with_torch))))
        return 0
    import torch
    from gpu_steps import STEPS

    if arguments.device != "cpu" and not torch.cuda.is_available():
        print(
            "gpu_check: PyTorch finds no GPU here; --device cpu --tiny --out FILE rehearses the script", file=sys.stderr
        )
        return 1
    names = arguments.steps.split(",") if arguments.steps else list(STEPS)
    unknown = sorted(set(names) - set(STEPS))
    if unknown:
        parser.error(f"no step {unknown[0]}; steps are {', '.join(STEPS)}")
    options = ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    outcomes, started = [], time.monotonic()
    for name in names:
        step, seconds = STEPS[name]
        about = (step.__doc__ or "").strip()
        left = TOTAL_SECONDS - (time.monotonic() - started)
        print(f"{name}: {about}", flush=True)
        # A rehearsal on a busy machine proves nothing about time.
        allowed = 600.0 if arguments.device == "cpu" else min(seconds, left)
        if allowed < 1:
            outcome = Outcome(name=name, about=about, result="FAILED: no time was left", seconds=0, output="")
        else:
            outcome = run(name, about, allowed, options)
        print(outcome.output, f"\n{name}: {outcome.result}, {outcome.seconds:.0f} s\n", flush=True)
        outcomes.append(outcome)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", device_name(arguments.device)).strip("-").upper()
    default = ROOT / "benchmarks" / "results" / f"GPU_CHECK_{slug}_{time.strftime('%Y-%m-%d')}.md"
    out = arguments.out or default
    out.write_text(report(outcomes, sys.argv[1:], arguments.device), encoding="utf-8")
    print(f"report: {out}")
    return int(any(each.result.startswith("FAILED") for each in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
