"""The steps of scripts/gpu_check.sh, each on its own: `python benchmarks/gpu_steps.py STEP --device cuda [--tiny]`.

Exit status: 0 done and every bar held, 1 a bar was missed or something failed, 75 not possible here. Bars on speed are
judged on a GPU alone; `--tiny` with `--device cpu` rehearses the whole on any machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ferkd_data as fd
from ferkd_data.errors import TeacherError

ROOT = Path(__file__).parent.parent
NOT_HERE = 75


class Net(nn.Module):
    """A small teacher: mean colours of a grid, 10 classes, 64 px."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing = {"size": 64, "mean": (0.5,), "std": (0.25,)}
        self.pool = nn.AdaptiveAvgPool2d(8)
        self.head = nn.Linear(192, 10)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-2, 2, 1920).view(10, 192).mul(97).sin())
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


class Hungry(Net):
    """Takes a gigabyte for every 64 crops on a GPU; on a CPU it says that it did."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            torch.empty((len(x) * 16, 2**20), dtype=torch.uint8, device=x.device)
        elif len(x) > 64:
            raise RuntimeError("Failed to allocate memory for requested buffer (a rehearsal)")
        return super().forward(x)


class Hung(Net):
    """Keeps the device busy for ten minutes with its second batch."""

    asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x) > 1
        if self.asked >= 2 and x.is_cuda:
            torch.cuda._sleep(10**12)
        elif self.asked >= 2:
            time.sleep(600)
        return super().forward(x)


class NaN(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float("nan")


@dataclass(kw_only=True)
class Step:
    """What a step is given, and what it found."""

    device: str
    tiny: bool
    folder: Path
    missed: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def choose(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    def bar(self, text: str, *, held: bool, speed: bool = False) -> None:
        """Print whether a bar was held; one on speed says nothing without a GPU."""
        if speed and not self.on_gpu:
            print(f"  (not judged without a GPU) {text}")
            return
        print(f"  {'held' if held else 'MISSED'}: {text}")
        if not held:
            self.missed.append(text)

    def photos(self, count: int, *, classes: int = 0) -> Path:
        """JPEGs of 500 x 375, without ground truth or in class folders."""
        from build_gpu import write_photos

        folder = self.folder / "photos"
        folder.mkdir()
        for number, path in enumerate(write_photos(folder, count)):
            if classes:
                target = folder / f"class{number % classes}"
                target.mkdir(exist_ok=True)
                path.rename(target / path.name)
        return folder

    def build(self, photos: Path, teacher: str, **settings: Any) -> fd.LabelSet:
        out = self.folder / f"labels-{len(list(self.folder.glob('labels-*')))}"
        chosen = {"crops": 8, "top_k": 5, "device": self.device, **settings}
        fd.build(photos, out, teachers=[teacher], **chosen)
        return fd.open_labels(out)


def here(step: Step) -> None:
    """The machine."""
    print(f"  {platform.platform()}, Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores")
    print(f"  torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if step.on_gpu:
        properties = torch.cuda.get_device_properties(step.device)
        print(f"  {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} GPUs")
        subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,utilization.gpu", "--format=csv"], check=False)
    for package in ("torchvision", "timm", "onnxruntime", "torchcodec", "simplejpeg", "pyarrow"):
        try:
            print(f"  {package} {__import__('importlib.metadata').metadata.version(package)}")
        except ModuleNotFoundError:
            print(f"  {package} is not installed")


def tests(step: Step) -> None:
    """The tests of everything that runs on a GPU."""
    files = ["tests/rooms/test_on_a_gpu.py", "tests/rooms/builder/test_staging.py"]
    files += ["tests/rooms/loader/test_device_decode.py", "tests/rooms/teachers/test_teachers_on_gpus.py"]
    chosen = step.choose(files, [files[-1]])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    print("  " + "\n  ".join(found.stdout.strip().splitlines()[-3:]))
    step.bar("the tests pass", held=found.returncode == 0)


AGREEMENT_BARS = {"fp32": (0.01, 0.98), "bf16": (0.08, 0.8)}
"""By precision: the most that a crop's probabilities may differ in the mean over the crops, and the least share of the
same top-1. Measured on a CPU with a ResNet-50 of `telling_teacher`: 0.002 and 100 % in fp32 with crops cut as on a
device, 0.03 and 88 % in bf16. Wrong inputs: 0.06 and 83 % for pixels brighter by one level, 0.6 and 25 % for BGR."""


def agreement(step: Step) -> None:
    """The same label set from the CPU in fp32, and from the device in fp32 and bf16."""
    photos = step.photos(step.choose(100, 6))
    teacher = telling_teacher(step, step.choose("resnet50", "mobilenetv3_small_050"), photos)
    settings = {"crops": step.choose(20, 4), "top_k": 1000}
    on_cpu = dense(step.build(photos, teacher, **settings, device="cpu", precision="fp32"))
    p_max = float(np.median(on_cpu.max(1)))
    step.bar(f"the median p_max is {p_max:.2f}, within 0.2 .. 0.9, so that labels can differ", held=0.2 < p_max < 0.9)
    for precision, (most, least) in AGREEMENT_BARS.items():
        other = dense(step.build(photos, teacher, **settings, precision=precision))
        largest = np.abs(on_cpu - other).max(1)
        same = float((on_cpu.argmax(1) == other.argmax(1)).mean())
        mean = float(largest.mean())
        print(f"  {precision}: probabilities differ by {largest.max():.2g} at most, top-1 the same {same:.2%}")
        step.bar(
            f"{precision}: a crop's probabilities differ by {mean:.2g} in the mean, at most {most:g}", held=mean <= most
        )
        step.bar(f"{precision}: top-1 is the same for {same:.1%}, at least {least:.0%}", held=same >= least)


def builder(step: Step) -> None:
    """The builder beside the bare forward pass and FKD's generator, with a profile."""
    script = ["benchmarks/build_gpu.py", "--device", step.device]
    if step.tiny:
        script += ["--teachers", "mobilenetv3_small_050", "--images", "2", "--crops", "8", "--batch-size", "8"]
        script += ["--rounds", "1", "--seconds", "0.1"]
    else:
        script += ["--teachers", "resnet50,mobilenetv3_large_100,vit_small_patch16_224", "--images", "160"]
        script += ["--rounds", "2", "--seconds", "2"]
    subprocess.run([sys.executable, *script], cwd=ROOT, check=True)


