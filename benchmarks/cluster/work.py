"""Work of one rank in the paper's two runs on a GPU: seconds, operators and memory of a batch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from benchmarks.bounds.data_sheets import Assumptions, DataSheet, name_of, read_sheets
from benchmarks.bounds.steps import dit_step, predicted_seconds, transformer, vae_step
from benchmarks.cluster.zero import BUCKET, FP32, resident_elements
from benchmarks.efficiency.costs import transformer_activation_bytes
from benchmarks.packing import compose_lengths
from benchmarks.shared.configs import tokenizer_run
from benchmarks.shared.mixes import MAX_TOKENS, MIXES
from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.errors import UserError
from cat_fast.training.tokenizer.predict_memory import Zero, trace
from cat_fast.training.tokenizer.synthetic_step import Workload

TOKENIZER, TRANSFORMER = "cat_c16", "cat_xl"
RATIOS = (8, 16, 32)
UNIT_TOKENS = 256
"""Tokens of an image at 16x: the transformer's batches are counted in such units."""
COUNTED_IMAGES = (2, 3)
"""Batches whose memory is counted; any other follows from them."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A model with its optimizer under ZeRO."""

    name: str
    tensors: Sequence[int]
    """Elements of each trained tensor, in the order of the forward pass."""

    @property
    def parameters(self) -> int:
        return sum(self.tensors)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Costs of one rank on one GPU model, by ratio."""

    engines: Sequence[Engine]
    seconds: Mapping[int, Cost]
    """Forward and backward pass of a batch."""
    launches: Mapping[int, int]
    """Operators of a batch, which the host launches one by one."""
    optimizer_seconds: float
    """Update of all parameters on one rank; ranks share it."""
    activations: Mapping[int, Cost]
    """Peak bytes of a batch's tensors without gradients."""
    frozen_bytes: float = 0.0
    """Networks in the loss, and buffers."""
    source: str = "predicted from data sheets"

    def batch_seconds(self, ratio: int, images: int, seconds_per_launch: float) -> float:
        """Return the time of a batch: the GPU's, or the host's if launching takes longer."""
        return max(self.seconds[ratio](images), self.launches[ratio] * seconds_per_launch)


def memory_bytes(work: Work, counts: Mapping[int, int], ranks: int, stage: int) -> float:
    """Return the peak memory of rank 0: weights, optimizer, gradients and activations.

    Gradients are counted in full next to the largest activations, which is an upper bound.

    Args:
        work: costs of the run.
        counts: largest number of images of a rank's batch by ratio.
        ranks: number of ranks.
        stage: ZeRO stage, 1 to 3.
    """
    zero = Zero(stage=min(stage, 2), ranks=ranks, bucket_bytes=FP32 * BUCKET * (2 if stage < 3 else 1))
    held, gradients, updating = work.frozen_bytes, 0.0, 0.0
    for engine in work.engines:
        at_rest = zero.at_rest(engine.parameters)
        if stage == 3:
            at_rest["weights"] = at_rest["weights"] // ranks + FP32 * resident_elements(engine.tensors)
        held += sum(at_rest.values())
        gradients += zero.gradient_bytes(engine.parameters)
        updating = max(updating, zero.optimizer_step_bytes(engine.parameters))
    held += FP32 * work.engines[0].parameters / (ranks if stage == 3 else 1)  # EMA
    largest = max(work.activations[ratio](images) for ratio, images in counts.items())
    return held + max(largest + gradients + zero.bucket_bytes, updating)


def checkpoint_bytes(work: Work, stage: int) -> int:
    """Return the bytes of a checkpoint: weights and two moments of all models, and averages of the first.

    ZeRO 1 and 2 save the weights of the modules as well (`saved_bytes` of the training package).
    """
    copies = 4 if stage < 3 else 3
    parameters = sum(engine.parameters for engine in work.engines)
    return FP32 * (copies * parameters + work.engines[0].parameters)


def predicted_works() -> dict[tuple[str, str], Work]:
    """Return the costs of both runs by GPU and run, from the counted steps of the roofline."""
    sheets, shares = read_sheets()
    return {
        (gpu, run): _predicted(counted, sheet, shares)
        for gpu, sheet in sheets.items()
        for run, counted in (("tokenizer", _tokenizer()), ("transformer", _transformer()))
    }


def measured_work(work: Work, table: CostTable, source: str) -> Work:
    """Return a tokenizer's work with the measured costs of a table, which include an unshared optimizer."""
    return replace(
        work,
        seconds={ratio: table.costs[ratio] for ratio in RATIOS},
        launches=dict.fromkeys(RATIOS, 0),
        optimizer_seconds=0.0,
        source=source,
    )


