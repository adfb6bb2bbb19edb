"""Groups of captions by the words they contain, to find kinds of wording that scorers get wrong."""

import re
from collections.abc import Callable


def _contains(words: str) -> Callable[[str], bool]:
    pattern = re.compile(rf"\b({words})\b", re.IGNORECASE)
    return lambda caption: pattern.search(caption) is not None


def _length(low: int, high: int) -> Callable[[str], bool]:
    return lambda caption: low <= len(caption.split()) <= high


WORD_GROUPS: dict[str, Callable[[str], bool]] = {
    "up to 5 words": _length(1, 5),
    "6 to 12 words": _length(6, 12),
    "13 or more words": _length(13, 10**6),
    "text": _contains(
        "signs?|text|letters?|words?|numbers?|posters?|books?|newspapers?|labels?|logos?|page|menu|screen"
    ),
    "people": _contains("man|men|woman|women|people|person|boys?|girls?|child|children|kids?|baby|players?"),
    "faces": _contains("faces?|portrait|smil\\w+|selfie|headshot|eyes"),
    "numerous": _contains("many|several|crowd\\w*|lots|group|rows?|piles?|full|various|filled|packed"),
    "sparse": _contains("single|empty|plain|blank|solid|simple|lone|alone|clear|minimal\\w*"),
    "viewpoint": _contains("aerial|close-?up|close|view|above|macro|satellite|background"),
    "style": _contains("painting|drawing|cartoon|illustration|sketch|render\\w*|abstract|style|art"),
}
"""Functions from a caption to whether it is in the group, by name; groups overlap."""