def threads(step: Step) -> None:
    """Build rate by the number of threads that decode and cut."""
    photos = step.photos(step.choose(120, 4))
    teacher = timm_teacher(step, step.choose("resnet50", "mobilenetv3_small_050"))
    for workers in step.choose((4, 8, 16), (1, 2)):
        print(f"  {workers:>3} threads: {build_rate(step, photos, teacher, threads=workers):>9,.0f} crops/s")


def batch_sizes(step: Step) -> None:
    """Crops per second of the bare teachers by batch size, as `ferkd-data bench` measures it."""
    from ferkd_data.bench import bench_teachers

    for name in step.choose(("resnet50", "mobilenetv3_large_100", "vit_small_patch16_224"), ("mobilenetv3_small_050",)):
        found = bench_teachers(
            ["python:gpu_steps:Net" if step.tiny else timm_teacher(step, name)],
            device=step.device,
            compiled=False,
            seconds=step.choose(0.3, 0.01),
            batch_sizes=step.choose(None, (2,)),
        ).teachers[0]
        print(f"  {found.spec}: {found.advice}")
        for timing in found.timings:
            print(f"    {timing.way:<14} batch {timing.batch_size:>5} {timing.crops_per_second:>9,.0f} crops/s")


def memory(step: Step) -> None:
    """Batches are halved when memory runs out, and the labels are the same."""
    photos = step.photos(step.choose(40, 20))
    taken = []
    if step.on_gpu:
        free, _ = torch.cuda.mem_get_info(step.device)
        taken.append(torch.empty(max(0, free - 6 * 2**30), dtype=torch.uint8, device=step.device))
    events: list[Any] = []
    watcher = SimpleNamespace(see=events.append)
    large = step.build(photos, "python:gpu_steps:Hungry", batch_size=1024, crops=32, watchers=[watcher])
    small = step.build(photos, "python:gpu_steps:Hungry", batch_size=32, crops=32)
    halved = [event for event in events if type(event).__name__ == "BatchHalved"]
    print(f"  halved {len(halved)} times: {[getattr(event, 'crops', None) for event in halved]}")
    step.bar("memory ran out, and the build went on with smaller batches", held=bool(halved))
    difference = float(np.abs(dense(large) - dense(small)).max())
    step.bar(f"the labels differ by {difference:.2g}, at most 0.01", held=difference <= 0.01)


