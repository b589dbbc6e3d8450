"""What runs on a GPU, on one that is not there: tensors where they belong, a host that never waits; see fake_gpu.py."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from fake_gpu import StreamRecorder, open_fake_gpu, pretend_cuda

import ferkd_data as fd
from ferkd_data.augment import OPERATIONS, Operations, apply_operations
from ferkd_data.builder.labelling.crop_batches import CropInput, DecodedImage, Slice, _cut, input_of
from ferkd_data.builder.labelling.forwards import CudaStaging
from ferkd_data.builder.labelling.job import Job, Tools
from ferkd_data.builder.labelling.label_shard import _ask
from ferkd_data.builder.settings import WorkerResources
from ferkd_data.errors import ImageError, LoaderError, UsageError
from ferkd_data.images import ImageRef
from ferkd_data.images.decode import jpeg_size
from ferkd_data.loader import device_decode, device_jpegs
from ferkd_data.targets import SoftTargets
from ferkd_data.teachers import Preprocessing, TeacherSpec
from ferkd_data.teachers.module_teacher import ModuleTeacher
from ferkd_data.upload import upload

MODULES = {
    "resnet": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=10),
}


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    pretend_cuda(monkeypatch)
    # Pretended tensors have no values that could look like logits or not.
    monkeypatch.setattr("ferkd_data.teachers.module_teacher.check_activation", lambda output, spec: None)


def teacher(module, *, precision="bf16", size=64, interpolation="bilinear"):
    preprocessing = Preprocessing(size=size, mean=(0.5,) * 3, std=(0.2,) * 3, interpolation=interpolation)
    spec = TeacherSpec.parse("timm:x")
    return ModuleTeacher(module, spec, preprocessing, digest="0" * 64, device="cuda", precision=precision)


def image(number, height, width, crops):
    drawn = fd.draw_crops(str(number), height, width, seed=0, count=crops, distribution=fd.CropDistribution())
    ref = ImageRef(key=str(number), target=number, file="", offset=0, length=0)
    pixels = np.zeros((height, width, 3), np.uint8)
    return DecodedImage(ref=ref, data=b"", digest=b"", pixels=pixels, crops=drawn)


def tools(teachers, staging, ensemble="mean"):
    job = Job(
        source="",
        classes=None,
        out=None,
        teachers=(),
        precision="auto",
        settings=fd.BuildSettings(top_k=4, ensemble=ensemble),
        resources=WorkerResources(batch_size=12, threads=1, compute_threads=1),
    )
    executor = ThreadPoolExecutor(1)
    return Tools(job=job, device="cuda", source=None, teachers=teachers, staging=staging, executor=executor)


@pytest.mark.parametrize(
    ("name", "precision", "ensemble"),
    [("resnet", "bf16", "mean"), ("mobilenet", "fp16", "logits"), ("vit", "fp32", "geometric")],
)
def test_a_batch_from_pixels_to_answers(name, precision, ensemble):
    modules = MODULES[name](), MODULES["resnet"]()
    whole = [Slice(image(1, 60, 80, 8), 0, 8), Slice(image(2, 30, 20, 9), 2, 6)]
    with open_fake_gpu() as gpu:
        models = teacher(modules[0], precision=precision), teacher(modules[1], size=32, interpolation="bicubic")
        staging = CudaStaging("cuda")
        gpu.waits.clear()
        batch = _cut(whole, [input_of(model) for model in models], staging)
        assert {each.size: tuple(crops.shape) for each, crops in batch.pixels.items()} == {
            64: (12, 3, 64, 64),
            32: (12, 3, 32, 32),
        }
        for crops in batch.pixels.values():
            assert crops.dtype == torch.uint8 and crops.device.type == "cuda"
            assert crops.is_contiguous(memory_format=torch.channels_last)
        results = _ask(batch, tools(models, staging, ensemble)).fetched.tensors
    assert [tuple(result.shape) for result in results] == [(12, 4), (12, 4), (12,), (2,), (2, 2), (2, 2), (3, 2, 15)]
    assert {result.device.type for result in results} == {"cpu"}
    assert not gpu.waits


def test_kernels_of_a_batch_are_few():
    """Those of cutting: some for each batch, a dozen more for each image, none for a crop."""

    def kernels(images, crops):
        crop_input = CropInput(64, "bicubic")
        with open_fake_gpu() as gpu:
            _cut([Slice(image(n, 60, 80, crops), 0, crops) for n in range(images)], [crop_input], CudaStaging("cuda"))
        return gpu.kernels.total()

    assert kernels(3, 4) == kernels(3, 40)
    assert kernels(4, 4) - kernels(3, 4) <= 14
    assert kernels(1, 4) <= 70


def test_normalising_is_one_kernel():
    with open_fake_gpu() as gpu:
        model = teacher(MODULES["resnet"]())
        crops = torch.empty((4, 64, 64, 3), dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
        seen = []
        module, model.module = (
            model.module,
            lambda images: seen.append((images.dtype, dict(gpu.kernels))) or module(images),
        )
        gpu.kernels.clear()
        assert model.logits(crops).dtype == torch.float32
    assert seen == [(torch.bfloat16, {"addcmul": 1})]


class NvJpeg:
    """Stands for torchvision's operator: pixels without contents, from memory of the stream that is current."""

    def __init__(self):
        self.devices, self.sizes = [], []

    def __call__(self, jpegs, mode, device):
        if device.type == "cpu":
            raise RuntimeError("Expected the device parameter to be a cuda device")
        assert mode == 3 and all(jpeg.device.type == "cpu" for jpeg in jpegs)
        self.devices.append(device)
        self.sizes += [jpeg_size(jpeg.numpy().tobytes(), 10**6) for jpeg in jpegs]
        return [torch.empty((3, *size), dtype=torch.uint8, device=device) for size in self.sizes[-len(jpegs) :]]


