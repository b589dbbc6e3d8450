"""Decode on the training's device: workers read, check and label; the training process decodes and cuts.

The images of a window travel as one run of bytes with offsets. A JPEG travels as it is and is decoded there, many of a
window in one call (`device_jpegs.py`). What a device's decoder may not take (other formats, CMYK, JPEGs that end too
early) travels as the pixels that the host's decoder made of it. Random draws are those of workers.

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
import torch
from torch import Tensor

from ferkd_data.crops import Crops
from ferkd_data.errors import FerkdError, ImageError, UsageError
from ferkd_data.images.decode import ANY_SIZE, jpeg_size
from ferkd_data.label_set.joined_images import Size, check_labelled_size, decode_checked, labelled_pixels, labelled_size
from ferkd_data.loader.batch_maker import BatchMaker, Labelled, Made
from ferkd_data.loader.channel import anonymous_file, write_all
from ferkd_data.loader.clocks import added
from ferkd_data.loader.device_jpegs import (
    DeviceDecoder,
    Jpeg,
    cannot_decode,
    check_device,
    hand_over,
    open_decoder,
    own_stream,
    present_device,
)
from ferkd_data.loader.epochs import EpochSettings
from ferkd_data.loader.pool import Job, Pool
from ferkd_data.loader.schedule import Window
from ferkd_data.loader.workers import WindowTask, pickled, timed
from ferkd_data.replay import empty_batch, replay_on_device
from ferkd_data.storage import refuse_too_many_files, too_many_open_files
from ferkd_data.targets import SoftTargets
from ferkd_data.upload import upload

JPEG_END = b"\xff\xd9"
CHUNK_PIXELS = 2**27
"""Pixels of decoded images that lie on the device at a time: 400 MB."""
SENT_IMAGES = "images that a worker sent"
"""What the file is called in errors; it has no name."""


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
    rows: npt.NDArray[np.int64]
    """(I,) the images' rows in the label set."""
    boxes: npt.NDArray[np.uint16]
    flip: npt.NDArray[np.bool_]
    operations: npt.NDArray[np.uint16]
    made: Made
    """Before mixing."""

    def crops(self, i: int) -> Crops:
        """Return the crops drawn of image i, as labelled."""
        return Crops(boxes=self.boxes[i], flip=self.flip[i], operations=self.operations[i])


@dataclass(eq=False, kw_only=True)
class EncodedJob(Job):
    """A window to read and label, whose images a worker sends back as they are."""

    window: Window
    settings: EpochSettings

    def task(self, worker: int) -> tuple[WindowTask, tuple[int, ...]]:
        return WindowTask(self.window, self.settings), ()