def faults(step: Step) -> None:
    """A teacher that hangs on the device and one that gives NaN end the build under their names."""
    photos = step.photos(8)
    for name, settings, words in (
        ("Hung", {"teacher_timeout": 5.0, "batch_size": 16}, "no answer"),
        ("NaN", {}, "NaN"),
    ):
        started = time.perf_counter()
        try:
            step.build(photos, f"python:gpu_steps:{name}", **settings)
            said = "nothing"
        except TeacherError as error:
            said = str(error)
        print(f"  {name}, after {time.perf_counter() - started:.1f} s: {said}")
        step.bar(f"{name} is named", held=f"gpu_steps:{name}" in said and words in said)


def loader(step: Step) -> None:
    """Decoding on the device beside decoding in workers that feed the same device."""
    photos = step.photos(step.choose(400, 8))
    labels = step.build(photos, "python:gpu_steps:Net", crops=16)
    settings = {"images": photos, "batch_size": step.choose(256, 8), "crops_per_image": 4, "size": step.choose(224, 32)}
    cores = len(os.sched_getaffinity(0))
    rates: dict[str, float] = {}
    ways = {"workers": {}, "device": {"decode_device": step.device}}
    for name, options in ways.items():
        crops = fd.CropLoader(labels, num_workers=step.choose(cores, 0), **settings, **options)
        rates[name], busy = loading_rate(crops, step)
        print(f"  decoded by {name:<8} {rates[name]:>9,.0f} crops/s, device busy {busy}")
    print(f"  device / workers {rates['device'] / rates['workers']:.2f}")
    batches = []
    for options in ways.values():
        images, _ = next(iter(fd.CropLoader(labels, num_workers=0, **settings, **options)))
        batches.append(images.cpu().int())
    difference = (batches[0] - batches[1]).abs()
    print(f"  pixels differ by {float(difference.float().mean()):.3f} in the mean, {int(difference.max())} at most")
    step.bar("pixels differ by less than 1 level in the mean", held=bool(difference.float().mean() < 1))


def jpegs(step: Step) -> None:
    """TorchCodec's JPEG decoder beside torchvision's operators, which are to be removed; on CUDA it has never run."""
    from ferkd_data.loader.device_jpegs import decode, hand_over, present_device

    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:
        print(f"  torchcodec (0.16 or newer) cannot be used here: {str(error).splitlines()[0]}")
        raise SystemExit(NOT_HERE) from error
    files = sorted(step.photos(step.choose(256, 4)).rglob("*.jpg"))
    data = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in files]
    device = present_device(torch.device(step.device))
    ways: dict[str, Callable[[], Any]] = {
        "torchvision": lambda: list(map(hand_over, decode(data, device))),
        "torchcodec": lambda: decode_jpeg(data, mode="RGB", device=step.device),
    }
    rates = in_turn(ways, len(data), step)
    first, second = (way() for way in ways.values())
    largest = max(int((a.int() - b.int()).abs().max()) for a, b in zip(first, second, strict=True))
    print(f"  torchcodec / torchvision {rates['torchcodec'] / rates['torchvision']:.2f}; largest difference {largest}")


