"""`PackedEngine`: continuous batching of requests that differ in tokens, steps, guidance and scheduler."""

from cat_fast.inference.engine.engine import PackedEngine
from cat_fast.inference.engine.errors import Cancelled, DeadlineUnreachable, Draining, QueueFull
from cat_fast.inference.engine.handle import EngineOutput, RequestHandle, RequestRecord
from cat_fast.inference.engine.order import CostAware, FifoPacked
from cat_fast.inference.engine.request import EngineRequest

__all__ = [
    "Cancelled",
    "CostAware",
    "DeadlineUnreachable",
    "Draining",
    "EngineOutput",
    "EngineRequest",
    "FifoPacked",
    "PackedEngine",
    "QueueFull",
    "RequestHandle",
    "RequestRecord",
]
