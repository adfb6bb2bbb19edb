"""Links, prices and failure rates of clusters (`benchmarks/data/links.json`)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
    source: str

    def ring_bandwidth(self, ranks: int) -> float:
        """Return the bandwidth of a GPU in a ring over all ranks, with parallel rings on all adapters."""
        return self.nvlink if ranks <= self.gpus else min(self.nvlink, self.network)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Parameters without a data sheet."""

    link_share: float
    """Share of a link's bandwidth that collectives reach."""
    seconds_per_collective: float
    loader_images_per_second_per_core: float
    storage_bytes_per_second: float
    restart_seconds: float
    failure_hours_per_gpu: float
    source: str


def read_links(path: Path = FILE) -> tuple[Mapping[str, Node], Assumptions]:
    """Read all nodes and the assumptions.

    Raises:
        ValueError: a figure is not positive, or a share exceeds 1.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    nodes = {name: Node(**values) for name, values in content["nodes"].items()}
    assumptions = Assumptions(**content["assumptions"])
    for name, values in {**nodes, "assumptions": assumptions}.items():
        for key, value in vars(values).items():
            if not isinstance(value, str) and not value > 0:
                raise ValueError(f"{path}: {name}.{key} must be positive, got {value}")
    if assumptions.link_share > 1:
        raise ValueError(f"{path}: link_share must be at most 1, got {assumptions.link_share}")
    return nodes, assumptions
