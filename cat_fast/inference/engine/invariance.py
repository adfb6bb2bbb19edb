"""Self-test: do the bits of an image depend on the others of its steps and of its decoder batch?

Matrix products with few rows take another path in BLAS libraries than those with many: MKL and OpenBLAS
round differently below 4 to 16 rows. Steps are therefore filled up to multiples of a block. The test looks
for the smallest block with which sequences alone and packed give the same bits, on this machine, in this
dtype and with this number of threads; and for the decoder, whether images alone and in a batch do.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from cat_fast.generator.sampling import SampleRequest, SamplingState
from cat_fast.hardware import is_out_of_memory, release_memory
from cat_fast.inference.engine.request import EngineRequest
from cat_fast.inference.engine.stages import Stages

BLOCKS = (16, 32, 64, 128)
"""Numbers of rows that are tried, in order."""
_TEXTS = ("", "sky", "a red house by the sea, with two boats in front of it and a tree behind")


@dataclass(frozen=True, kw_only=True)
class Invariance:
    """Result of the self-test."""

    independent: bool
    """True if bits do not depend on neighbours."""
    rows: int
    """Block that steps are filled up to."""
    decode_batch: int
    """Images per call of the decoder."""
    threads: int
    dtype: str
    reason: str
    """What was found, in one sentence."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def self_test(stages: Stages, max_tokens: int, *, decode_batch: int = 4) -> Invariance:
    """Find the block and the decoder batch, set them in `stages`, and return what was found.

    Only latents of the shapes that were tested are decoded in batches. Out of memory, packs of half as many
    rows are tried, as the engine does.

    Args:
        stages: their `rows`, `decode_batch` and `batched_shapes` are set.
        max_tokens: row budget of a step, which the largest pack that is tried fills.
        decode_batch: largest number of images per call of the decoder.
    """
    samples = probes(stages)
    requests = [
        EngineRequest(sample=sample, num_inference_steps=steps, guidance_scale=guidance)
        for (sample, guidance), steps in zip(
            product(samples, (1.0, 3.0)), (4, 7) * len(samples), strict=False
        )
        if sample.num_tokens * (1 if guidance == 1 else 2) <= max_tokens
    ]
    states = [stages.prepare(request) for request in requests]
    found, limit = None, max_tokens
    for rows in BLOCKS:
        stages.rows = rows
        same, limit = _same_bits_in_memory(stages, states, limit)
        if same:
            found = rows
            break
    if found is None:
        stages.rows = BLOCKS[0]
    stages.decode_batch = _decode_batch(stages, states, decode_batch)
    block = f"steps filled up to {stages.rows} rows"
    tested = f"; tested up to {limit} rows, as larger steps ran out of memory" if limit < max_tokens else ""
    return Invariance(
        independent=found is not None,
        rows=stages.rows,
        decode_batch=stages.decode_batch,
        threads=torch.get_num_threads(),
        dtype=str(stages.pipeline.transformer.dtype).removeprefix("torch."),
        reason=(
            f"equal bits alone and packed, {block}"
            if found is not None
            else f"bits differ between packs with blocks of up to {BLOCKS[-1]} rows"
        )
        + tested,
    )


def probes(stages: Stages) -> list[SampleRequest]:
    """Return one image per ratio and text, at the pipeline's resolution and at half of its height."""
    pipeline: Any = stages.pipeline
    config, resolution = pipeline.transformer.config, pipeline.resolution
    texts = _TEXTS if pipeline.text_encoder is not None else ("",)
    found = []
    for seed, (ratio, text, part) in enumerate(product(config.ratios, texts, (1, 2))):
        width = resolution // (ratio * config.patch_size)
        height = max(width // part, 1)
        found.append(
            SampleRequest(
                label=seed % (config.num_classes + 1), ratio=ratio, grid=(height, width), seed=seed, text=text
            )
        )
    return list({(one.ratio, one.grid, one.text): one for one in found}.values())


def _same_bits_in_memory(stages: Stages, states: Sequence[SamplingState], limit: int) -> tuple[bool, int]:
    """Return the result of `_same_bits`, and the rows of the largest packs that fit into memory."""
    longest = max(state.passes * state.request.num_tokens for state in states)
    while True:
        try:
            return _same_bits(stages, states, limit), limit
        except Exception as error:
            if not is_out_of_memory(error) or limit // 2 < longest:
                raise
        limit //= 2
        release_memory()


def _same_bits(stages: Stages, states: Sequence[SamplingState], max_tokens: int) -> bool:
    """Check packs of several sizes and orders against each state alone."""
    alone = [stages.denoise_step([state])[0] for state in states]
    count = len(states)
    packs = [
        range(start, min(start + size, count)) for size in (2, 3, 5) for start in range(0, count, 2 * size)
    ]
    packs.append(range(count))
    packs.append(range(count - 1, -1, -1))
    rows_of = [state.passes * state.request.num_tokens for state in states]
    repeated = [i % count for i in range(count * (1 + max_tokens // sum(rows_of)))]
    limited = [(members, max_tokens) for members in [*map(list, packs), repeated]]
    limited += [(repeated, max_tokens // 2), (repeated, max_tokens // 4)]
    for members, limit in limited:
        kept: list[int] = []
        rows = 0
        for i in members:
            if rows + rows_of[i] <= limit:
                kept.append(i)
                rows += rows_of[i]
        if not kept:
            continue
        predictions = stages.denoise_step([states[i] for i in kept])
        if not all(torch.equal(predicted, alone[i]) for predicted, i in zip(predictions, kept, strict=True)):
            return False
    return True


def _decode_batch(stages: Stages, states: Sequence[SamplingState], limit: int) -> int:
    """Return the number of images per decoder call, up to `limit`, that gives the bits of images alone."""
    by_kind = {(state.request.ratio, state.latent(stages.patch_size).shape): state for state in states}
    stages.batched_shapes = frozenset(by_kind)
    for batch in sorted({limit, 2}, reverse=True) if limit > 1 else ():
        stages.decode_batch = batch
        if all(_decodes_alike(stages, state, batch) for state in by_kind.values()):
            return batch
    return 1


def _decodes_alike(stages: Stages, state: SamplingState, batch: int) -> bool:
    latent = state.latent(stages.patch_size)
    latents = [latent.roll(shift, dims=-1) for shift in range(batch)]
    for count in range(2, batch + 1):
        together = stages.decode(latents[:count], state.request.ratio)
        first = stages.decode(latents[:1], state.request.ratio)[0]
        last = stages.decode([latents[count - 1]], state.request.ratio)[0]
        if not (torch.equal(together[0], first) and torch.equal(together[-1], last)):
            return False
    return True
