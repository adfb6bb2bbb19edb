"""Operators of a step on tensors without memory: FLOPs of matrix products, and bytes read and written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cat_fast.errors import UserError

ATTENTION = ("scaled_dot_product", "varlen_attention", "wide_attention", "scalar_attention")
MATRIX = ("mm", "addmm", "bmm", "baddbmm")
COPIES = ("_to_copy", "clone")
REPEATED_PRODUCTS = 5 / 9
"""Share of the products of a 3 x 3 convolution after nearest-neighbour upsampling by 2 that repeat others: it
equals four 2 x 2 convolutions of the smaller tensor, for each gradient too."""


@dataclass(frozen=True)
class Call:
    """One operator that ran."""

    name: str
    flops: int
    """Operations of matrix products; 0 for all other operators."""
    moved: int
    """Bytes of the inputs and outputs, each once."""
    dtype: str = "float32"
    """Format of the multiplied numbers."""
    avoidable: int = 0
    """Part of `flops` that another arrangement of the same products does without."""

    @property
    def required(self) -> int:
        """Operations of any implementation that computes products directly."""
        return self.flops - self.avoidable

    @property
    def kind(self) -> str:
        """One of convolution, matrix, attention and memory."""
        if any(part in self.name for part in ATTENTION):
            return "attention"
        if "convolution" in self.name:
            return "convolution"
        return "matrix" if self.name in MATRIX else "memory"


class Trace(TorchDispatchMode):
    """Dispatch mode that lists the operators. Views and allocations move nothing and are left out.

    Args:
        flops: overrides for the FLOPs of operators by name. They get the operator's arguments and return
            None where torch's formula holds.
    """

    def __init__(self, flops: Mapping[str, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.overrides = flops or {}
        self._upsampled: WeakSet[UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        moved = _moved(func, name, inputs, outputs)
        if moved:
            flops = self._flops(func, name, args, kwargs, result)
            dtype = str(outputs[0].dtype).removeprefix("torch.") if flops else Call.dtype
            self.calls.append(Call(name, flops, moved, dtype, self._avoidable(name, inputs, flops)))
            self._follow_upsampled(name, inputs, outputs)
        return result

    def _avoidable(self, name: str, inputs: Sequence[Tensor], flops: int) -> int:
        if name not in ("convolution", "convolution_backward"):
            return 0
        *_, x, weight = inputs[: 2 + (name == "convolution_backward")]
        repeated = x.untyped_storage() in self._upsampled and weight.shape[-2:] == (3, 3)
        return round(REPEATED_PRODUCTS * flops) if repeated else 0

    def _follow_upsampled(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        doubled = name == "upsample_nearest2d" and outputs[0].numel() == 4 * inputs[0].numel()
        copied = name in COPIES and inputs[0].untyped_storage() in self._upsampled
        if doubled or copied:
            self._upsampled.add(outputs[0].untyped_storage())

    def _flops(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
        if name in self.overrides:
            return self.overrides[name](*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        return 0 if formula is None else formula(*args, **kwargs, out_val=result)


def require_operators(calls: Iterable[Call], names: Iterable[str]) -> None:
    """Check that a trace went through the package's operators: their references count differently.

    Raises:
        UserError: one of them was not called.
    """
    found = {call.name for call in calls}
    missing = [name for name in names if not any(other.startswith(name) for other in found)]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: the reference was traced instead of the compiled operator, whose costs "
            "differ; run `make build`, and unset CAT_FAST_BACKEND"
        )


def _moved(func: Any, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    if name.startswith(("empty", "new_empty", "detach", "lift_fresh")) or not outputs:
        return 0
    given = {_storage(x) for x in inputs}
    if not func._schema.is_mutable and inputs and all(_storage(y) in given for y in outputs):
        return 0  # a view
    if func._schema.is_mutable:
        written = inputs[:1] if inputs else outputs
    else:
        written = [y for y in outputs if _storage(y) not in given]
    return sum(map(_bytes, {id(x): x for x in inputs}.values())) + sum(map(_bytes, written))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Return the size of a tensor's distinct elements: expanded ones are read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