def loss(step: Step) -> None:
    """Calibration, SelfMix and the sparse loss beside a training step of a ResNet-50."""
    import torchvision

    from ferkd_data.targets import SoftTargets

    count, classes, k = step.choose(256, 4), 1000, 5
    make = torchvision.models.resnet50 if not step.tiny else torchvision.models.resnet18
    model = make(num_classes=classes).to(step.device, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    side = step.choose(224, 32)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=step.device)
    weight = torch.rand(count, k).softmax(1)
    index = torch.stack([torch.randperm(classes)[:k] for _ in range(count)])
    soft = SoftTargets(index=index, weight=weight, floor=torch.zeros(count), num_classes=classes).to(step.device)
    hard = torch.randint(0, classes, (count,), device=step.device)
    mix, generator = fd.SelfMix(), np.random.default_rng(0)

    def train(criterion: Callable[[Tensor], Tensor], inputs: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(step.device).type, torch.bfloat16, enabled=step.on_gpu):
            logits = model(fd.normalize(inputs))
        criterion(logits.float()).backward()
        optimiser.step()

    def ours() -> None:
        mixed, targets = mix(images, soft, crops_per_image=4, rng=generator)
        train(lambda logits: fd.soft_cross_entropy(logits, targets), mixed)

    ways = {"hard labels": lambda: train(lambda z: nn.functional.cross_entropy(z, hard), images), "ours": ours}
    rates = in_turn(ways, count, step)
    share = rates["hard labels"] / rates["ours"] - 1
    step.bar(f"soft labels and the sparse loss add {share:.1%} to a step, less than 2 %", held=share < 0.02, speed=True)


def two_workers(step: Step) -> None:
    """One and two worker processes on one device."""
    photos = step.photos(step.choose(160, 8))
    teacher = timm_teacher(step, step.choose("mobilenetv3_large_100", "mobilenetv3_small_050"))
    rates = {
        count: build_rate(step, photos, teacher, workers=count, images_per_shard=step.choose(40, 4)) for count in (1, 2)
    }
    for count, rate in rates.items():
        print(f"  {count} workers: {rate:>9,.0f} crops/s")


def teach(step: Step) -> None:
    """Students trained on the device from a label set: the machinery, not the evidence."""
    script = ROOT / "benchmarks" / "teach" / "run.py"
    if not script.is_file():
        raise SystemExit(NOT_HERE)
    photos = step.photos(step.choose(200, 40), classes=10)
    classes = step.folder / "classes.txt"
    classes.write_text("".join(f"class{number}\n" for number in range(10)))
    labels = step.build(photos, "python:gpu_steps:Net", crops=16, crops_per_block=16, classes=classes)
    command = [sys.executable, str(script), "--labels", str(labels.location), "--train", str(photos)]
    command += ["--val", str(photos), "--classes", str(classes), "--runs", str(step.folder / "runs.jsonl")]
    command += ["--device", step.device, "--jobs", "1"]
    command += step.choose(["--quick"], ["--steps", "2", "--seeds", "1", "--methods", "ferkd"])
    subprocess.run(command, cwd=ROOT, check=True)


STEPS: dict[str, tuple[Callable[[Step], None], int]] = {
    "here": (here, 20),
    "tests": (tests, 60),
    "agreement": (agreement, 50),
    "builder": (builder, 110),
    "loader": (loader, 45),
    "memory": (memory, 30),
    "faults": (faults, 40),
    "loss": (loss, 30),
    "threads": (threads, 40),
    "batch-sizes": (batch_sizes, 40),
    "jpegs": (jpegs, 20),
    "two-workers": (two_workers, 40),
    "teach": (teach, 75),
}
"""Name -> (what it does, seconds that it may take on an H100), the most telling ones first."""


def timm_teacher(step: Step, name: str) -> str:
    from build_gpu import write_teacher

    return write_teacher(name, step.folder)