@pytest.fixture
def nvjpeg(monkeypatch):
    operator = NvJpeg()
    monkeypatch.setattr(torch.ops.image, "decode_jpegs_cuda", operator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device_jpegs._stream.cache_clear()
    yield operator
    device_jpegs._stream.cache_clear()


LOADERS = {
    "plain": {},
    "spread": {"spread": 2},
    "bicubic, selfmix": {"interpolation": "bicubic", "selfmix": fd.SelfMix(prob=0.7, per="sample")},
    "mixup": {"selfmix": fd.SelfMix(prob=1.0, mode="mixup")},
}


def loader_on_a_gpu(label_set, photos, tmp_path, **changes):
    settings = {"images": photos, "batch_size": 8, "crops_per_image": 2, "size": 32, "cache_dir": tmp_path / "cache"}
    return fd.CropLoader(fd.open_labels(label_set), **{**settings, "decode_device": "cuda", **changes})


@pytest.mark.parametrize("chunk", [2**27, 2 * 48 * 64])
@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_decodes_cuts_and_mixes_there(label_set, photos, tmp_path, nvjpeg, monkeypatch, name, chunk):
    monkeypatch.setattr(device_decode, "CHUNK_PIXELS", chunk)
    with open_fake_gpu() as gpu:
        gpu.pageable_bytes = 0 if name in ("plain", "spread") else 2**16
        for images, soft in loader_on_a_gpu(label_set, photos, tmp_path, **LOADERS[name]):
            assert images.shape == (8, 3, 32, 32) and images.device == torch.device("cuda", 0)
            assert images.is_contiguous(memory_format=torch.channels_last) and soft.device.type == "cpu"
    assert len(nvjpeg.sizes) == 1 + 20
    assert not gpu.waits


def test_a_loader_decodes_on_the_gpu_that_is_current_when_an_epoch_begins(
    label_set, photos, tmp_path, nvjpeg, monkeypatch
):
    """A rank may choose its GPU after it has made its loader, and nothing has touched another one until then."""
    loader = loader_on_a_gpu(label_set, photos, tmp_path)
    assert not nvjpeg.devices
    for current in (1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        with open_fake_gpu():
            assert {images.device for images, _ in loader} == {torch.device("cuda", current)}
        assert set(nvjpeg.devices) == {torch.device("cuda", current)}
        nvjpeg.devices.clear()
    with open_fake_gpu():
        images, _ = next(iter(loader_on_a_gpu(label_set, photos, tmp_path, decode_device="cuda:1")))
    assert images.device == torch.device("cuda", 1)


def test_gpus_that_cannot_decode(label_set, photos, tmp_path, nvjpeg, monkeypatch):
    with pytest.raises(UsageError, match=r"decode_device='cuda:2': .*there are 2 GPUs.*decode in the workers"):
        loader_on_a_gpu(label_set, photos, tmp_path, decode_device="cuda:2")
    loader = loader_on_a_gpu(label_set, photos, tmp_path)

    def without(jpegs, mode, device):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr(torch.ops.image, "decode_jpegs_cuda", without)
    for begin in (lambda: next(iter(loader)), lambda: loader_on_a_gpu(label_set, photos, tmp_path)):
        with pytest.raises(UsageError, match="not compiled with nvJPEG support"):
            begin()


def test_decoding_has_a_stream_and_memory_of_its_own(label_set, photos, tmp_path, nvjpeg, monkeypatch):
    """torchvision writes into memory of the current stream without waiting for what is queued there."""
    log = []
    current = [StreamRecorder("the loop's", log)]

    @contextmanager
    def stream(entered):
        current.append(entered)
        yield
        current.pop()

    def decode(jpegs, mode, device):
        log.append(("decode", current[-1].name))
        return nvjpeg(jpegs, mode, device)

    monkeypatch.setattr(torch.ops.image, "decode_jpegs_cuda", decode)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: StreamRecorder("the loaders'", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: log.append(("kept for", stream.name, tuple(tensor.shape)))
    )
    replay = device_decode.replay_on_device
    monkeypatch.setattr(
        device_decode,
        "replay_on_device",
        lambda *args, **how: (log.append(("cut", current[-1].name)), replay(*args, **how))[1],
    )
    monkeypatch.setattr(device_decode, "CHUNK_PIXELS", 2 * 48 * 64)
    with open_fake_gpu():
        loader = loader_on_a_gpu(label_set, photos, tmp_path)
        log.clear()
        next(iter(loader))
    decoded_after_waiting = [("the loaders'", "synchronize"), ("decode", "the loaders'")]
    window = [
        *(2 * [*decoded_after_waiting, ("cut", "the loaders'")]),
        ("the loop's", "wait_stream", "the loaders'"),
        ("kept for", "the loop's", (8, 3, 32, 32)),
    ]
    assert log == [*decoded_after_waiting, *window], "a small JPEG is tried first"


def test_a_window_made_on_the_host_is_copied_without_waiting(label_set, photos, tmp_path, nvjpeg, monkeypatch):
    def refuse(jpegs, mode, device):
        if jpegs[0].numel() < 700:
            return nvjpeg(jpegs, mode, device)
        raise RuntimeError("Failed to decode jpeg stream: 4")

    def corrupt(data, max_pixels):
        raise ImageError("corrupt", "nothing but noise")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.ops.image, "decode_jpegs_cuda", refuse)
    monkeypatch.setattr(device_jpegs, "decode_rgb", corrupt)
    with open_fake_gpu() as gpu:
        gpu.pageable_bytes = 0
        assert all(images.device.type == "cuda" for images, _ in loader_on_a_gpu(label_set, photos, tmp_path))
    assert not gpu.waits


@pytest.mark.parametrize("after", [None, "CUDA error: an illegal memory access was encountered"])
def test_a_refused_jpeg_leaves_nothing_behind_on_the_gpu(label_set, photos, tmp_path, nvjpeg, monkeypatch, after):
    """Memory of a call that failed may still be written to: it is waited for before anything else uses it."""
    waited = []

    def refuse(jpegs, mode, device):
        if jpegs[0].numel() < 700:
            return nvjpeg(jpegs, mode, device)
        raise RuntimeError("Failed to decode jpeg stream: 4")

    def synchronize(device):
        waited.append(device)
        if after:
            raise RuntimeError(after)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.ops.image, "decode_jpegs_cuda", refuse)
    with open_fake_gpu() as gpu:
        gpu.pageable_bytes = 0
        loader = loader_on_a_gpu(label_set, photos, tmp_path)
        if after:
            with pytest.raises(LoaderError, match=r"cuda:0 failed while it decoded and cut images \(CUDA error"):
                list(loader)
        else:
            assert all(images.device.type == "cuda" for images, _ in loader)
            assert not gpu.waits
    assert waited and set(waited) == {torch.device("cuda", 0)}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_recorded_operations_are_replayed_there(operation):
    low, high = operation.values
    recorded = Operations(
        codes=np.array([[operation.code], [0], [operation.code]], np.uint8),
        values=np.array([[low], [0], [(low + 2 * high) // 3]], np.int16),
        erase=np.array([[0, 0, 0, 0], [100, 200, 30_000, 20_000], [0, 0, 65_535, 65_535]], np.uint16),
    )
    with open_fake_gpu() as gpu:
        gpu.pageable_bytes = 0
        images = torch.empty((3, 32, 32, 3), dtype=torch.uint8, device="cuda").permute(0, 3, 1, 2)
        apply_operations(images, recorded)
    assert not gpu.waits and gpu.kernels["index_put_"] == 1


def targets(rows=8, classes=10):
    prob = np.full((rows, 3), 0.25, np.float16)
    weight, floor = fd.targets.recover(prob, num_classes=classes)
    index = np.tile(np.arange(3), (rows, 1))
    return SoftTargets(
        index=torch.from_numpy(index),
        weight=torch.from_numpy(weight),
        floor=torch.from_numpy(floor),
        num_classes=classes,
    )


@pytest.mark.parametrize(
    "given",
    [
        (lambda it: it.cuda(0, non_blocking=True)),
        (lambda it: it.cuda(0, True)),
        (lambda it: it.cuda("cuda:0", non_blocking=True)),
        (lambda it: it.cuda(device=torch.device("cuda"), non_blocking=True)),
        (lambda it: it.cuda(None, True)),
        (lambda it: it.cuda(non_blocking=True)),
    ],
)
def test_targets_move_to_a_gpu_as_a_tensor_does(given):
    with open_fake_gpu() as gpu:
        moved = given(replace(targets(), hard=torch.zeros(8, dtype=torch.int64)))
        assert {each.device for each in (moved.index, moved.weight, moved.floor, moved.hard)} == {
            given(torch.zeros(1)).device
        }
        assert moved.index.dtype == moved.hard.dtype == torch.int64
    assert not gpu.waits


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_cuda_moves_to_no_other_device(device):
    with pytest.raises(UsageError, match=r"cuda moves targets to a GPU, got '(cpu|meta)'; to\("):
        targets().cuda(device)


def test_a_stream_is_recorded_on_all_tensors_of_targets(monkeypatch):
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append((tensor, stream)))
    soft = replace(targets(), hard=torch.zeros(8, dtype=torch.int64))
    soft.record_stream("the loop's")
    assert [stream for _, stream in recorded] == ["the loop's"] * 4
    assert {id(tensor) for tensor, _ in recorded} == set(map(id, (soft.index, soft.weight, soft.floor, soft.hard)))


MIXINGS = {
    "selfmix": (fd.SelfMix(prob=1.0, per="sample"), {"crops_per_image": 4}),
    "selfmix by mixup": (fd.SelfMix(prob=1.0, mode="mixup"), {"crops_per_image": 4}),
    "cutmix": (fd.CutMix(), {}),
    "cutmix by sample": (fd.CutMix(per="sample"), {}),
    "mixup": (fd.Mixup(), {}),
    "mixup by sample": (fd.Mixup(per="sample"), {}),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("name", MIXINGS)
def test_a_training_step(name, dtype):
    mix, options = MIXINGS[name]
    student = MODULES["resnet"]()
    with open_fake_gpu() as gpu:
        student = student.to("cuda")
        images = torch.empty((8, 32, 32, 3), dtype=dtype, device="cuda").permute(0, 3, 1, 2)
        gpu.waits.clear()
        on_gpu = targets().pin_memory().to("cuda", non_blocking=True)
        mixed, soft = mix(images, on_gpu, rng=np.random.default_rng(0), **options)
        assert mixed.device.type == soft.device.type == "cuda" and mixed.dtype == dtype
        with torch.autocast("cuda", torch.bfloat16):
            logits = student.requires_grad_(False)(fd.normalize(mixed) if dtype == torch.uint8 else mixed)
            loss = fd.soft_cross_entropy(logits, soft) + fd.kl_div(logits, soft, temperature=2.0)
        loss = loss + fd.soft_cross_entropy(logits, soft.dense())
        assert loss.device.type == fd.losses.entropy(soft).device.type == "cuda"
        # Autograd's own engine looks for the driver.
        saved = SimpleNamespace(saved_tensors=(logits, soft.index, soft.weight, soft.floor))
        with torch.no_grad():
            grad, *_ = fd.losses._SparseCrossEntropy.backward(saved, torch.ones(8, device="cuda"))
        assert grad.device.type == "cuda" and grad.dtype == logits.dtype
    assert not gpu.waits


def test_what_a_fake_gpu_finds():
    on_cpu = torch.zeros(3, 4)
    with open_fake_gpu() as gpu:
        there = torch.zeros(4, 3, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            there @ on_cpu
        with pytest.raises(Exception, match="local_scalar_dense"):
            float(there.sum())
        with pytest.raises(Exception, match="nonzero"):
            there[there > 0]
        there.cpu(), there.copy_(on_cpu.t()), on_cpu.to("cuda")
        assert Counter(gpu.waits) == {"_to_copy": 2, "copy_": 1}
        on_cpu.to("cuda", non_blocking=True)
        assert len(gpu.waits) == 3
        torch.zeros(2**17).pin_memory().to("cuda", non_blocking=True)
        there.copy_(on_cpu.t().pin_memory(), non_blocking=True)
        assert len(gpu.waits) == 3
        torch.zeros(2**17).to("cuda", non_blocking=True), upload(np.zeros(2**17), torch.device("cuda"))
        assert len(gpu.waits) == 4
