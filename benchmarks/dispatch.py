"""Host time of an operator's call: our registration against torch's usual one, and the choice of a backend.

    python -m benchmarks.dispatch --json FILE [--quick]

The operator has the arguments of varlen_attention and copies 16 numbers, so that a call is its launch:
dispatch, gradient and Python. Both registrations have the same implementation, fake implementation and
gradient. Rounds alternate. Seconds are those of the processor, so that other processes count
little. The A/A ratio, the usual side against itself in the same rounds, is the noise.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.shared import simple_program
from benchmarks.shared.harness import Spread
from cat_fast.processes.signals import run_command

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # registers operators of Triton without a GPU; none of them runs

from cat_fast.kernels import backends
from cat_fast.kernels.registration import Operator

ROUNDS, CALLS = 31, 1000
SIDES = ("usual", "ours", "usual again")
"""`usual`: torch's registration of custom operators; for the choice of a backend, a search of the table."""
Run = Callable[[], object]


def copy(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> torch.Tensor:
    return q.clone()


def copy_backward(grad: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    return grad.clone()


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[3])


def gradients(operator: Any, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (operator(grad, *ctx.saved_tensors), *[None] * 6)


def operators() -> dict[str, Callable[..., torch.Tensor]]:
    """Register both operators; return their calls."""
    ours = Operator(
        name="launch",
        fake=lambda q, *_: torch.empty_like(q),
        fake_backward=lambda grad, _: torch.empty_like(grad),
        setup_context=setup_context,
        backward=gradients,
        reference_backward=lambda ctx, grad: (grad, *[None] * 6),
    )
    ours.register_triton(lambda: (copy, copy_backward))
    forward = torch.library.custom_op("launch::forward", copy, mutates_args=())
    backward = torch.library.custom_op("launch::backward", copy_backward, mutates_args=())
    forward.register_autograd(partial(gradients, backward), setup_context=setup_context)
    return {"usual": torch.ops.launch.forward.default, "ours": partial(ours, "triton")}


def _differentiate(run: Callable[[], torch.Tensor], leaf: torch.Tensor, grad: torch.Tensor) -> object:
    return torch.autograd.grad(run(), leaf, grad)


def calls() -> dict[str, dict[str, Run]]:
    """Return the calls of each case by side."""
    plain, leaf, grad = torch.ones(16), torch.ones(16, requires_grad=True), torch.ones(16)
    offsets = torch.tensor([0, 16], dtype=torch.int32)
    others = plain, plain, offsets, 16, offsets, 16
    found: dict[str, dict[str, Run]] = {"forward": {}, "forward_of_training": {}, "forward_backward": {}}
    for side, call in operators().items():
        found["forward"][side] = partial(call, plain, *others)
        found["forward_of_training"][side] = run = partial(call, leaf, *others)
        found["forward_backward"][side] = partial(_differentiate, run, leaf, grad)
    sizes = (("head_dim", 72),)
    state = (None, False, 0)
    arguments = "varlen_attention", torch.device("cpu"), torch.bfloat16, False, sizes, state
    found["choice_of_backend"] = {
        "usual": lambda: backends._first_that_accepts.__wrapped__(*arguments),
        "ours": lambda: backends.choose("varlen_attention", plain, head_dim=72),
    }
    return found


def measure(quick: bool) -> dict[str, Any]:
    """Return microseconds per call and ratios by case."""
    rounds, number = (5, 500) if quick else (ROUNDS, CALLS)
    cases = {name: _compare(sides, rounds, number) for name, sides in calls().items()}
    return {"threads": torch.get_num_threads(), "calls": number, "cases": cases}


def _compare(sides: Mapping[str, Run], rounds: int, number: int) -> dict[str, Any]:
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(rounds + 1):
        for side in SIDES if turn % 2 else reversed(SIDES):
            run = sides[side.removesuffix(" again")]
            start = time.process_time()
            for _ in range(number):
                run()
            if turn:  # the first round warms up
                taken[side].append((time.process_time() - start) / number * 1e6)
    return {
        "processor_microseconds": {side: vars(Spread.of(values)) for side, values in taken.items()},
        "usual_over_ours": _ratio(taken["usual"], taken["ours"]),
        "usual_over_usual": _ratio(taken["usual"], taken["usual again"]),
    }


def _ratio(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    return vars(Spread.of([a / b for a, b in zip(first, second, strict=True)]))


def lines(found: Mapping[str, Any]) -> list[str]:
    """Format the medians and ratios."""
    rows = []
    for name, case in found["cases"].items():
        microseconds = {side: spread["median"] for side, spread in case["processor_microseconds"].items()}
        ratio, noise = case["usual_over_ours"], case["usual_over_usual"]
        rows.append(
            f"{name}: {microseconds['usual']:.1f} us as usual, {microseconds['ours']:.1f} us ours: "
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}); A/A {noise['median']:.2f}"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write. Return 2 for invalid usage."""
    return simple_program.main("dispatch", __doc__ or "", measure, lines, arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
