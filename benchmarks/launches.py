"""Operators that follow the backward pass in a training step without ZeRO, counted without a GPU.

    python -m benchmarks.launches --json FILE

The guard's norm of the gradients, AdamW and the averages of the weights run on fake tensors of a GPU, which
have shapes but no memory, in the sizes of a published configuration. A mode of torch counts the operators
that write to the device, and fails where the host would wait for it. Clipping, AdamW and averages are also
counted in two usual forms: with `foreach`, torch's default on GPUs, in which each makes one call for many
tensors, and with a call per tensor. Neither has a guard. One call for many tensors is one or several kernels
on a GPU, so these are not numbers of kernels. The backward pass does not differ. The presets use ZeRO 2,
whose optimizer runs on flat buffers: this is the tail without ZeRO.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bounds.steps import transformer
from benchmarks.shared import simple_program
from benchmarks.shared.configs import tokenizer_run
from benchmarks.shared.host_device import NoSynchronization
from cat_fast.models.build import build_model
from cat_fast.processes.signals import run_command
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.training.config.settings import GuardConfig
from cat_fast.training.health.nan_guard import StepGuard
from cat_fast.training.runtime.ema import EMA

RUNS = ("generator/cat_xl", "tokenizer/cat_c16")
DEVICE = "cuda"


def shapes(run: str) -> list[torch.Size]:
    """Return the shapes of the parameters of a configuration's model."""
    kind, _, name = run.partition("/")
    if kind == "generator":
        model: nn.Module = transformer(name)
    else:
        with FakeTensorMode():
            model = build_model(NestedAutoencoderKL, tokenizer_run(name).model)
    return [parameter.shape for parameter in model.parameters()]


class Weights(nn.Module):
    """Parameters with gradients, on the fake GPU."""

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        super().__init__()
        self.all = nn.ParameterList(torch.empty(shape, device=DEVICE) for shape in shapes)
        for parameter in self.all:
            parameter.grad = torch.empty_like(parameter)


def tail(weights: Weights) -> dict[str, Callable[[], object]]:
    """Return the parts of a step after its backward pass."""
    engine = SimpleNamespace(module=weights, optimizer=None)
    ranks: Any = SimpleNamespace(device=torch.device(DEVICE))
    guard = StepGuard(GuardConfig(), ranks)
    losses = {"loss": torch.empty(1, device=DEVICE)}
    optimizer = torch.optim.AdamW(weights.parameters(), fused=True)
    average = EMA(weights, 0.999)
    return {
        "guard": lambda: guard.inspect(losses, {"model": engine}),
        "optimizer": optimizer.step,
        "average": average.update,
    }


def usual_tail(weights: Weights, *, foreach: bool) -> dict[str, Callable[[], object]]:
    """Return clipping, AdamW and averages by torch, with calls for many tensors if `foreach`."""
    parameters = list(weights.all)
    averaged = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, foreach=foreach)

    def clip() -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=foreach)

    def average() -> None:
        current = [parameter.detach() for parameter in parameters]
        if foreach:
            torch._foreach_lerp_(averaged, current, 1e-3)
        else:
            for old, new in zip(averaged, current, strict=True):
                old.lerp_(new, 1e-3)

    return {"guard": clip, "optimizer": optimizer.step, "average": average}


def count(parts: Mapping[str, Callable[[], object]]) -> dict[str, int]:
    """Return the operators of each part in its second call, after one that makes the optimiser's state."""
    found = {}
    for name, run in parts.items():
        run()
        with torch.no_grad(), NoSynchronization(DEVICE) as watched:
            run()
        found[name] = sum(watched.launches.values())
    return found | {"all": sum(found.values())}


def measure(quick: bool) -> dict[str, Any]:
    """Return the numbers of operators by configuration."""
    cases: dict[str, dict[str, Any]] = {}
    for run in RUNS:
        sizes = shapes(run)
        with FakeTensorMode():
            cases[run] = {
                "tensors": len(sizes),
                "per_tensor": count(usual_tail(Weights(sizes), foreach=False)),
                "foreach": count(usual_tail(Weights(sizes), foreach=True)),
                "ours": count(tail(Weights(sizes))),
            }
    return {"cases": cases}


def lines(found: Mapping[str, Any]) -> list[str]:
    """Format the numbers."""
    return [
        f"{run}: {case['tensors']} tensors: {case['per_tensor']['all']} operators with a call per tensor, "
        f"{case['foreach']['all']} with foreach, {case['ours']['all']} ours {case['ours']}"
        for run, case in found["cases"].items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print and write. Return 2 for invalid usage."""
    return simple_program.main("launches", __doc__ or "", measure, lines, arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
