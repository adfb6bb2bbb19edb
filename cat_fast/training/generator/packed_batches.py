"""Prefetching of packed batches: a thread plans, reads and encodes the next step's batches during a step."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.generator import PackedText
from cat_fast.packing import PackedSequence
from cat_fast.training.generator.packed_stream import PackedStream


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """Latents for one forward pass."""

    packed: PackedSequence
    """The latents with labels and keys, on the device."""
    text: PackedText | None
    """The encoded captions, one per sequence, on the device; None without a text encoder."""
    lengths: list[int]
    """Number of tokens per sequence, on the host so that reading them does not wait for the device."""


class PackedBatches:
    """Infinite sequence of one rank's batches, prefetched by a thread.

    Args:
        latents: dataset to read.
        stream: selects the latents of each batch.
        patch_size: patch size of the model.
        prefetch: number of batches to keep ready; use the number of batches per step.
        device: device to copy batches to.
        encode: encodes captions, empty where a latent has none, to `PackedBatch.text`. Called by the thread
            only, so that a device finds its next batch encoded when it has finished a step.
    """

    def __init__(
        self,
        latents: LatentDataset,
        stream: PackedStream,
        *,
        patch_size: int,
        prefetch: int,
        device: torch.device,
        encode: Callable[[Sequence[str]], PackedText | None] = lambda captions: None,
    ) -> None:
        self._latents, self._stream, self._patch_size = latents, stream, patch_size
        self._prefetch, self._device, self._encode = prefetch, device, encode
        self._reading: torch.cuda.Stream | None = None
        """Stream of the thread on a GPU, so that captions are not encoded after the kernels of a step."""
        select = None
        if device.type == "cuda":
            self._reading = torch.cuda.Stream(device)
            self._reading.wait_stream(torch.cuda.current_stream(device))  # until weights are copied
            select = partial(torch.cuda.set_stream, self._reading)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latents", initializer=select)
        self._ready: deque[Future[tuple[PackedBatch, torch.cuda.Event | None]]] = deque()
        self._states: deque[Callable[[], dict[str, Any]]] = deque()
        """Snapshots of the stream before each batch that is ready."""
        self._before_take: Callable[[], dict[str, Any]] | None = None
        self._position: Callable[[], dict[str, Any]] | None = None

    def take(self, count: int) -> tuple[list[PackedBatch], float]:
        """Return the next batches, and the time spent waiting for them in seconds.

        Raises:
            UserError: a latent cannot be read.
        """
        self._read_ahead(max(count, self._prefetch))
        start = time.perf_counter()
        wait([self._ready[0]])
        self._before_take, self._position = self._states[0], None
        batches = []
        for _ in range(count):
            batch, written = self._ready.popleft().result()
            if written is not None:
                _hand_over(batch, written)
            batches.append(batch)
            self._states.popleft()
        seconds = time.perf_counter() - start
        self._read_ahead(self._prefetch)
        return batches, seconds

    def put_back(self) -> None:
        """Make `state_dict` return the state before the last `take`, until the next `take`."""
        self._position = self._before_take

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's state as if nothing had been prefetched."""
        if self._position:
            return self._position()
        if not self._ready:
            return self._stream.state_dict()
        wait([self._ready[0]])
        return self._states[0]()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state; see `PackedStream.load_state_dict`."""
        wait([read for read in self._ready if not read.cancel()])
        self._ready.clear()
        self._states.clear()
        self._position = None
        self._stream.load_state_dict(state)

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _read_ahead(self, count: int) -> None:
        while len(self._ready) < count:
            self._ready.append(self._thread.submit(self._read))

    def _read(self) -> tuple[PackedBatch, torch.cuda.Event | None]:
        """Return the next batch, and on a GPU the event after which it is written."""
        self._states.append(self._stream.snapshot())
        indices = self._stream.next()
        samples = [self._latents[i] for i in indices]
        packed = PackedSequence.from_latents(
            [sample.latent for sample in samples],
            [sample.ratio for sample in samples],
            self._patch_size,
            labels=[sample.label for sample in samples],
            keys=[sample.key for sample in samples],
        )
        captions = [self._latents.entries[i].caption or "" for i in indices]
        lengths = packed.cu_seqlens.diff().tolist()
        batch = PackedBatch(packed=packed.to(self._device), text=self._encode(captions), lengths=lengths)
        return batch, None if self._reading is None else self._reading.record_event()


def _hand_over(batch: PackedBatch, written: torch.cuda.Event) -> None:
    """Let the current stream wait for a batch, whose memory is kept until that stream has read it."""
    current = torch.cuda.current_stream(batch.packed.device)
    current.wait_event(written)
    fields = list(vars(batch.packed).values())
    if batch.text is not None:
        fields += vars(batch.text).values()
    for value in fields:
        if isinstance(value, torch.Tensor):
            value.record_stream(current)
