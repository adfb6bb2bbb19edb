"""Effects of single words and flags on a score, for any scorer."""

from dataclasses import replace

from cat_fast.complexity.description import Description
from cat_fast.complexity.score import Scorer, require_scores

EXPLAINED_WORDS = 64
"""Number of first words whose effects are computed."""


def contributions(scorer: Scorer, description: Description) -> list[tuple[str, float]]:
    """Return (word or flag, change of the expected score by it) pairs, largest magnitude first.

    A word's change is against the caption without it, a given flag's against the flag unknown.
    """
    words = description.caption.split()
    changed = {
        f'word "{word}"': replace(description, caption=" ".join(words[:i] + words[i + 1 :]))
        for i, word in enumerate(words[:EXPLAINED_WORDS])
        if len(words) > 1
    }
    if description.has_text is not None:
        changed["has text"] = replace(description, has_text=None)
    if description.has_faces is not None:
        changed["has faces"] = replace(description, has_faces=None)
    whole, *others = (score.expected for score in require_scores(scorer, [description, *changed.values()]))
    effects = [(name, whole - other) for name, other in zip(changed, others, strict=True)]
    return sorted(effects, key=lambda effect: -abs(effect[1]))
