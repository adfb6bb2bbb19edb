"""One rank of the ghost-pass proof: trains a tiny nested VAE at ratios no other rank draws, saves it.

Started twice by `test_ghost_pass.py` with RANK, WORLD_SIZE and MASTER_PORT set: ghost_worker.py STAGE OUT.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from cat_fast.tokenizer import NestedAutoencoderKL

RATIOS = (2, 4, 8)
STEPS = 4
LR = 1e-3


def tiny_model() -> NestedAutoencoderKL:
    torch.manual_seed(0)
    return NestedAutoencoderKL(
        sample_size=16,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_num_layers=1,
        mid_block_attention_head_dim=16,
        ratios=RATIOS,
    )


def ratio_of(step: int, rank: int) -> int:
    """Two ranks never draw the same one."""
    return RATIOS[(step + rank) % len(RATIOS)]


def pictures_of(step: int, rank: int) -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(10 * step + rank)) * 2 - 1


def loss_of(model: torch.nn.Module, step: int, rank: int, ghost_pass: bool = True) -> torch.Tensor:
    pictures = pictures_of(step, rank)
    output, _ = model(pictures, ratio_of(step, rank), sample_posterior=False, ghost_pass=ghost_pass)
    return (output - pictures).square().mean()


def main(stage: int, bucket: int, out: Path) -> None:
    from cat_fast.training import distributed
    from cat_fast.training.engine import make_engine, set_learning_rate
    from cat_fast.training.settings import OptimizerConfig

    ranks = distributed.start()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        zero = {"stage": stage, "reduce_bucket_size": bucket, "overlap_comm": False}
        json.dump({"zero_optimization": zero}, file)
        file.flush()
        optimizer = OptimizerConfig(lr=LR, weight_decay=0.1, max_grad_norm=1e9)
        engine = make_engine(tiny_model(), optimizer, file.name)
    for step in range(STEPS):
        set_learning_rate(engine, LR)
        engine.backward(loss_of(engine, step, ranks.rank))
        engine.step()
    if ranks.is_main:
        save_file({k: v.contiguous() for k, v in engine.module.state_dict().items()}, out)
    ranks.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
