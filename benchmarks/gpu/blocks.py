"""Blocks of the check in their order, with their limits and the names of their figures.

A figure that a block may record is listed here, so that the JSON of every run has the same keys. Only the
standard library is imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PASSES = ("forward", "forward_backward")
OPERATORS = (
    "group_norm_silu",
    "varlen_attention",
    "scalar_attention",
    "adaln",
    "gate_residual_adaln",
    "pack",
    "wide_attention",
)
RIVALS = {
    "group_norm_silu": ("eager", "compile"),
    "varlen_attention": ("triton", "flash", "cudnn", "sdpa_padded"),
    "scalar_attention": ("sdpa",),
    "adaln": ("eager", "compile"),
    "gate_residual_adaln": ("eager", "compile"),
    "pack": ("eager",),
    "wide_attention": ("triton",),
}
"""Other implementations that each operator is timed against."""
CUDA_OPERATORS = ("group_norm_silu", "scalar_attention")
"""Operators with kernels in CUDA C++."""
TOOLS = ("memcheck", "racecheck")
STEPS = ("cat_xl_eager", "cat_xl_compiled")
VAE_STEPS = tuple(f"vae_{ratio}x_{precision}" for ratio in (8, 16) for precision in ("fp32", "bf16"))
SAMPLING_STEPS = ("sampling_step_eager", "sampling_step_captured")
"""A step of the engine on cat_xl in bf16, without and with CUDA graphs."""
RUNS = ("tokenizer", "generator")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One process of the check."""

    name: str
    seconds: float
    """Limit on a GPU."""
    dry_seconds: float = 600.0
    """Limit of a dry run on a CPU."""
    background: bool = False
    """Runs next to those that follow, until the first one with `alone`."""
    alone: bool = False
    """Measures time, so that background blocks must have ended."""
    figures: Sequence[str] = ()


BLOCKS = (
    Block(name="install", seconds=40, figures=("seconds",)),
    Block(
        name="ceilings",
        seconds=15,
        dry_seconds=120,
        figures=("copy_bandwidth", "matmul_bfloat16", "matmul_float16", "matmul_tf32", "matmul_float32"),
    ),
    Block(
        name="build",
        seconds=190,
        background=True,
        figures=("seconds", "loads", "prebuilt_ops", "prebuilt_ops_cuda"),
    ),
    Block(name="compile", seconds=150, background=True, figures=("seconds",)),
    Block(name="kernel_tests", seconds=105, figures=("passed", "failed", "skipped")),
    Block(name="shapes", seconds=45, figures=("passed", "failed", "skipped")),
    Block(
        name="sanitizer",
        seconds=35,
        figures=tuple(f"{tool}_errors" for tool in TOOLS),
    ),
    Block(
        name="kernels",
        seconds=70,
        alone=True,
        figures=tuple(
            f"{op}.{name}.{what}"
            for op in OPERATORS
            for name in PASSES
            for what in (
                "milliseconds",
                "host_milliseconds",
                "same_again",
                "of_ceiling",
                *(f"vs_{rival}" for rival in RIVALS[op]),
            )
        ),
    ),
    Block(
        name="steps",
        seconds=85,
        alone=True,
        figures=(
            *(
                f"{step}.{what}"
                for step in STEPS
                for what in ("milliseconds", "mfu", "of_matmul", "peak_bytes")
            ),
            "cat_xl_eager.synchronizations",
            "cat_xl_eager.launches",
            *(f"{step}.{what}" for step in SAMPLING_STEPS for what in ("milliseconds", "launches")),
            "sampling_step_captured.same_bits",
            "sampling_noise.milliseconds",
            *(f"{step}.{what}" for step in VAE_STEPS for what in ("milliseconds", "peak_bytes")),
            *(f"vae_{ratio}x_predicted_bytes" for ratio in (8, 16)),
        ),
    ),
    Block(
        name="training",
        seconds=65,
        figures=(
            *(f"{run}.{what}" for run in RUNS for what in ("largest_difference", "resumed_difference")),
            *(f"sampling.{dtype}.images_per_second" for dtype in ("fp32", "bf16")),
            "sampling.bf16_difference",
        ),
    ),
)
EXPECTED = {block.name: tuple(block.figures) for block in BLOCKS}
