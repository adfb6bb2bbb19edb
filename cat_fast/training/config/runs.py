"""The kinds of runs, by the `task` key of their configurations."""

from cat_fast.training.config.dual_token import GuideRun, LanguageRun, SemanticRun
from cat_fast.training.config.settings import GeneratorRun, ProbeRun, RunConfig, TokenizerRun

RUNS: dict[str, type[RunConfig]] = {
    "tokenizer": TokenizerRun,
    "generator": GeneratorRun,
    "probe": ProbeRun,
    "dual_guide": GuideRun,
    "dual_semantic": SemanticRun,
    "dual_language": LanguageRun,
}
