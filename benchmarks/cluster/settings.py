"""Configurations of the short runs that validate the scaling model, and their counted work.

The tokenizer has two engines and refuses ZeRO 3, so it is trained under ZeRO 1 and 2, and the transformer
under ZeRO 3.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from benchmarks.shared.configs import CONFIGS
from cat_fast.config import read_yaml
from cat_fast.data.sampling.step_plan import PerRankPlan

SKIPPED_STEPS = 3
"""First steps, which also set up."""
RATIOS = (8, 16, 32)
Batch = tuple[tuple[int, int], ...]
"""A rank's batch: numbers of images by ratio, or of sequences by their tokens."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Counted work of a setting."""

    flops: Mapping[int, Sequence[float]]
    """Of a training step, by kind of operator: per image by ratio, or per sequence by its tokens."""
    tensors: Sequence[int]
    """Elements of each trained tensor."""

    def batch_flops(self, batch: Batch) -> list[float]:
        """Return the FLOPs of a batch by kind of operator."""
        kinds = zip(*([count * n for n in self.flops[key]] for key, count in batch), strict=True)
        return [sum(kind) for kind in kinds]


class Setting(Protocol):
    """One configuration of a short run."""

    model: ClassVar[str]

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Path: ...

    def prepare(self, folder: Path) -> None:
        """Write the data of the run into `folder`."""
        ...

    def overrides(self, folder: Path) -> list[str]:
        """Return the settings of a run on the data in `folder`."""
        ...

    def draws(self, ranks: int, seed: int) -> list[tuple[Batch, ...]]:
        """Return the batches of all ranks in each measured step of a run with this seed."""
        ...

    def count(self) -> Size:
        """Count the work on tensors without memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenizerSetting:
    """A run of the tokenizer without GAN and without networks in the loss."""

    model: ClassVar[str] = "tokenizer"
    name: str
    batch: int
    """Images per rank."""
    width: int = 1
    """Factor on all channels."""
    shares: Mapping[int, float]
    side: int = 64
    steps: int = 15

    IMAGES: ClassVar[int] = 16

    @property
    def config(self) -> Path:
        return CONFIGS / "tokenizer/nano.yaml"

    @property
    def channels(self) -> list[int]:
        """Channels of the blocks."""
        return [32 * self.width] * 4 + [64 * self.width] * 2

    def prepare(self, folder: Path) -> None:
        """Write small images, whose decoding takes no time worth mentioning."""
        from PIL import Image

        images = folder / "images"
        images.mkdir(parents=True)
        generator = np.random.default_rng(0)
        for number in range(self.IMAGES):
            pixels = generator.integers(256, size=(self.side, self.side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{number:02d}.png")

    def overrides(self, folder: Path) -> list[str]:
        """Return the settings of a run on the images in `folder`."""
        shares = ", ".join(f"{ratio}: {self.shares.get(ratio, 0.0)}" for ratio in RATIOS)
        return [
            f"model.block_out_channels={self.channels}",
            "model.initialisation=default",
            f"data.folder={folder / 'images'}",
            "data.stream.workers=0",
            f"data.image_size={self.side}",
            f"data.batch_size={self.batch}",
            f"sampler.shares={{{shares}}}",
            "sampler.pool=all",
            "loss.gan_weight=0",
            "loss.perceptual_weight=0",
            f"schedule.total_steps={self.steps}",
            "logging.grid_every_steps=0",
        ]

    def draws(self, ranks: int, seed: int) -> list[tuple[Batch, ...]]:
        """Return the batches of all ranks in each measured step of a run with this seed."""
        plan = PerRankPlan(self.shares, self.batch, ranks, seed)
        steps = range(SKIPPED_STEPS, self.steps)
        return [tuple(((share.ratio, share.images),) for share in plan.plan(step, {})) for step in steps]

    def count(self) -> Size:
        """Count the work on tensors without memory."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        from cat_fast import NestedAutoencoderKL
        from cat_fast.models.build import build_model

        arguments = read_yaml(self.config)["model"] | {"block_out_channels": self.channels}
        with torch.device("meta"):
            model = build_model(NestedAutoencoderKL, arguments)
        flops = {}
        for ratio in RATIOS:
            image = torch.empty(1, 3, self.side, self.side, device="meta")
            with FlopCounterMode(display=False) as counter:
                model(image, ratio).sample.sum().backward()
            flops[ratio] = (float(counter.get_total_flops()),)
        return Size(flops=flops, tensors=[p.numel() for p in model.parameters()])


