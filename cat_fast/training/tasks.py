"""Which task trains which kind of run."""

from cat_fast.training.config.settings import GeneratorRun, RunConfig, TokenizerRun
from cat_fast.training.loop import Task
from cat_fast.training.runtime.ranks import Ranks


def make_task(config: RunConfig, ranks: Ranks) -> Task:
    if isinstance(config, TokenizerRun):
        from cat_fast.training.tokenizer.task import TokenizerTask

        return TokenizerTask(config, ranks)
    if isinstance(config, GeneratorRun):
        from cat_fast.training.generator.task import GeneratorTask

        return GeneratorTask(config, ranks)
    raise TypeError(f"no task trains a {type(config).__name__}")
