"""One of two ranks that train a small tokenizer in balanced mode and record their metrics and peak memory.

`run_ranks` starts `main(FOLDER)` once per rank.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cat_fast.config import fill, read_yaml
from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.training.config.settings import TokenizerRun

ROOT = Path(__file__).parents[3]
STEPS = 3
OVERRIDES = [
    "seed=7",
    "model.block_out_channels=[16,16,32,32,64,64]",
    "model.norm_num_groups=4",
    "model.mid_block_attention_head_dim=64",
    "data.image_size=64",
    "data.max_side=64",
    "data.batch_size=4",
    "perceptual_crop=0",
    "sampler.mode=balanced",
    "sampler.max_wait=0.2",
    "loss.gan_weight=0.0",
    "optimizer.lr=1e-3",
    "optimizer.max_grad_norm=1e9",
    "schedule.kind=constant",
    "schedule.warmup_steps=0",
]


def settings(folder: Path) -> TokenizerRun:
    """Return the configuration of the run; its files are written to `folder`."""
    CostTable(costs={8: Cost(1.0, 3.0), 16: Cost(1.0, 1.5), 32: Cost(1.0, 1.0)}).write(folder / "costs.json")
    zero = {"stage": 2, "reduce_bucket_size": 50_000, "overlap_comm": False}
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    files = [f"sampler.cost_table={folder / 'costs.json'}", f"deepspeed={folder / 'zero.json'}"]
    values = read_yaml(ROOT / "configs/tokenizer/nano.yaml")
    return fill(TokenizerRun, values, [*OVERRIDES, f"output_dir={folder}", *files])


def live_bytes(profile: torch.profiler.profile) -> list[int]:
    """Return the bytes held from torch's CPU allocator after each allocation or deallocation."""
    total, found = 0, []
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            total += event.nbytes()
            found.append(total)
    return found


def main(name: str) -> None:
    from cat_fast.training.runtime.ranks import start, stop
    from cat_fast.training.tokenizer.task import TokenizerTask
    from tests.training.steps import train_step

    folder, ranks = Path(name), start()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        task = TokenizerTask(settings(folder), ranks)
        metrics = [train_step(task, step) for step in range(STEPS)]
    record = {"metrics": metrics, "peak": max(live_bytes(profile))}
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(record))
    if ranks.is_main:
        weights = {k: v.contiguous() for k, v in task.trainer.engine.module.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
    ranks.barrier()
    stop()
