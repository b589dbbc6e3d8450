"""Decode on the training's device: workers read, check and label; the training process decodes and cuts.

The images of a window travel as one run of bytes with offsets. A JPEG travels as it is and is decoded there, all of a
window in one call. What a device's decoder may not take (other formats, CMYK, JPEGs that end too early) travels as the
pixels that the host's decoder made of it. Random draws are those of workers.

Legend: I images of a window, M crops per image, B crops of a batch, S output side.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from torch import Tensor

from ferkd_data.crops import Crops
from ferkd_data.errors import FerkdError, ImageError, UsageError
from ferkd_data.images.decode import ANY_SIZE, decode_rgb, jpeg_size
from ferkd_data.label_set.joined_images import Size, check_labelled_size, decode_checked, labelled_pixels, labelled_size
from ferkd_data.loader.batch_maker import BatchMaker, Labelled, Made, WindowMemory
from ferkd_data.loader.channel import anonymous_file, write_all
from ferkd_data.loader.clocks import added
from ferkd_data.loader.epochs import EpochSettings
from ferkd_data.loader.pool import Job, Pool, WindowTask, pickled, timed
from ferkd_data.loader.schedule import Window
from ferkd_data.replay import empty_batch, replay_on_device
from ferkd_data.targets import SoftTargets

JPEG_END = b"\xff\xd9"
RGB = 3
"""torchvision's number for this way to decode."""


class Encoded(NamedTuple):
    """A window as it leaves a worker."""

    data: Tensor | None
    """uint8: the images, one behind the other. From a worker they come in a file of their own."""
    bounds: npt.NDArray[np.int64]
    """(I + 1,) where in `data` each begins and the last ends."""
    sizes: npt.NDArray[np.int64]
    """(I, 2) height and width as labelled."""
    is_jpeg: npt.NDArray[np.bool_]
    """(I,) whether an image's bytes are a JPEG; the others are pixels already."""
    boxes: npt.NDArray[np.uint16]
    flip: npt.NDArray[np.bool_]
    operations: npt.NDArray[np.uint16]
    made: Made
    """Before mixing."""


@dataclass(eq=False, kw_only=True)
class EncodedJob(Job):
    """A window to read and label, whose images a worker sends back as they are."""

    window: Window
    settings: EpochSettings

    def task(self, worker: int) -> tuple[WindowTask, tuple[int, ...]]:
        return WindowTask(self.window, self.settings), ()


