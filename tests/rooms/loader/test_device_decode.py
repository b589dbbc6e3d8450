"""Decoding in the training process: on a CPU here, on a GPU where there is one."""

from __future__ import annotations

import io
import shutil
import weakref

import numpy as np
import pytest
import torch
from label_sets import SMALL
from PIL import Image

import ferkd_data as fd
from ferkd_data.errors import LoaderError, UsageError
from ferkd_data.images import decode_rgb
from ferkd_data.loader import device_decode, device_jpegs
from ferkd_data.loader.device_jpegs import DeviceDecoder, Jpeg

CPU = torch.device("cpu")
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
CUT_LEVELS = 2
"""By which the cut on a device may differ from the workers'."""
DECODER_MEAN = 8.0
"""Levels by which a device's decoder may differ from the workers' in the mean over an image. On the tests' photos,
libjpeg-turbo without its smooth enlarging of chroma differs by 5 from itself with it, and swapped channels by 40 to 60.
"""


@pytest.fixture
def make(label_set, photos, tmp_path):
    def make_(labels=label_set, **changes):
        settings = {"batch_size": 8, "crops_per_image": 2, "size": 32, "cache_dir": tmp_path / "cache"}
        settings |= {"images": photos, "calibration": "fkd"}
        return fd.CropLoader(fd.open_labels(labels), **(settings | changes))

    return make_


def contents(loader):
    return [(images.cpu().clone(), targets.dense()) for images, targets in loader]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(t, u) for (x, t), (y, u) in zip(a, b, strict=True)
    )


def decoder_levels(folder, device):
    """Return by how much a device's decoder differs from the workers', at most, over the JPEGs of a folder.

    Decoders enlarge chroma differently, so that single pixels may differ widely: what is wrong shows in the mean.
    """
    worst = 0
    for path in folder.rglob("*.jpg"):
        data = path.read_bytes()
        theirs = torch.from_numpy(decode_rgb(data)).permute(2, 0, 1)
        jpeg = Jpeg(0, torch.from_numpy(np.frombuffer(data, np.uint8).copy()), (theirs.shape[1], theirs.shape[2]))
        (ours,) = DeviceDecoder(device, 10**8).decode([jpeg])
        difference = (ours.cpu().int() - theirs.int()).abs()
        assert difference.float().mean() <= DECODER_MEAN, path
        worst = max(worst, int(difference.max()))
    return worst


SETTINGS = {
    "plain": {},
    "cutmix": {"selfmix": fd.SelfMix(prob=0.7, per="sample")},
    "mixup": {"selfmix": fd.SelfMix(prob=1.0, mode="mixup"), "calibration": "ferkd"},
    "spread": {"spread": 3},
    "short last batch": {"drop_last": False, "batch_size": 12},
    "bicubic, one crop": {"interpolation": "bicubic", "crops_per_image": 1},
    "ranks": {"rank": 1, "world_size": 2, "batch_size": 4},
}


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_batches_are_those_of_the_workers(make, photos, device, name):
    allowed = CUT_LEVELS + decoder_levels(photos, torch.device(device))
    if device == "cpu":
        assert allowed == CUT_LEVELS
    ours, theirs = make(decode_device=device, **SETTINGS[name]), make(**SETTINGS[name])
    for epoch in (0, 1):
        for loader in (ours, theirs):
            loader.set_epoch(epoch)
        for (images, targets), (expected, expected_targets) in zip(ours, theirs, strict=True):
            assert images.device.type == device and images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(targets.dense(), expected_targets.dense())
            assert (images.cpu().int() - expected.int()).abs().max() <= allowed


@pytest.mark.parametrize(
    "wrong", [lambda pixels: pixels.flip(0), lambda pixels: pixels.flip(2), lambda pixels: pixels.roll(8, dims=1)]
)
def test_a_device_whose_decoder_is_wrong_is_not_allowed_for(photos, monkeypatch, wrong):
    decode = DeviceDecoder.decode
    monkeypatch.setattr(DeviceDecoder, "decode", lambda self, jpegs: [wrong(each) for each in decode(self, jpegs)])
    with pytest.raises(AssertionError, match="jpg"):
        decoder_levels(photos, CPU)