class DeviceWorkers:
    """The counterpart of `workers.Workers` that decodes and cuts on `device`, in the training process."""

    def __init__(self, maker: BatchMaker, device: torch.device, num_workers: int, prefetch_factor: int) -> None:
        self._maker, self._wanted = maker, device
        self._opened: DeviceDecoder | None = None
        self._pool: Pool[EncodedJob] = Pool(
            lambda: pickled(EncodeHandler(maker.for_workers())), num_workers, prefetch_factor, drop=lambda job: None
        )

    def make(self, windows: Iterator[Window]) -> Iterator[tuple[Window, tuple[Tensor, ...], Made]]:
        """Yield the windows with their crops and targets, in order. Raises LoaderError as workers do.

        Raises UsageError where JPEGs cannot be decoded on the device.
        """
        # Now, and not where the loader was made: ranks choose their GPU after that, too.
        device = present_device(self._wanted)
        if self._opened is None or self._opened.device != device:
            self._opened = DeviceDecoder(device, self._maker.labels.manifest.pixel_limit)
        jobs = (EncodedJob(window=window, settings=self._maker.epochs.at(window.epoch)) for window in windows)
        # This process makes windows itself until a worker is ready; its data needs no file.
        for job in self._pool.run(jobs, lambda job: _joined(*encode(self._maker, job.window))):
            encoded: Encoded = job.result
            encoded = encoded._replace(made=timed(job, encoded.made))
            try:
                if job.by_worker:
                    encoded = encoded._replace(data=_mapped(job.received))
                images, made = self._cut(job.window, encoded)
            # Whoever keeps the error keeps this generator's frames, so the workers go now and not with them.
            except FerkdError:
                self.end()
                raise
            except RuntimeError as error:
                self.end()
                check_device(error, device)
                raise
            yield job.window, (images,), made

    def wait(self) -> None:
        """Wait until all workers are ready, as `Workers.wait` does."""
        self._pool.wait_for_workers()

    def end(self) -> None:
        """Let the processes go now: whoever keeps an error keeps its frames, and with them all that is used there."""
        self._pool.end()

    @property
    def _decoder(self) -> DeviceDecoder:
        assert self._opened is not None, "make opens it"
        return self._opened

    @property
    def _device(self) -> torch.device:
        return self._decoder.device

    def _cut(self, window: Window, encoded: Encoded) -> tuple[Tensor, Made]:
        """Decode, cut and mix. The clock has the time of this process alone, which a GPU may work on after."""
        with own_stream(self._device):
            crops = self._crops(window, encoded)
        # The whole window anew, on the host: there `filled` decides between an error and another image.
        if crops is None:
            return self._on_host(window)
        images = hand_over(crops)
        whole = encoded.made.targets(self._maker.labels.num_classes)
        bounds = np.cumsum([0, *window.batches]).tolist()
        targets = [whole[slice(a, b)] for a, b in itertools.pairwise(bounds)]
        made = self._maker.finish(window, images, targets, encoded.made.skipped)
        # What the worker knows of the window, and the time of both.
        return images, made._replace(
            num_discarded=encoded.made.num_discarded,
            spent=added(encoded.made.spent, self._maker.clock.take()),
            by_worker=encoded.made.by_worker,
        )

    def _on_host(self, window: Window) -> tuple[Tensor, Made]:
        """Make the window on the host, where an image that cannot be decoded is an error or is replaced."""
        images = empty_batch(sum(window.batches), self._maker.epochs.at(window.epoch).size, shared=False)
        made = self._maker.make(window, images)
        return upload(images, self._device), made

    def _crops(self, window: Window, encoded: Encoded) -> Tensor | None:
        """Cut the window's crops, uint8 (count, 3, S, S), in the order of their slots; None where an image is damaged.

        Decoded images take at most CHUNK_PIXELS at a time, whatever their number.
        """
        clock, size = self._maker.clock, self._maker.epochs.at(window.epoch).size
        interpolation = self._maker.settings.interpolation
        cut: list[Tensor] = []
        for chunk in in_chunks(encoded.sizes.prod(axis=1).tolist(), CHUNK_PIXELS):
            with clock.decode:
                pixels = self._decoded(encoded, chunk)
            decoded = [found for found in pixels if not isinstance(found, ImageError)]
            if len(decoded) < len(pixels):
                return None
            crops = [encoded.crops(i)[window.slots[i] >= 0] for i in chunk]
            with clock.cut:
                cut.append(replay_on_device(decoded, crops, size=size, interpolation=interpolation))
            # Before the next chunk is decoded, so that it gets this one's memory.
            del pixels, decoded
        with clock.cut:
            return self._placed(cut, window.slots[window.slots >= 0])

    def _placed(self, cut: list[Tensor], slots: npt.NDArray[np.int64]) -> Tensor:
        """Join crops and put each into its slot."""
        crops = cut[0] if len(cut) == 1 else torch.cat(cut)
        # Without spreading, crops come in the order of their slots: no second copy of the batch.
        if np.array_equal(slots, np.arange(len(slots))):
            return crops
        images = torch.empty_like(crops)
        images[upload(slots, self._device)] = crops
        return images

    def _decoded(self, encoded: Encoded, chunk: range) -> list[Tensor | ImageError]:
        """Return each image's pixels (3, H, W) on the device, or its error."""
        found: dict[int, Tensor | ImageError] = {}
        jpegs: dict[int, Jpeg] = {}
        for i in chunk:
            # A view: no image is copied before it goes to the device.
            data = encoded.data[encoded.bounds[i] : encoded.bounds[i + 1]]  # type: ignore[index]
            height, width = encoded.sizes[i].tolist()
            if encoded.is_jpeg[i]:
                jpegs[i] = Jpeg(int(encoded.rows[i]), data, (height, width))
            else:
                found[i] = upload(data.view(height, width, 3), self._device).permute(2, 0, 1)
        found |= zip(jpegs, self._decoder.decode(list(jpegs.values())), strict=True)
        return [found[i] for i in chunk]


class EncodeHandler:
    """The work of a worker: read, check and label a window; the images travel back in a file."""

    def __init__(self, maker: BatchMaker) -> None:
        self.maker = maker

    def __call__(self, task: WindowTask, descriptors: list[int]) -> tuple[Encoded, list[int]]:
        self.maker.learn(task.window.epoch, task.settings)
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
        rows=labelled.rows,
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


def _mapped(received: tuple[int, ...]) -> Tensor:
    """Map the content of the file that a worker sent, and close its descriptor. Raises TooManyOpenFilesError."""
    if not received:
        raise too_many_open_files(SENT_IMAGES)
    (descriptor,) = received
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.from_file(f"/dev/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        refuse_too_many_files(SENT_IMAGES, error)
        raise
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


def in_chunks(num_pixels: Sequence[int], budget: int) -> Iterator[range]:
    """Split a window's images, in order, into runs of at most `budget` pixels, or of one image.

    >>> list(in_chunks([4, 4, 9, 1], 8))
    [range(0, 2), range(2, 3), range(3, 4)]
    """
    first = total = 0
    for i, pixels in enumerate(num_pixels):
        if i > first and total + pixels > budget:
            yield range(first, i)
            first, total = i, 0
        total += pixels
    if first < len(num_pixels):
        yield range(first, len(num_pixels))


def open_device(device: str | torch.device) -> torch.device:
    """Return the device if it may decode; the first iteration shows it. Raises UsageError where it cannot."""
    try:
        opened = torch.device(device)
        if opened.type not in ("cpu", "cuda"):
            raise UsageError(f"decode_device is cuda or cpu, got {str(device)!r}")
        open_decoder(opened)
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise cannot_decode(device, error) from error
    return opened
