"""Time the ways of running a teacher on this machine: eager, channels-last, compiled, and ONNX Runtime.

Legend: B crops of a batch, C classes, S input size.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ferkd_data.errors import FerkdError, TeacherError, UsageError
from ferkd_data.replay import empty_batch
from ferkd_data.scratch import Scratch
from ferkd_data.storage import write_atomically
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers
from ferkd_data.teachers.compiled import compile_teacher, is_plain_module
from ferkd_data.teachers.module_teacher import ModuleTeacher
from ferkd_data.teachers.onnx_models import OnnxTeacher, export_onnx
from ferkd_data.teachers.teacher import is_out_of_memory

Way: TypeAlias = Literal["eager", "channels-last", "compile", "onnx", "as it is"]
OF_A_BUILD = ("channels-last", "as it is")
"""Ways in which a build runs a teacher by default."""
CPU_BATCHES = (4, 8, 32)
CUDA_BATCHES = (64, 128, 256, 512, 1024)
TOLERANCE = 1e-3
"""Largest allowed difference of a probability between an exported and the eager teacher: about float16's step."""
CHECKED_CROPS = 16
ROUNDS = 3
WORTH = 1.1
"""Speed-up over the build's default below which a way is not advised."""
ALIKE = 0.97
"""Share of the fastest rate at which a batch size counts as equal. The smallest such size is advised."""
ASKED_AT_ONCE = 4
"""Batches that a GPU gets before the host waits for it, since a build does not wait for each either."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The rate of a teacher, run in one way."""

    way: Way
    batch_size: int
    threads: int
    crops_per_second: float
    """Median of the rounds."""
    ratio: float
    """Rate divided by that of the same teacher eager, at its best batch size and number of threads."""
    largest_difference: float
    """Largest difference of a probability from the eager teacher's."""


@dataclass(frozen=True, kw_only=True)
class TeacherTimings:
    """All timings of one teacher, and advice."""

    spec: str
    timings: tuple[Timing, ...]
    failures: dict[str, str]
    """Reason why a way, or a way at a batch size, could not be timed."""
    advice: str


@dataclass(frozen=True, kw_only=True)
class TeacherBench:
    """The result of `bench_teachers`."""

    device: str
    cores: int
    """Threads that PyTorch computes with here by default."""
    teachers: tuple[TeacherTimings, ...]


def bench_teachers(
    teachers: Sequence[str | TeacherSpec],
    *,
    device: str = "cpu",
    precision: str = "auto",
    batch_sizes: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    compiled: bool = True,
    seconds: float = 1.0,
) -> TeacherBench:
    """Time each teacher in every way that works for it, by turns in three rounds of `seconds` for each way.

    Args:
        teachers: Specs such as "timm:resnet50".
        device: "cpu", "cuda" or "cuda:N".
        precision: "auto", "fp32", "bf16" or "fp16".
        batch_sizes: Crops at a time; 4, 8 and 32 on a CPU, 64 to 1024 on a GPU by default.
        threads: Threads that compute; 1 and all by default, on a GPU all.
        compiled: Also try torch.compile, which takes a minute or more for each teacher.
        seconds: Length of each measurement.

    Raises UsageError for numbers that cannot be right, TeacherError where a teacher cannot be run at all.

    >>> found = fd.bench_teachers(["timm:resnet50"], batch_sizes=[8], compiled=False)  # doctest: +SKIP
    >>> print(found.teachers[0].advice)  # doctest: +SKIP
    """
    cores = torch.get_num_threads()
    batch_sizes = tuple(batch_sizes or (CPU_BATCHES if device == "cpu" else CUDA_BATCHES))
    threads = tuple(threads or sorted({1, cores} if device == "cpu" else {cores}))
    # Also not NaN, or for ever.
    if min(*batch_sizes, *threads, 1) < 1 or not 0 < seconds < math.inf:
        raise UsageError("batch sizes and threads must be at least 1, and seconds above 0")
    loaded = load_teachers(teachers, device=device, precision=precision)
    with Scratch("bench") as folder:
        timed = [
            _Bench(teacher, device, batch_sizes, threads, seconds, folder / f"{number}.onnx").run(compiled, cores)
            for number, teacher in enumerate(loaded)
        ]
    return TeacherBench(device=device, cores=cores, teachers=tuple(timed))


def export_teacher(teacher: str | TeacherSpec, path: Path) -> TeacherSpec:
    """Write a teacher as an ONNX file, and return the spec to use from now on.

    Raises TeacherError, and writes nothing, where its probabilities are further than TOLERANCE from the eager ones;
    UsageError for an existing file whose name does not end in .onnx.

    >>> fd.export_teacher("timm:resnet50", Path("resnet50.onnx")).kind  # doctest: +SKIP
    'onnx'
    """
    # Before anything is loaded or written: the path may be one that no spec can name.
    spec = TeacherSpec(kind="onnx", name=str(path))
    if path.is_file() and path.suffix.lower() != ".onnx":
        raise UsageError(f"{path}: exists and is no ONNX file by its name; name another file, which ends in .onnx")
    (eager,) = load_teachers([teacher])
    with write_atomically(path) as aside:
        exported = _export(eager, aside)
        difference = _largest_difference(eager, exported)
        # "not <=", since a difference of NaN is no smaller than anything.
        if not difference <= TOLERANCE:
            raise TeacherError(
                f"teacher {eager.spec}: its ONNX form differs by {difference:.2g} in a probability, more than "
                f"{TOLERANCE:g}; nothing was written; use the teacher without --export"
            )
    return replace(spec, weight=eager.spec.weight, temperature=eager.spec.temperature)