def measured_on(table: CostTable, gpus: Collection[str], source: str) -> str:
    """Return which of `gpus` a cost table of the tokenizer was measured on.

    Raises:
        UserError: the table is not in seconds, lacks a ratio, or is of another GPU, image size or precision.
    """
    about = table.require(list(RATIOS)).about
    if table.unit != "seconds":
        raise UserError(f"{source}: expected costs in seconds, got {table.unit}")
    run = tokenizer_run(TOKENIZER)
    for key, expected in (("device", "cuda"), ("side", run.data.image_size), ("precision", run.precision)):
        if about.get(key) != expected:
            raise UserError(
                f"{source}: expected {key} {expected}, got {about.get(key)}; measure configs/tokenizer/"
                f"{TOKENIZER}.yaml on a GPU with cat-fast plan cost"
            )
    first = (about.get("machine", {}).get("gpus") or ["an unnamed GPU"])[0]
    name = first["name"] if isinstance(first, Mapping) else str(first)
    gpu = name_of(name, read_sheets()[0])
    if gpu is None or gpu not in gpus:
        raise UserError(f"{source}: expected costs measured on one of {', '.join(gpus)}, got {name}")
    return gpu


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """Counted work of a run: operators of a batch by ratio, and what it holds in memory."""

    images: int
    calls: Mapping[int, Sequence[Any]]
    update: Sequence[Any]
    """Operators of the optimizers on one rank."""
    engines: Sequence[Engine]
    activations: Mapping[int, Cost]
    frozen_bytes: float


def _predicted(counted: _Counted, sheet: DataSheet, shares: Assumptions) -> Work:
    def seconds(calls: Sequence[Any]) -> float:
        return predicted_seconds(calls, sheet, shares)

    return Work(
        engines=counted.engines,
        seconds={ratio: Cost(0.0, seconds(calls) / counted.images) for ratio, calls in counted.calls.items()},
        launches={ratio: len(calls) for ratio, calls in counted.calls.items()},
        optimizer_seconds=seconds(counted.update),
        activations=counted.activations,
        frozen_bytes=counted.frozen_bytes,
    )


@cache
def _tokenizer() -> _Counted:
    from torch._subclasses.fake_tensor import FakeTensorMode

    images = 8
    steps = {ratio: vae_step(f"vae_{ratio}", TOKENIZER, ratio, images, 1) for ratio in RATIOS}
    with FakeTensorMode():
        workload = Workload(tokenizer_run(TOKENIZER), "cpu")
        tensors = [[p.numel() for p in parameters] for parameters in workload.trained.values()]
        engines = [
            Engine(name=name, tensors=sizes)
            for name, sizes in zip(("autoencoder", "discriminator"), tensors, strict=True)
        ]
        activations = {ratio: _activations(workload, ratio) for ratio in RATIOS}
        frozen = sum(tensor.nbytes for tensor in workload.frozen)
    return _Counted(
        images=images,
        calls={ratio: [call for call in step.calls if call.name != "adamw"] for ratio, step in steps.items()},
        update=[call for call in steps[8].calls if call.name == "adamw"],
        engines=engines,
        activations=activations,
        frozen_bytes=frozen,
    )


def _activations(workload: Workload, ratio: int) -> Cost:
    """Count the peak of a step's tensors without gradients, at two batch sizes."""
    without_gradients = Zero(stage=2, ranks=1 << 40, bucket_bytes=0)
    few, more = (max(trace(workload, ratio, count, without_gradients)) for count in COUNTED_IMAGES)
    slope = (more - few) / (COUNTED_IMAGES[1] - COUNTED_IMAGES[0])
    return Cost(few - slope * COUNTED_IMAGES[0], slope)


@cache
def _transformer() -> _Counted:
    step = dit_step("dit", TRANSFORMER, compose_lengths(MIXES["197"], MAX_TOKENS), 1)
    model = transformer(TRANSFORMER)
    kept = transformer_activation_bytes(model, UNIT_TOKENS)
    return _Counted(
        images=MAX_TOKENS // UNIT_TOKENS,
        calls={16: [call for call in step.calls if call.name != "adamw"]},
        update=[call for call in step.calls if call.name == "adamw"],
        engines=[Engine(name="transformer", tensors=[p.numel() for p in model.parameters()])],
        activations={16: Cost(0.0, kept)},
        frozen_bytes=0.0,
    )
