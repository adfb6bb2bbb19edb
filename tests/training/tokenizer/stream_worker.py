"""One of two ranks that train the tokenizer from shards, uninterrupted and resumed.

`run_ranks` starts `main(SHARDS, OUT)` once per rank.
"""

from pathlib import Path

NANO = Path(__file__).parents[3] / "configs/tokenizer/nano.yaml"
TINY = [
    "model.block_out_channels=[4,4,8,8,8,8]",
    "model.norm_num_groups=2",
    "model.latent_channels=4",
    "model.mid_block_attention_head_dim=8",
    "data.image_size=32",
    "data.batch_size=2",
    "perceptual_crop=32",
    "discriminator.resolution=16",
    "discriminator.channel_base=128",
    "discriminator.channel_max=16",
    "loss.gan_loss_starting_step=3",
    "schedule.kind=constant",
    "schedule.warmup_steps=2",
    "sampler.pool=own_ratio",
]
RUNS = {"straight": [(9, 1)], "stopped": [(5, 0), (9, 1)]}
"""Per folder, a list of (last step, number of decoding processes)."""


def main(shards: str, out: str) -> None:
    # Imported here to keep importing this module cheap.
    from cat_fast.config import fill, read_yaml
    from cat_fast.training import loop
    from cat_fast.training.config.settings import TokenizerRun
    from cat_fast.training.runtime.ranks import start, stop
    from cat_fast.training.tasks import make_task

    ranks = start()
    for name, parts in RUNS.items():
        for steps, workers in parts:
            data = [f"data.shards={shards}", f"data.stream.workers={workers}"]
            buffer = ["data.stream.shuffle_images=3"]
            run = [f"output_dir={out}/{name}", f"schedule.total_steps={steps}"]
            config = fill(TokenizerRun, read_yaml(NANO), [*TINY, *data, *buffer, *run])
            task = make_task(config, ranks)
            loop.run(task, config, ranks)
    stop()