class _Bench:
    """Takes the timings of one teacher."""

    def __init__(
        self,
        teacher: Teacher,
        device: str,
        batch_sizes: Sequence[int],
        threads: Sequence[int],
        seconds: float,
        onnx_path: Path,
    ) -> None:
        self.teacher = teacher
        self.device = device
        self.batch_sizes = batch_sizes
        self.threads = threads
        self.seconds = seconds
        self.onnx_path = onnx_path
        self.failures: dict[str, str] = {}
        self.rates: dict[tuple[Way, int, int], list[float]] = {}
        self.differences: dict[Way, float] = {}

    def run(self, compiled: bool, cores: int) -> TeacherTimings:
        ways = self._ways()
        self._time(ways, self.batch_sizes)
        if not any(way in OF_A_BUILD for way, _, _ in self.rates):
            raise TeacherError(
                f"teacher {self.teacher.spec}: the device has too little memory for any of {list(self.batch_sizes)} "
                "crops at a time; try smaller --batch-sizes"
            )
        if compiled and is_plain_module(self.teacher):
            # Only for the batch size that promises most, since each size costs a compilation.
            at_once = [size for way, size, count in self.rates if (way, count) == ("channels-last", max(self.threads))]
            best = max(at_once, key=lambda size: self._rate(("channels-last", size, max(self.threads))))
            self._time(self._compiled(self.teacher, best), [best])
        # The first way timed: eager or, for teachers that are no modules, "as it is".
        first = next(iter(self.rates))[0]
        base = max(self._rate(key) for key in self.rates if key[0] == first)
        timings = tuple(
            Timing(
                way=way,
                batch_size=size,
                threads=threads,
                crops_per_second=self._rate((way, size, threads)),
                ratio=self._rate((way, size, threads)) / base,
                largest_difference=self.differences[way],
            )
            for way, size, threads in self.rates
        )
        found = TeacherTimings(spec=str(self.teacher.spec), timings=timings, failures=self.failures, advice="")
        return replace(found, advice=advice(found, cores))

    def _ways(self) -> dict[tuple[Way, int], Teacher]:
        """Return the teacher for each (way, threads). The number of threads is fixed in an ONNX session."""
        if not is_plain_module(self.teacher):
            return {("as it is", threads): self._with(threads, self.teacher) for threads in self.threads}
        ways: dict[tuple[Way, int], Teacher] = {}
        for threads in self.threads:
            ways["eager", threads] = _in_planes(self.teacher)
            ways["channels-last", threads] = self.teacher
        if self.device != "cpu":
            self.failures["onnx"] = "compared on a CPU only"
            return ways
        try:
            _export(self.teacher, self.onnx_path)
            for threads in self.threads:
                with _threads(threads):
                    ways["onnx", threads] = _open_onnx(self.onnx_path)
        except FerkdError as error:
            self.failures["onnx"] = str(error)
        return ways

    def _with(self, threads: int, teacher: Teacher) -> Teacher:
        with _threads(threads):
            return load_teachers([teacher.spec], device=self.device, precision=teacher.precision)[0]

    def _compiled(self, teacher: ModuleTeacher, batch_size: int) -> dict[tuple[Way, int], Teacher]:
        try:
            # The number of threads is fixed in the compiled code too.
            return {("compile", max(self.threads)): compile_teacher(teacher, batch_size)}
        except TeacherError as error:
            self.failures["compile"] = str(error)
            return {}

    def _time(self, ways: dict[tuple[Way, int], Teacher], batch_sizes: Sequence[int]) -> None:
        for (way, _), teacher in ways.items():
            self.differences[way] = _largest_difference(self.teacher, teacher)
        pictures = _pictures(CHECKED_CROPS, self.teacher.preprocessing.size)
        batches = {count: _repeated(pictures, count).to(self.device) for count in batch_sizes}
        # All ways by turns in each round: a machine that slows down meanwhile slows all of them.
        for number in range(ROUNDS):
            for (way, threads), teacher in ways.items():
                for count, batch in batches.items():
                    if f"{way}, batch {count}" not in self.failures:
                        self._time_once((way, count, threads), teacher, batch, warm_up=number == 0)

    def _time_once(self, key: tuple[Way, int, int], teacher: Teacher, batch_BCSS: Tensor, *, warm_up: bool) -> None:
        way, count, threads = key
        try:
            with _threads(threads):
                if warm_up:
                    # Warm-up: caches, the allocator, and kernels that are chosen or compiled at the first call.
                    teacher.logits(batch_BCSS).cpu()
                self.rates.setdefault(key, []).append(_measure(teacher, batch_BCSS, self.seconds))
                return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Not in the except block: there, the exception still refers to the tensors of its frames.
        torch.cuda.empty_cache()
        self.failures[f"{way}, batch {count}"] = "out of memory"
        self.rates.pop(key, None)

    def _rate(self, key: tuple[Way, int, int]) -> float:
        return statistics.median(self.rates[key])


