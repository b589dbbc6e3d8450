"""Decode JPEGs on a device with torchvision, on a GPU with nvJPEG; the host decodes what the device refuses.

On a GPU, decoding and cutting have a stream of their own, and with it memory of their own. torchvision writes the
pixels from a third stream, into memory that PyTorch gives to the current one: memory that the training freed may still
be read by kernels that the training has queued, and pixels would be written over it (pytorch/vision#9606). On a stream
of its own, a loader waits for its own work alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, NoReturn

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from ferkd_data.errors import ImageError, LoaderError, UsageError
from ferkd_data.images.decode import decode_rgb
from ferkd_data.label_set.joined_images import Size
from ferkd_data.teachers.teacher import first_line, is_device_failure, is_out_of_memory
from ferkd_data.upload import upload

RGB = 3
"""torchvision's number for this way to decode."""
MAX_REFUSED = 100_000
"""Images remembered as refused by the device: 8 MB. Any further ones are tried in each epoch."""
NVJPEG_NO_MEMORY = re.compile(r"Failed to [a-z ]+: 5\b")
"""torchvision's words for NVJPEG_STATUS_ALLOCATOR_FAILURE."""
NVJPEG_FAILED = "Failed to synchronize CUDA stream"
"""torchvision's words for a device that failed."""


class Jpeg(NamedTuple):
    """An image to decode."""

    row: int
    """Its number in the label set."""
    data: Tensor
    """uint8 (bytes of the file,), on the CPU."""
    size: Size
    """As labelled."""


class DeviceDecoder:
    """Decodes on one device, and remembers which images its decoder refuses. Used by one thread at a time.

    Raises UsageError where torchvision cannot decode there.
    """

    def __init__(self, device: torch.device, pixel_limit: int) -> None:
        self.device, self._pixel_limit = device, pixel_limit
        self._refused: set[int] = set()
        # Tried, not looked up: whether a GPU's driver and nvJPEG go together shows only so.
        try:
            if device.type == "cuda":
                decode([_small_jpeg()], device)
        except (RuntimeError, AttributeError, AssertionError) as error:
            raise cannot_decode(device, error) from error

    def decode(self, jpegs: Sequence[Jpeg]) -> list[Tensor | ImageError]:
        """Decode to uint8 (3, H, W) each, or an error where neither the device nor the host can.

        Raises LoaderError where the device fails, or has too little memory.
        """
        taken = [jpeg for jpeg in jpegs if jpeg.row not in self._refused]
        decoded = dict(zip((id(jpeg) for jpeg in taken), self._tried(taken), strict=True))
        return [decoded[id(jpeg)] if id(jpeg) in decoded else self._on_host(jpeg) for jpeg in jpegs]

    def _tried(self, jpegs: Sequence[Jpeg]) -> list[Tensor | ImageError]:
        """Decode in one call, which a GPU does together. It fails as a whole where one image does; then in halves."""
        if not jpegs:
            return []
        try:
            pixels = decode([jpeg.data for jpeg in jpegs], self.device)
        except RuntimeError as error:
            check_device(error, self.device)
        else:
            # A crafted JPEG may have several headers, of which the device takes another one than the host.
            return [
                found if found.shape[1:] == jpeg.size else self._refuse(jpeg)
                for found, jpeg in zip(pixels, jpegs, strict=True)
            ]
        middle = len(jpegs) // 2
        return [*self._tried(jpegs[:middle]), *self._tried(jpegs[middle:])] if middle else [self._refuse(jpegs[0])]

    def _refuse(self, jpeg: Jpeg) -> Tensor | ImageError:
        # Remembered: otherwise its whole window would be decoded in halves again in every epoch.
        if len(self._refused) < MAX_REFUSED:
            self._refused.add(jpeg.row)
        return self._on_host(jpeg)

    def _on_host(self, jpeg: Jpeg) -> Tensor | ImageError:
        try:
            pixels = decode_rgb(jpeg.data.numpy().tobytes(), max_pixels=self._pixel_limit)
        except ImageError as error:
            return error
        if pixels.shape[:2] != jpeg.size:
            return ImageError("corrupt", f"it decodes to {pixels.shape[:2]} pixels, its header has {jpeg.size}")
        return upload(pixels, self.device).permute(2, 0, 1)