@dataclass(frozen=True, kw_only=True)
class TransformerSetting:
    """A run of the diffusion transformer on random latents of 256 px."""

    model: ClassVar[str] = "transformer"
    name: str
    max_tokens: int
    """Tokens per rank."""
    width: int = 1
    """Factor on the hidden size and the heads."""
    ratios: Sequence[int]
    """Ratios of the latents, in equal numbers."""
    steps: int = 15

    LATENTS: ClassVar[int] = 192
    WINDOW: ClassVar[int] = 64
    SIDE: ClassVar[int] = 256
    CHANNELS: ClassVar[int] = 4
    CLASSES: ClassVar[tuple[str, ...]] = ("a", "b")

    @property
    def config(self) -> Path:
        return CONFIGS / "generator/nano.yaml"

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the model that differ with the setting."""
        return {"hidden_size": 144 * self.width, "num_heads": 3 * self.width}

    def prepare(self, folder: Path) -> None:
        """Write random latents."""
        import torch

        from cat_fast.data.latents.dataset import LatentShardWriter

        generator = torch.Generator().manual_seed(0)
        classes = list(self.CLASSES)
        with LatentShardWriter(
            folder / "latents", "0" * 16, resolution=self.SIDE, class_names=classes
        ) as writer:
            for number, ratio in enumerate(self._latent_ratios()):
                side = self.SIDE // ratio
                latent = torch.randn(self.CHANNELS, side, side, generator=generator)
                writer.add(f"{number:04d}", latent, label=number % len(classes), ratio=ratio)

    def overrides(self, folder: Path) -> list[str]:
        """Return the settings of a run on the data in `folder`."""
        return [
            *(f"model.{key}={value}" for key, value in self.arguments.items()),
            f"data.latents={folder / 'latents'}",
            f"data.max_tokens={self.max_tokens}",
            f"data.window={self.WINDOW}",
            f"schedule.total_steps={self.steps}",
        ]

    def draws(self, ranks: int, seed: int) -> list[tuple[Batch, ...]]:
        """Return the batches of all ranks in each measured step of a run with this seed."""
        from cat_fast.training.generator.packed_stream import PackedStream
        from cat_fast.training.runtime.ranks import Ranks

        lengths = [self._tokens(ratio) for ratio in self._latent_ratios()]
        streams = [
            PackedStream(lengths, self.max_tokens, self.WINDOW, seed, Ranks(rank=rank, world_size=ranks))
            for rank in range(ranks)
        ]
        steps = [
            tuple(
                tuple(sorted(Counter(lengths[index] for index in stream.next()).items()))
                for stream in streams
            )
            for _ in range(self.steps)
        ]
        return steps[SKIPPED_STEPS:]

    def count(self) -> Size:
        """Count the work by formula: FLOPs of linear layers and of attention, whose rates differ."""
        from cat_fast.training.metrics.flops import DiTFlops

        arguments = read_yaml(self.config)["model"] | self.arguments
        counted = DiTFlops({**arguments, "in_channels": self.CHANNELS, "num_classes": len(self.CLASSES)})
        lengths = {self._tokens(ratio) for ratio in RATIOS}
        return Size(
            flops={n: tuple(map(float, counted.sequence_flops(n).values())) for n in lengths},
            tensors=[p.numel() for p in counted.model.parameters()],
        )

    def _latent_ratios(self) -> list[int]:
        return [self.ratios[number % len(self.ratios)] for number in range(self.LATENTS)]

    def _tokens(self, ratio: int) -> int:
        return (self.SIDE // ratio // 2) ** 2
