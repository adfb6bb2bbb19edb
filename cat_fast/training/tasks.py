"""Choice of the task for a run's configuration."""

from cat_fast.training.config.dual_token import GuideRun, LanguageRun, SemanticRun
from cat_fast.training.config.settings import GeneratorRun, ProbeRun, RunConfig, TokenizerRun
from cat_fast.training.loop import Task
from cat_fast.training.runtime.ranks import Ranks


def make_task(config: RunConfig, ranks: Ranks) -> Task:
    if isinstance(config, TokenizerRun):
        from cat_fast.training.tokenizer.task import TokenizerTask

        return TokenizerTask(config, ranks)
    if isinstance(config, GeneratorRun):
        from cat_fast.training.generator.task import GeneratorTask

        return GeneratorTask(config, ranks)
    if isinstance(config, ProbeRun):
        from cat_fast.training.probe.task import ProbeTask

        return ProbeTask(config, ranks)
    if isinstance(config, GuideRun):
        from cat_fast.training.dual_token.guide_task import GuideTask

        return GuideTask(config, ranks)
    if isinstance(config, SemanticRun):
        from cat_fast.training.dual_token.semantic_task import SemanticTask

        return SemanticTask(config, ranks)
    if isinstance(config, LanguageRun):
        from cat_fast.training.dual_token.language_task import LanguageTask

        return LanguageTask(config, ranks)
    raise TypeError(f"expected one of the classes in RUNS, got {type(config).__name__}")