def check_device(error: RuntimeError, device: torch.device) -> None:
    """Raise LoaderError for an error that concerns the device and not an image: trying again would hide it."""
    if is_out_of_memory(error) or NVJPEG_NO_MEMORY.search(str(error)):
        raise LoaderError(
            f"{device} has too little memory for the images of a window ({first_line(error)}); use a smaller "
            "batch_size or spread, or leave out decode_device"
        ) from error
    if is_device_failure(error) or NVJPEG_FAILED in str(error):
        _failed(error, device)
    if device.type == "cuda":
        # torchvision has freed the memory that its stream may still write to.
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as failure:
            _failed(failure, device)


def _failed(error: RuntimeError, device: torch.device) -> NoReturn:
    raise LoaderError(
        f"{device} failed while it decoded and cut images ({first_line(error)}); a GPU that has failed works again in "
        "a new process: resume there from the last checkpoint"
    ) from error


def decode(jpegs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Decode JPEGs (bytes,) to uint8 (3, H, W) on a device. Raises RuntimeError where one of them cannot be decoded."""
    import torchvision.io  # noqa: F401

    # The operators behind its decode_jpeg, which warns of its successor (TorchCodec) at every call.
    if device.type != "cuda":
        # False: the EXIF orientation is ignored, as the format wants it.
        return [torch.ops.image.decode_jpeg(jpeg, RGB, False) for jpeg in jpegs]
    with own_stream(device):
        # What is allocated for the pixels may be memory that this stream's queued kernels still read, and torchvision
        # does not wait for them. Only what a loader has cut before is queued here, nothing of the training.
        torch.cuda.current_stream(device).synchronize()
        return list(torch.ops.image.decode_jpegs_cuda(list(jpegs), RGB, device))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Make the stream of all loaders of this process on a GPU: every stream has memory of its own."""
    # Of high priority: the host waits for this work, which is short, and would wait for the training's long kernels.
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Queue what is in the block on the loaders' stream. `hand_over` is for what leaves the block."""
    return torch.cuda.stream(_stream(device)) if device.type == "cuda" else nullcontext()


def hand_over(images: Tensor) -> Tensor:
    """Let the current stream use images that were made on the loaders' stream; the host does not wait."""
    if images.device.type == "cuda":
        user = torch.cuda.current_stream(images.device)
        user.wait_stream(_stream(images.device))
        # The allocator gives this memory to the loaders' stream again only when the user's stream is done with it.
        images.record_stream(user)
    return images


def open_decoder(device: torch.device) -> None:
    """Raise RuntimeError where no JPEG can be decoded on this kind of device. Makes no context on a GPU.

    A loader may be made before its rank has chosen its GPU, and a context on the first one would cost memory there.
    """
    if device.type != "cuda":
        decode([_small_jpeg()], device)
        return
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs")
    import torchvision.io  # noqa: F401

    try:
        # Wheels of torchvision are built with and without nvJPEG. Those without say so whatever the device; the others
        # refuse this one before they use any.
        torch.ops.image.decode_jpegs_cuda([_small_jpeg()], RGB, torch.device("cpu"))
    except RuntimeError as error:
        if "not compiled" in str(error):
            raise


def present_device(device: torch.device) -> torch.device:
    """Return the GPU that "cuda" stands for now, in this process; any other device as it is."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def cannot_decode(device: str | torch.device, error: Exception) -> UsageError:
    return UsageError(
        f"decode_device={str(device)!r}: torchvision cannot decode JPEGs there ({first_line(error)}); leave it out to "
        "decode in the workers"
    )


def _small_jpeg() -> Tensor:
    jpeg = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)), np.uint8)
    return torch.from_numpy(jpeg.copy())
