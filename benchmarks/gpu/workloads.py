"""Models and batches of the paper's sizes, and toy ones for a CPU."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.shared.configs import generator_run
from cat_fast.generator import DiT
from cat_fast.models.build import build_model
from cat_fast.packing import PackedSequence

TOY_DIT = {"in_channels": 4, "hidden_size": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
GRIDS = {4: (2, 2), 16: (4, 4), 64: (8, 8), 256: (16, 16), 1024: (32, 32)}


def dit(device: torch.device, *, large: bool, **changes: Any) -> DiT:
    """Return cat_xl's transformer, or a toy one, with random weights in every layer."""
    arguments: dict[str, Any] = dict(TOY_DIT)
    if large:
        arguments = {"in_channels": 16, **generator_run("cat_xl").model}
    torch.manual_seed(0)
    with device:
        model = build_model(DiT, arguments | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # zero-initialised layers would hide errors
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def packed_batch(model: DiT, lengths: Sequence[int], device: torch.device, seed: int = 0) -> PackedSequence:
    """Return random latents of these numbers of tokens, square where possible, with labels."""
    config = model.config
    generator = torch.Generator(device).manual_seed(seed)
    grids = [GRIDS.get(length, (1, length)) for length in lengths]
    count, patch = len(lengths), config.patch_size
    return PackedSequence(
        tokens=torch.randn(sum(lengths), patch**2 * config.in_channels, generator=generator, device=device),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
        grid=torch.tensor(grids, dtype=torch.int32).to(device),
        ratio=torch.tensor([(8, 16, 32)[i % 3] for i in range(count)], dtype=torch.int32).to(device),
        label=torch.arange(count).remainder(config.num_classes).to(device),
        max_seqlen=max(lengths),
    )