UNDER_AUTOCAST = {"workers": {}, "workers, mixup": SETTINGS["mixup"]} | {
    f"device, {name}": {"decode_device": "cpu", **SETTINGS[name]} for name in ("plain", "mixup", "bicubic, one crop")
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_autocast_around_the_loop_changes_nothing(make, name, dtype):
    whole = contents(make(**UNDER_AUTOCAST[name]))
    with torch.autocast("cpu", dtype):
        assert same(contents(make(**UNDER_AUTOCAST[name])), whole)
        # Nor does the loader change what autocast does to the loop.
        next(iter(make(**UNDER_AUTOCAST[name])))
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize("name", ["mixup", "spread"])
def test_it_resumes_after_every_batch(make, name):
    whole = contents(make(decode_device="cpu", **SETTINGS[name]))
    for stop in range(1, len(whole)):
        first, second = (make(decode_device="cpu", **SETTINGS[name]) for _ in range(2))
        stream = iter(first)
        for _ in range(stop):
            next(stream)
        second.load_state_dict(first.state_dict())
        assert same(contents(second), whole[stop:])


def test_workers_change_nothing_and_an_epoch_left_early_leaves_nothing_behind(make):
    loader = make(decode_device="cpu", num_workers=2, **SETTINGS["mixup"])
    whole = contents(make(decode_device="cpu", **SETTINGS["mixup"]))
    assert same(contents(loader), whole)
    loader.set_epoch(0)
    next(iter(loader))
    loader.set_epoch(1)
    loader.set_epoch(0)
    assert same(contents(loader), whole)


def test_an_image_that_cannot_be_used(make, photos, tmp_path):
    images = shutil.copytree(photos, tmp_path / "photos")
    path = images / "class3/photo0013.jpg"
    path.write_bytes(path.read_bytes()[:300])
    common = {"images": images, "decode_device": "cpu"}
    for verify, num_workers, message in (("first_epoch", 1, "digest differs"), ("never", 0, "truncated")):
        with pytest.raises(LoaderError, match=rf"^image 'class3/photo0013' \(shard 0 .*{message}"):
            list(make(verify_images=verify, num_workers=num_workers, **common))
    Image.new("RGB", (30, 20)).save(path)
    with pytest.raises(LoaderError, match="30x20 pixels, 64x48 were labelled"):
        list(make(verify_images="never", **common))
    whole_looking = damaged_in_the_middle(photos / "class3/photo0013.jpg")
    for damage in (lambda: None, path.unlink, lambda: path.write_bytes(whole_looking)):
        damage()
        common = {"images": images, "on_error": "skip", "verify_images": "never"}
        expected, loader = make(**common), make(decode_device="cpu", **common)
        with pytest.warns(UserWarning, match=r"'class3/photo0013'.* left out"):
            pairs = list(zip(contents(loader), contents(expected), strict=True))
        assert len(pairs) == 5 and loader.skipped == expected.skipped == 1
        for (cut, targets), (expected_cut, expected_targets) in pairs:
            assert torch.equal(targets, expected_targets)
            assert (cut.int() - expected_cut.int()).abs().max() <= CUT_LEVELS


def damaged_in_the_middle(path):
    """A JPEG that shows its size and its end, without the tables that decoding needs."""
    data = path.read_bytes()
    return data[: data.index(b"\xff\xdb")] + data[data.index(b"\xff\xc0") : data.index(b"\xff\xc4")] + b"\xff\xd9"


@pytest.fixture
def odd_photos(make_photos, tiny_teachers, tmp_path):
    """A PNG, a CMYK JPEG, a grey one and a progressive one among plain ones, and their label set."""
    folder = make_photos(tmp_path / "odd", 8, classes=2)
    paths = sorted(folder.rglob("*.jpg"))
    pictures = [Image.open(io.BytesIO(path.read_bytes())) for path in paths]
    paths[0].unlink()
    pictures[0].save(paths[0].with_suffix(".png"))
    pictures[1].convert("CMYK").save(paths[1])
    pictures[2].convert("L").save(paths[2])
    pictures[3].save(paths[3], progressive=True)
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"class{number}\n" for number in range(10)))
    fd.build(folder, tmp_path / "labels", teachers=[tiny_teachers], classes=classes, **SMALL)
    return folder, tmp_path / "labels"


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_what_the_device_cannot_decode_the_host_does(make, odd_photos, device):
    folder, labels = odd_photos
    allowed = CUT_LEVELS + decoder_levels(folder, torch.device(device))
    for (images, targets), (expected, expected_targets) in zip(
        make(labels, images=folder, decode_device=device), make(labels, images=folder), strict=True
    ):
        assert torch.equal(targets.dense(), expected_targets.dense())
        assert (images.cpu().int() - expected.int()).abs().max() <= allowed


def test_what_the_device_refuses_the_host_decodes_and_tries_once(make, monkeypatch):
    whole = contents(make(decode_device="cpu"))
    decode, asked, refused = device_jpegs.decode, [], set()

    def moody(jpegs, device):
        asked.append(len(jpegs))
        bad = [jpeg for jpeg in jpegs if jpeg.sum() % 5 == 0]
        refused.update(bytes(jpeg.tolist()) for jpeg in bad)
        if bad:
            raise RuntimeError("no such luck")
        return decode(jpegs, device)

    loader = make(decode_device="cpu")
    monkeypatch.setattr(device_jpegs, "decode", moody)
    assert same(contents(loader), whole)
    assert refused and len(asked) > 6, "5 windows of 4 images, in halves where one of them is refused"
    asked.clear()
    contents(loader)
    assert len(asked) <= 6, "nothing is tried again in the next epoch"