class DeviceWorkers:
    """The counterpart of `pool.Workers` that decodes and cuts on `device`, in the training process."""

    def __init__(self, maker: BatchMaker, device: torch.device, num_workers: int, prefetch_factor: int) -> None:
        self._maker, self._device = maker, device
        self._pool: Pool[EncodedJob] = Pool(
            lambda: pickled(EncodeHandler(maker.for_workers())), num_workers, prefetch_factor, drop=lambda job: None
        )

    def make(self, windows: Iterator[Window]) -> Iterator[tuple[Window, tuple[Tensor, ...], Made]]:
        """Yield the windows with their crops and targets, in order. Raises LoaderError as workers do."""
        jobs = (EncodedJob(window=window, settings=self._maker.epochs.at(window.epoch)) for window in windows)
        # This process makes windows itself until a worker is ready; its data needs no file.
        for job in self._pool.run(jobs, lambda job: _joined(*encode(self._maker, job.window))):
            encoded: Encoded = job.result
            encoded = encoded._replace(made=timed(job, encoded.made))
            if job.received:
                encoded = encoded._replace(data=_mapped(*job.received))
            try:
                images, made = self._cut(job.window, encoded)
            # Whoever keeps the error keeps this generator's frames, so the workers go now and not with them.
            except FerkdError:
                self.end()
                raise
            yield job.window, (images,), made

    def wait(self) -> None:
        """Wait until all workers are ready, as `Workers.wait` does."""
        self._pool.wait_for_workers()

    def end(self) -> None:
        """End the workers, as `Workers.end` does."""
        self._pool.end()

    def _cut(self, window: Window, encoded: Encoded) -> tuple[Tensor, Made]:
        """Decode, cut and mix. The clock has the time of this process alone, which a GPU may work on after."""
        decoded: list[Tensor] = []
        crops: list[Crops] = []
        slots: list[npt.NDArray[np.int64]] = []
        clock = self._maker.clock
        with clock.decode:
            found = list(self._decoded(encoded))
        for i, pixels in found:
            # The whole window anew, on the host: there `filled` decides between an error and another image.
            if isinstance(pixels, ImageError):
                return self._on_host(window)
            wanted = window.slots[i] >= 0
            decoded.append(pixels)
            drawn = Crops(boxes=encoded.boxes[i], flip=encoded.flip[i], operations=encoded.operations[i])
            crops.append(drawn[wanted])
            slots.append(window.slots[i][wanted])
        with clock.cut:
            images = self._placed(window, decoded, crops, slots)
        whole = encoded.made.targets(self._maker.labels.num_classes)
        bounds = np.cumsum([0, *window.batches]).tolist()
        targets = [whole[slice(a, b)] for a, b in itertools.pairwise(bounds)]
        made = self._maker.finish(window, images, targets, encoded.made.skipped)
        # What the worker knows of the window, and the time of both.
        return images, made._replace(
            num_discarded=encoded.made.num_discarded,
            spent=added(encoded.made.spent, clock.take()),
            by_worker=encoded.made.by_worker,
        )

    def _on_host(self, window: Window) -> tuple[Tensor, Made]:
        """Make the window on the host, where an image that cannot be decoded is an error or is replaced."""
        images = empty_batch(sum(window.batches), self._maker.epochs.at(window.epoch).size, shared=False)
        made = self._maker.make(WindowMemory(window, images))
        return images.to(self._device, non_blocking=True), made

    def _placed(
        self, window: Window, decoded: list[Tensor], crops: list[Crops], slots: list[npt.NDArray[np.int64]]
    ) -> Tensor:
        """Cut the window's crops, (count, 3, S, S), each into its slot, without waiting for the device's other work."""
        count, size = sum(window.batches), self._maker.epochs.at(window.epoch).size
        interpolation = self._maker.settings.interpolation
        order = np.concatenate(slots) if slots else np.empty(0, np.int64)
        cut = replay_on_device(decoded, crops, size=size, interpolation=interpolation) if decoded else None
        # Without spreading, crops come in the order of their slots: no second copy of the batch.
        if cut is not None and np.array_equal(order, np.arange(count)):
            return cut
        images = torch.empty((count, size, size, 3), dtype=torch.uint8, device=self._device).permute(0, 3, 1, 2)
        if cut is not None:
            images[torch.from_numpy(order).to(self._device, non_blocking=True)] = cut
        return images

    def _decoded(self, encoded: Encoded) -> Iterator[tuple[int, Tensor | ImageError]]:
        """Yield each image's number in the window and its pixels (3, H, W) on the device, or its error."""
        jpegs: dict[int, Tensor] = {}
        for i, (start_, stop) in enumerate(zip(encoded.bounds[:-1].tolist(), encoded.bounds[1:].tolist(), strict=True)):
            # A view: no image is copied before it goes to the device.
            data = encoded.data[start_:stop]  # type: ignore[index]
            if encoded.is_jpeg[i]:
                jpegs[i] = data
            else:
                pixels = data.view(*encoded.sizes[i].tolist(), 3)
                yield i, pixels.permute(2, 0, 1).to(self._device, non_blocking=True)
        pixel_limit = self._maker.labels.manifest.pixel_limit
        decoded = decode_jpegs(list(jpegs.values()), self._device, pixel_limit)
        for i, found in zip(jpegs, decoded, strict=True):
            yield i, found if isinstance(found, ImageError) else _of_size(found, encoded.sizes[i].tolist())


class EncodeHandler:
    """The work of a worker: read, check and label a window; the images travel back in a file."""

    def __init__(self, maker: BatchMaker) -> None:
        self.maker = maker

    def __call__(self, task: WindowTask, descriptors: list[int]) -> tuple[Encoded, list[int]]:
        self.maker.epochs.learn(task.window.epoch, task.settings)
        encoded, parts = encode(self.maker, task.window)
        with self.maker.clock.send:
            # A file, whose descriptor alone goes through the socket: images of a window have tens of megabytes.
            data = anonymous_file(0)
            for part in parts:
                write_all(data, part.data)
        made = encoded.made._replace(spent=added(encoded.made.spent, self.maker.clock.take()))
        return encoded._replace(made=made), [data]