def telling_teacher(step: Step, name: str, photos: Path) -> str:
    """Write a teacher with random weights whose answers depend on the picture, and return its spec.

    As they are, random weights give each of 1,000 classes a probability of about 0.001 whatever they see, so that wrong
    pixels would go unnoticed. The last layer is changed so that logits are 0 in the mean over pictures, and so large
    that p_max is 0.5 in the median.
    """
    from safetensors.torch import save_file

    from ferkd_data.images import decode_rgb
    from ferkd_data.teachers import load_teachers
    from ferkd_data.teachers.probe import centre_crop

    spec = timm_teacher(step, name)
    (teacher,) = load_teachers([spec])
    pictures = [centre_crop(decode_rgb(path.read_bytes()), teacher) for path in sorted(photos.iterdir())[:16]]
    logits = torch.cat([teacher.logits(picture) for picture in pictures])
    centred = logits - logits.mean(0)
    low, high = 1e-3, 1e9  # p_max grows with the scale
    for _ in range(60):
        scale = (low * high) ** 0.5
        p_max = float((centred * scale).softmax(1).amax(1).median())
        low, high = (scale, high) if p_max < 0.5 else (low, scale)
    head = teacher.module.get_classifier()
    with torch.no_grad():
        head.bias.sub_(logits.mean(0)).mul_(scale)
        head.weight.mul_(scale)
    path = step.folder / f"{name}-telling.safetensors"
    save_file({key: weights.contiguous() for key, weights in teacher.module.state_dict().items()}, str(path))
    return f"timm:{name}@{path}"


def dense(labels: fd.LabelSet) -> np.ndarray:
    """(crops, classes) float32 of all images, in the order of the shards."""
    rows = []
    classes = labels.num_classes
    for row in labels:
        index, prob = np.asarray(row.class_index), np.asarray(row.class_prob, np.float32)
        whole = np.zeros((len(index), classes), np.float32)
        np.put_along_axis(whole, index.astype(np.int64), prob, axis=1)
        rows.append(whole)
    return np.concatenate(rows)


def build_rate(step: Step, photos: Path, teacher: str, **settings: Any) -> float:
    """Crops per second between a tenth and nine tenths of a build."""
    marks: list[tuple[float, int]] = []
    step.build(
        photos,
        teacher,
        crops=step.choose(200, 8),
        on_progress=lambda progress: marks.append((time.perf_counter(), progress.crops_done)),
        **settings,
    )
    total = marks[-1][1]
    start, before = next(mark for mark in marks if mark[1] >= 0.1 * total)
    end, after = marks[-1]
    return (after - before) / max(end - start, 1e-9)


def loading_rate(crops: fd.CropLoader, step: Step) -> tuple[float, str]:
    """Crops per second on the device over two epochs, the first batch not counted; and how busy the device was."""
    from build_gpu import covered
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA]) if step.on_gpu else None
    done, started = 0, None
    for epoch in range(2):
        crops.set_epoch(epoch)
        for images, _ in crops:
            images.to(step.device, non_blocking=True)
            if started is None:
                started = time.perf_counter()
                if profiler is not None:
                    profiler.start()
            else:
                done += len(images)
    if step.on_gpu:
        torch.cuda.synchronize(step.device)
    seconds = time.perf_counter() - (started or 0.0)
    if profiler is None:
        return done / seconds, "is not known"
    profiler.stop()
    kernels = [each for each in profiler.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    share = covered([(each.time_range.start, each.time_range.end) for each in kernels]) / 1e6 / seconds
    return done / seconds, f"{share:.1%}"


def in_turn(ways: dict[str, Callable[[], Any]], count: int, step: Step) -> dict[str, float]:
    """Items per second of each way: medians of rounds in turn, the first of which warms up."""

    def wait() -> None:
        if step.on_gpu:
            torch.cuda.synchronize(step.device)

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(step.choose(12, 2)):
        for name, way in ways.items():
            wait()
            started = time.perf_counter()
            way()
            wait()
            if number:
                seconds[name].append(time.perf_counter() - started)
    rates = {name: count / statistics.median(values) for name, values in seconds.items()}
    for name, rate in rates.items():
        print(f"  {name:<14} {rate:>9,.0f} a second")
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="So small that it proves the script and nothing else.")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ferkd-data-gpu-"))
    step = Step(device=arguments.device, tiny=arguments.tiny, folder=folder)
    try:
        STEPS[arguments.step][0](step)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if step.missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