@pytest.mark.parametrize("bad", [[], [0], [6], [2, 3], list(range(8))])
def test_a_refused_jpeg_is_found_in_few_calls(photos, monkeypatch, bad):
    data = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))[:8]]
    jpegs = [Jpeg(row, torch.frombuffer(bytearray(one), dtype=torch.uint8), (48, 64)) for row, one in enumerate(data)]
    decoder, decode, asked = DeviceDecoder(CPU, 10**8), device_jpegs.decode, []
    expected = decode([jpeg.data for jpeg in jpegs], CPU)

    def moody(given, device):
        asked.append(len(given))
        if any(jpegs[row].data.equal(one) for row in bad for one in given):
            raise RuntimeError("Failed to decode batch: 4")
        return decode(given, device)

    monkeypatch.setattr(device_jpegs, "decode", moody)
    for calls in (1 + 6 * len(bad) if len(bad) < 8 else 15, 1 if len(bad) < 8 else 0):
        asked.clear()
        assert all(map(torch.equal, decoder.decode(jpegs), expected))
        assert len(asked) <= calls
    monkeypatch.setattr(device_jpegs, "MAX_REFUSED", 0)
    forgetful = DeviceDecoder(CPU, 10**8)
    forgetful.decode(jpegs)
    assert not forgetful._refused


OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 34.00 MiB."),
    RuntimeError("decode_jpegs_cuda, decode_jpegs_cuda.cpp:140, Error while decoding JPEG images: CUDA out of memory."),
    RuntimeError("Error while decoding JPEG images: Failed to decode batch: 5"),
]
FAILED = [
    RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"),
    RuntimeError("Error while decoding JPEG images: Failed to synchronize CUDA stream: 700"),
]


@pytest.mark.parametrize(
    ("error", "message"),
    [(error, "cpu has too little memory .* smaller batch_size or spread") for error in OUT_OF_MEMORY]
    + [(error, r"cpu failed while it decoded and cut images \(.*resume there") for error in FAILED],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_device_that_fails_is_no_damaged_image(make, monkeypatch, error, message, on_error):
    def failing(jpegs, device):
        calls.append(len(jpegs))
        raise error

    loader, calls = make(decode_device="cpu", on_error=on_error), []
    monkeypatch.setattr(device_jpegs, "decode", failing)
    with pytest.raises(LoaderError, match=message):
        list(loader)
    assert calls == [4], "tried once, and never as a single image"


def test_a_device_that_fails_while_it_cuts_is_named_too(make, monkeypatch):
    def failing(*arguments, **settings):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    loader = make(decode_device="cpu")
    monkeypatch.setattr(device_decode, "replay_on_device", failing)
    with pytest.raises(LoaderError, match=r"cpu has too little memory for the images .* smaller batch_size"):
        list(loader)


def test_a_jpeg_that_the_device_calls_unsupported_is_no_failure_of_the_device(make, monkeypatch):
    def failing(jpegs, device):
        raise RuntimeError("Error while decoding JPEG images: Failed to parse jpeg stream: 3")

    whole = contents(make(decode_device="cpu"))
    loader = make(decode_device="cpu")
    monkeypatch.setattr(device_jpegs, "decode", failing)
    assert same(contents(loader), whole)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("budget", [1, 2 * 48 * 64])
def test_images_lie_decoded_in_small_parts(make, monkeypatch, name, budget):
    whole = contents(make(decode_device="cpu", **SETTINGS[name]))
    decode, alive, most = device_jpegs.decode, weakref.WeakSet(), []

    def counted(jpegs, device):
        pixels = decode(jpegs, device)
        alive.update(pixels)
        most.append(len(alive))
        return pixels

    loader = make(decode_device="cpu", **SETTINGS[name])
    monkeypatch.setattr(device_jpegs, "decode", counted)
    monkeypatch.setattr(device_decode, "CHUNK_PIXELS", budget)
    assert same(contents(loader), whole)
    assert max(most) == (1 if budget == 1 else 2)


def test_what_neither_decodes_is_an_error_that_names_the_image(make, monkeypatch):
    def never(*ignored, **also):
        raise RuntimeError("no")

    def corrupt(*ignored, **also):
        raise fd.errors.ImageError("corrupt", "nothing but noise")

    strict, lenient = make(decode_device="cpu"), make(decode_device="cpu", on_error="skip")
    monkeypatch.setattr(device_jpegs, "decode", never)
    monkeypatch.setattr(device_jpegs, "decode_rgb", corrupt)
    monkeypatch.setattr("ferkd_data.label_set.joined_images.decode_rgb", corrupt)
    with pytest.raises(LoaderError, match=r"image 'class\d/photo\d+' \(shard .*nothing but noise"):
        list(strict)
    with pytest.raises(LoaderError, match=r"20 images in a row cannot be used; the last is image .*nothing but noise"):
        list(lenient)


def test_devices_that_cannot_decode(make):
    with pytest.raises(UsageError, match="decode_device is cuda or cpu, got 'meta'"):
        make(decode_device="meta")
    with pytest.raises(UsageError, match="decode_device='nonsense': torchvision cannot decode JPEGs there"):
        make(decode_device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="leave it out to decode in the workers"):
            make(decode_device="cuda")
