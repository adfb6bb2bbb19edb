"""Worker that resumes from checkpoints of another number of ranks.

`run_ranks` starts `main(LATENTS, GANS, GENERATORS, OUT)`. GANS and GENERATORS are output folders of
`gan_worker.py` and `generator_worker.py`, or OUT/gans and OUT/generators of this worker. Output per case:
`loaded`, the full state right after loading; `rank<r>`, the weights on each rank; `saved`, the state two
steps later; `half`, its checkpoint.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from cat_fast.training.runtime.ranks import Ranks, start, stop
from tests.training.engine_state import forward_weights
from tests.training.generator import generator_case
from tests.training.generator.generator_worker import GeneratorTraining
from tests.training.tokenizer import gan_case
from tests.training.tokenizer.gan_worker import Training

GANS = ("zero1", "zero2_bf16")
GENERATORS = ("zero1", "zero2_images", "zero3", "zero3_in_pieces")


def resume(training: Any, engines: dict[str, Any], source: Path, folder: Path, ranks: Ranks) -> None:
    training.load(source / "half")
    loaded = training.state()
    held = {k: v for prefix, engine in engines.items() for k, v in forward_weights(engine, prefix).items()}
    if ranks.is_main:
        (folder / "half").mkdir(parents=True)
        save_file(loaded, folder / "loaded.safetensors")
    ranks.barrier()
    save_file(held, folder / f"rank{ranks.rank}.safetensors")
    for step in (generator_case.CHECKPOINT_STEP, generator_case.CHECKPOINT_STEP + 1):
        training.step(step)
    training.save(folder / "half")
    saved = training.state()
    if ranks.is_main:
        save_file(saved, folder / "saved.safetensors")


def main(*folders: str) -> None:
    latents, gans, generators, out = map(Path, folders)
    ranks = start()
    own = out / f"rank{ranks.rank}"
    own.mkdir(parents=True)
    for case in gan_case.CASES:
        if case.name in GANS:
            training = Training(case, own, ranks)
            engines = {"model": training.trainer.engine, "discriminator": training.trainer.discriminator}
            resume(training, engines, gans / case.name, out / "gans" / case.name, ranks)
    for case in generator_case.CASES:
        if case.name in GENERATORS:
            training = GeneratorTraining(case, own, latents, ranks)
            engines = {"model": training.task.engine}
            resume(training, engines, generators / case.name, out / "generators" / case.name, ranks)
    ranks.barrier()
    stop()
