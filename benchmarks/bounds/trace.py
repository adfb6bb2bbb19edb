"""Operators of a step on tensors without memory: FLOPs of matrix products, and bytes read and written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ATTENTION = ("scaled_dot_product", "varlen_attention", "wide_attention", "scalar_attention")
MATRIX = ("mm", "addmm", "bmm", "baddbmm")


@dataclass(frozen=True)
class Call:
    """One operator that ran."""

    name: str
    flops: int
    """Operations of matrix products; 0 for all other operators."""
    moved: int
    """Bytes of the inputs and outputs, each once."""

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        moved = _moved(func, name, inputs, outputs)
        if moved:
            self.calls.append(Call(name, self._flops(func, name, args, kwargs, result), moved))
        return result

    def _flops(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
        if name in self.overrides:
            return self.overrides[name](*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        return 0 if formula is None else formula(*args, **kwargs, out_val=result)


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