def advice(found: TeacherTimings, cores: int) -> str:
    """Return one line with the options for `build`. A way with one thread counts once for each core."""

    def on_all_cores(timing: Timing) -> float:
        # As many workers as fill the cores. An upper bound: they share memory bandwidth.
        return timing.crops_per_second * max(1, cores // timing.threads)

    def fastest(timings: Sequence[Timing]) -> Timing:
        first = max(timings, key=on_all_cores)
        alike = [t for t in timings if (t.way, t.threads) == (first.way, first.threads)]
        alike = [t for t in alike if on_all_cores(t) >= ALIKE * on_all_cores(first)]
        return min(alike, key=lambda t: t.batch_size)

    best = fastest(found.timings)
    now = fastest([t for t in found.timings if t.way in OF_A_BUILD])
    if on_all_cores(best) < WORTH * on_all_cores(now):
        # Not worth an option: within a tenth of what a build does anyway.
        best = now
    export = f"ferkd-data bench --teacher {quote(found.spec)} --export FILE.onnx"
    options = {
        "onnx": f"--teacher onnx:FILE.onnx ({export} writes it) ",
        "compile": "--compile ",
    }.get(best.way, "")
    workers = f" --workers {cores // best.threads}" if cores // best.threads > 1 else ""
    gain = on_all_cores(best) / on_all_cores(now)
    why = f"{gain:.1f} times the best that it does without" if options else "nothing else is much faster"
    return f"build {options}--batch-size {best.batch_size}{workers}: {why}"


def _in_planes(teacher: ModuleTeacher) -> ModuleTeacher:
    """Return the teacher in PyTorch's default memory format, in which every channel is a plane of its own."""
    other = copy.copy(teacher)
    other.memory_format = torch.contiguous_format
    module = teacher.module
    other.module = copy.deepcopy(module).to(memory_format=torch.contiguous_format)  # type: ignore[attr-defined]
    return other


def _export(teacher: Teacher, path: Path) -> OnnxTeacher:
    if not is_plain_module(teacher):
        raise TeacherError(f"teacher {teacher.spec}: only PyTorch modules can be written as ONNX files")
    module = teacher.module
    assert isinstance(module, nn.Module)
    try:
        export_onnx(module, path, preprocessing=teacher.preprocessing)
    except FerkdError:
        raise
    except Exception as error:
        # The exporter's exceptions share no base but Exception.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TeacherError(f"teacher {teacher.spec}: cannot be written as an ONNX file ({reason})") from error
    return _open_onnx(path)


def _open_onnx(path: Path) -> OnnxTeacher:
    return OnnxTeacher(TeacherSpec(kind="onnx", name=str(path)), device="cpu", precision="fp32")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(teacher: Teacher, batch_BCSS: Tensor, seconds: float) -> float:
    started, done = time.perf_counter(), 0
    at_once = 1 if batch_BCSS.device.type == "cpu" else ASKED_AT_ONCE
    while (passed := time.perf_counter() - started) < seconds or not done:
        for _ in range(at_once - 1):
            teacher.logits(batch_BCSS)
        # Copying the answer to the host waits for it, and for those asked before it on the same stream.
        teacher.logits(batch_BCSS).cpu()
        done += at_once * len(batch_BCSS)
    return done / passed if passed else 0.0


def _largest_difference(eager: Teacher, other: Teacher) -> float:
    """Return the largest difference of a probability on the same pictures; NaN where either teacher gives NaN."""
    pictures = _pictures(CHECKED_CROPS, eager.preprocessing.size)
    first, second = (teacher.logits(pictures).cpu().softmax(dim=1) for teacher in (eager, other))
    return float((first - second).abs().max())


def _repeated(pictures: Tensor, count: int) -> Tensor:
    return empty_batch(count, pictures.shape[-1]).copy_(pictures[torch.arange(count, device="cpu") % len(pictures)])


def _pictures(count: int, size: int) -> Tensor:
    """Return `count` pictures of smooth colours with some noise, the same every time."""
    generator = torch.Generator("cpu").manual_seed(0)
    # Smooth colours and some noise, as in photos: pure noise lies far from what teachers were trained on.
    smooth = torch.rand((count, 3, 6, 6), generator=generator, device="cpu") * 255
    large = nn.functional.interpolate(smooth, size=(size, size), mode="bicubic")
    noise = torch.randn((count, 3, size, size), generator=generator, device="cpu") * 8
    return empty_batch(count, size).copy_((large + noise).clamp_(0, 255))