def encode(maker: BatchMaker, window: Window) -> tuple[Encoded, list[npt.NDArray[np.uint8]]]:
    """Read a window: everything but its images' data, and the data as an array for each image.

    Raises LoaderError as `BatchMaker.filled` does.
    """
    count, pixel_limit = len(window.positions), maker.labels.manifest.pixel_limit
    parts, sizes, is_jpeg = [np.empty(0, np.uint8)] * count, np.zeros((count, 2), np.int64), np.zeros(count, np.bool_)

    def read(labelled: Labelled, i: int) -> None:
        record = labelled.records[i]
        data = maker.read(int(labelled.rows[i]), record)
        size = labelled_size(record)
        sizes[i] = size
        with maker.clock.decode:
            is_jpeg[i] = _is_plain_jpeg(data, size, pixel_limit)
            parts[i] = (
                np.frombuffer(data, np.uint8) if is_jpeg[i] else decode_checked(data, size, pixel_limit).reshape(-1)
            )

    labelled, skipped = maker.filled(window, read)
    encoded = Encoded(
        data=None,
        bounds=np.cumsum([0, *map(len, parts)]),
        sizes=sizes,
        is_jpeg=is_jpeg,
        boxes=labelled.drawn.boxes,
        flip=labelled.drawn.flip,
        operations=labelled.drawn.operations,
        made=Made.of(SoftTargets.cat(labelled.targets), window, skipped)._replace(
            num_discarded=labelled.num_discarded(window), spent=maker.clock.take()
        ),
    )
    return encoded, parts


def _joined(encoded: Encoded, parts: list[npt.NDArray[np.uint8]]) -> Encoded:
    return encoded._replace(data=torch.from_numpy(np.concatenate(parts)))


def _mapped(descriptor: int) -> Tensor:
    """Map the content of a worker's file, and close its descriptor."""
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.from_file(f"/dev/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8, device="cpu")
    finally:
        os.close(descriptor)


def _is_plain_jpeg(data: bytes, labelled: Size, pixel_limit: int) -> bool:
    """Return whether a device's decoder may take the image.

    Nothing is decoded: the size is that of the header. Raises ImageError where it is not the labelled one, or above
    `pixel_limit`.
    """
    # Only for its check against the limit.
    labelled_pixels(labelled, pixel_limit)
    # A JPEG without its end marker was cut short. The host's decoder says so, where a device's may fill up with grey.
    size = jpeg_size(data, ANY_SIZE) if data.endswith(JPEG_END) else None
    if size is None:
        return False
    check_labelled_size(size, labelled)
    return True


def _of_size(pixels: Tensor, size: list[int]) -> Tensor | ImageError:
    """Return the pixels, or an error where the device took another header than the host; a JPEG may have several."""
    height, width = size
    if pixels.shape[1:] == (height, width):
        return pixels
    return ImageError("corrupt", f"the device decodes {tuple(pixels.shape[1:])} pixels, its header has {height, width}")


def decode_jpegs(jpegs: list[Tensor], device: torch.device, pixel_limit: int) -> Sequence[Tensor | ImageError]:
    """Decode JPEGs to (3, H, W) each, in one call; the host's decoder tries what the device's refuses.

    An image of more than `pixel_limit` pixels is an ImageError there.
    """
    try:
        # In one call, which a GPU decodes together. It fails as a whole where one image does, so each is then tried
        # alone.
        return _decode(jpegs, device)
    except RuntimeError:
        return [_decode_one(jpeg, device, pixel_limit) for jpeg in jpegs]


def _decode_one(jpeg: Tensor, device: torch.device, pixel_limit: int) -> Tensor | ImageError:
    try:
        return _decode([jpeg], device)[0]
    except RuntimeError:
        try:
            pixels = decode_rgb(jpeg.numpy().tobytes(), max_pixels=pixel_limit)
        except ImageError as error:
            return error
        return torch.from_numpy(pixels).permute(2, 0, 1).to(device, non_blocking=True)


def _decode(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    import torchvision.io  # noqa: F401

    # The operators behind its decode_jpeg, which warns of its successor (TorchCodec) at every call.
    if device.type == "cuda":
        return list(torch.ops.image.decode_jpegs_cuda(jpegs, RGB, device)) if jpegs else []
    # False: the EXIF orientation is ignored, as the format wants it.
    return [torch.ops.image.decode_jpeg(jpeg, RGB, False) for jpeg in jpegs]


def open_device(device: str | torch.device) -> torch.device:
    """Open a device and decode a JPEG on it. Raises UsageError where it cannot."""
    try:
        opened = torch.device(device)
        if opened.type not in ("cpu", "cuda"):
            raise UsageError(f"decode_device is cuda or cpu, got {str(device)!r}")
        # Tried, not looked up: wheels of torchvision are built with and without nvJPEG.
        jpeg = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)), np.uint8)
        _decode([torch.from_numpy(jpeg.copy())], opened)
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise UsageError(
            f"decode_device={str(device)!r}: torchvision cannot decode JPEGs there "
            f"({str(error).splitlines()[0]}); leave it out to decode in the workers"
        ) from error
    return opened
