"""Links, prices and failure rates of clusters (`benchmarks/data/links.json`), and the time of collectives."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

from benchmarks.cluster.zero import Exchange

FILE = Path(__file__).parents[1] / "data/links.json"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a cluster; rates in bytes per second and direction."""

    gpus: int
    nvlink: float
    """Of one GPU."""
    network: float
    """Of all adapters of the node."""
    cores: int
    price_per_gpu_hour: float
    price_source: str
    source: str

    def ring_bandwidth(self, ranks: int) -> float:
        """Return the bandwidth of a GPU in a ring over all ranks, with parallel rings on all adapters."""
        return self.nvlink if ranks <= self.gpus else min(self.nvlink, self.network)


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An algorithm of NCCL under one protocol: latencies in seconds."""

    kind: str
    """ring or tree; trees only all-reduce."""
    protocol: str
    share: float
    """Share of the ring's bandwidth."""
    base: float
    nvlink_hop: float
    network_hop: float

    def latency(self, collective: str, ranks: int, nodes: int) -> float:
        """Return the seconds of a collective of no data."""
        if self.kind == "tree":
            hops = 2 * (ranks / nodes - 1)
            return self.base + hops * self.nvlink_hop + 2 * log2(nodes) * self.network_hop
        rounds = 2 if collective == "all_reduce" else 1
        between = rounds * (nodes - 1)
        return self.base + (rounds * (ranks - 1) - between) * self.nvlink_hop + between * self.network_hop


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Parameters without a data sheet."""

    link_share: float
    """Share of a link's bandwidth that collectives reach."""
    seconds_per_launch: float
    """Host time of one operator."""
    backward_share: float
    """Share of the backward pass in a step's computing."""
    storage_bytes_per_second: float
    restart_seconds: float
    failure_hours_per_gpu: float
    algorithms: Sequence[Algorithm]
    sources: Mapping[str, str]
    """By parameter; `assumed` without one."""

    def described(self) -> dict[str, Any]:
        """Return every parameter with its source."""
        values = {**vars(self), "algorithms": [vars(one) for one in self.algorithms]}
        return {name: {"value": values[name], "source": source} for name, source in self.sources.items()}


@dataclass(frozen=True)
class NcclLink:
    """Links between GPUs under NCCL, which takes the fastest algorithm for each collective."""

    node: Node
    ranks: int
    assumed: Assumptions

    @property
    def bytes_per_second(self) -> float:
        return self.assumed.link_share * self.node.ring_bandwidth(self.ranks)

    def seconds(self, exchange: Exchange) -> float:
        """Return the time of all calls of an exchange."""
        nodes = -(-self.ranks // self.node.gpus)
        sent = exchange.sent_bytes(self.ranks) / exchange.calls
        return exchange.calls * min(
            one.latency(exchange.collective, self.ranks, nodes) + sent / (one.share * self.bytes_per_second)
            for one in self.assumed.algorithms
            if one.kind == "ring" or exchange.collective == "all_reduce"
        )


def read_links(path: Path = FILE) -> tuple[Mapping[str, Node], Assumptions]:
    """Read all nodes and the assumptions.

    Raises:
        ValueError: a figure is not positive, or a share exceeds 1.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    nodes = {name: Node(**values) for name, values in content["nodes"].items()}
    assumptions = Assumptions(
        **{name: one["value"] for name, one in content["assumptions"].items()},
        algorithms=[Algorithm(**values) for values in content["nccl"]["algorithms"]],
        sources={
            **{name: one["source"] for name, one in content["assumptions"].items()},
            "algorithms": content["nccl"]["source"],
        },
    )
    algorithms = {f"{one.kind} {one.protocol}": one for one in assumptions.algorithms}
    for name, checked in {**nodes, **algorithms, "assumptions": assumptions}.items():
        for key, value in vars(checked).items():
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{path}: {name}.{key} must be positive, got {value}")
            if key.endswith("share") and value > 1:
                raise ValueError(f"{path}: {name}.{key} must be at most 1, got {value}")
    return nodes, assumptions
