"""Simulate the paper's two training runs on 8 to 1024 GPUs: hours, GPU-hours, cost and the best ZeRO stage.

    python -m benchmarks.scaling --json FILE [--table FILE]

Nothing here is measured on a GPU. A rank's computing time is the prediction of `benchmarks.roofline` from
data sheets, or the time that the host needs to launch the operators, if that is longer. Links, prices and
failures are those of `benchmarks/data/links.json`, the loader's rate that of its committed results. The
sampler's waits are those of its plans, `per_rank` and `balanced`; batches of the transformer are packed and
hardly wait. A rank accumulates batches if its images do not fit into memory at once. Both runs keep the
number of images or tokens of the paper. With more GPUs than its global batch has images, or tokens for a
batch of 4096 per GPU, the global batch grows and the number of steps falls, which is stated.

`--table` takes the tokenizer's costs, measured with `cat-fast plan cost`, for the GPU that measured them.
`python -m benchmarks.scaling_validation` compares the model with runs on two processes.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bounds.data_sheets import read_sheets
from benchmarks.cluster.links import read_links
from benchmarks.cluster.simulation import RUNS, Cluster, best, simulate_run
from benchmarks.cluster.work import Work, measured_on, measured_work, predicted_works
from benchmarks.documents.tables import markdown
from benchmarks.shared.committed import committed
from benchmarks.shared.compact_json import write_compact
from benchmarks.shared.harness import rounded
from benchmarks.shared.mixes import TOKENIZER_TRAINING
from cat_fast import console
from cat_fast.data.files import require_writable
from cat_fast.data.sampling.cost_table import CostTable
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

WORLD_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def clusters() -> tuple[dict[str, Cluster], dict[str, Any]]:
    """Return the clusters by GPU, and all assumptions with their sources.

    Raises:
        UserError: there are no committed results of the loader.
    """
    nodes, assumed = read_links()
    sheets, _ = read_sheets()
    rate, source = loader_rate()
    found = {
        gpu: Cluster(node=node, sheet=sheets[gpu], assumed=assumed, loader_rate=rate)
        for gpu, node in nodes.items()
    }
    loader = {"loader_images_per_second_per_core": {"value": rate, "source": source}}
    return found, assumed.described() | loader


def loader_rate() -> tuple[float, str]:
    """Return the images that a core decodes per second, measured with the most workers, and the file."""
    path = committed("loader")
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"].values()
    most = max(cases, key=lambda case: case["details"]["workers"])
    details = most["details"]
    images = most["rates"].get("images", details.get("images_per_second"))  # older results have the latter
    return images / details["workers"], f"benchmarks/results/{path.name}"


def simulate_all(
    works: Mapping[tuple[str, str], Work],
    by_gpu: Mapping[str, Cluster],
    sizes: Sequence[int] = WORLD_SIZES,
) -> dict[str, Any]:
    """Return the columns, and by run and GPU all rows and the best stages per number of GPUs.

    Args:
        works: by GPU and by `tokenizer` or `transformer`.
        by_gpu: clusters.
        sizes: numbers of GPUs.
    """
    columns: list[str] = []
    runs: dict[str, Any] = {}
    for run in RUNS:
        for gpu, cluster in by_gpu.items():
            work = works[gpu, run.name.split(",")[0]]
            rows, stages = [], {}
            for ranks in sizes:
                found = [simulate_run(run, work, cluster, ranks, stage) for stage in run.stages]
                columns = list(found[0])
                rows += [list(row.values()) for row in found]
                stages[str(ranks)] = [row["stage"] for row in best(found)]
            runs[f"{run.name} on {gpu}"] = {"costs": work.source, "best_stages": stages, "rows": rows}
    return {"columns": columns, "runs": runs}


def lines(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of a Markdown table of the best stages per number of GPUs."""
    header = ("run", "GPUs", "ZeRO", "batch", "step, ms", "computing, ms", "ranks wait, ms",
              "communication, ms", "of the discriminator, ms", "data wait, ms", "sent per GPU, GB",
              "failures", "lost, h", "hours", "GPU-hours", "assumed cost")  # fmt: skip
    table: list[list[str]] = []
    for name, found in report["runs"].items():
        rows = [dict(zip(report["columns"], row, strict=True)) for row in found["rows"]]
        for ranks, stages in found["best_stages"].items():
            if stages:
                row = next(row for row in rows if (str(row["ranks"]), row["stage"]) == (ranks, stages[0]))
                cells = _cells(row, stages)
            else:
                cells = ["does not fit", *[""] * (len(header) - 3)]
            table.append([name, ranks, *cells])
    return markdown(header, table).splitlines()


def _cells(row: Mapping[str, Any], stages: Sequence[int]) -> list[str]:
    """Return the cells of a row from the stage on."""
    parts = f" x {row['accumulation']}" if row["accumulation"] > 1 else ""
    lost = row["lost_hours"] + row["restart_hours"] + row["checkpoint_hours"]
    return [
        " = ".join(map(str, stages)),
        f"{row['batch']}{parts}" + ("" if row["global_batch_of_the_paper"] else " *"),
        _milliseconds(row["step_ms"]),
        _milliseconds(row["computing_ms"]) + (" †" if row["host_bound"] else ""),
        *(
            _milliseconds(row[key])
            for key in ("ranks_wait_ms", "communication_ms", "second_engine_ms", "data_wait_ms")
        ),
        f"{row['nvlink_gb']:.3g}",
        f"{row['failures']:.2g}",
        f"{lost:.2g}",
        f"{row['hours']:,.1f}",
        f"{row['gpu_hours']:,.0f}",
        f"{row['cost']:,.0f}",
    ]


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{round(value, 2):.3g}"


NOTES = (
    "= marks stages whose hours differ by less than 1 %, of which the first is shown",
    "* the global batch is larger than the paper's, with fewer steps for as many images",
    "† launching operators takes the host longer than the GPU needs to compute them",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print and write. Return 2 for invalid usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="cost table in seconds per step")
    given = parser.parse_args(arguments)
    try:
        if given.json:
            require_writable(given.json)
        by_gpu, assumptions = clusters()
        table = CostTable.read(given.table) if given.table else None
        measured = measured_on(table, by_gpu, f"--table {given.table}") if table else None
        works = predicted_works()
        if table and measured:
            works[measured, "tokenizer"] = measured_work(
                works[measured, "tokenizer"], table, f"measured: {given.table.name}"
            )
    except UserError as error:
        console.print_error(error)
        return 2
    report = {
        "about": {
            "benchmark": "scaling",
            "measured": f"the tokenizer's steps on {measured}" if measured else "nothing",
            "assumptions": assumptions,
            "shares": {f"{ratio}x": share for ratio, share in TOKENIZER_TRAINING.items()},
        },
        "nodes": {gpu: asdict(cluster.node) for gpu, cluster in by_gpu.items()},
        **simulate_all(works, by_gpu),
    }
    print("\n".join([*lines(report), *NOTES]))
    if given.json:
        write_compact(given.json, rounded(report))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
