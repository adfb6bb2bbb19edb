"""Scoring rubric for complexity scores 1 to 9, for human raters and for language models.

The wording is this project's own. The factors (objects, colours, texture, depth, regularity, human
perception) and the reply format are those of the published method.
"""

import re

from cat_fast.complexity.description import Description
from cat_fast.data.images.label_fields import SCORES
from cat_fast.errors import UserError

ANCHORS = {
    1: Description("a gradient from blue to white"),
    2: Description("a black cat sitting on a white bedsheet"),
    3: Description("metal digits reading 640 on plaster", has_text=True),
    4: Description("white and gray marble with thin veins"),
    5: Description("a rope bridge over a jungle river"),
    6: Description("a buffet with platters of cheese, cold cuts, fruit, bread and salads"),
    7: Description("a refrigerator covered in magnets, photos, notes and a calendar", has_text=True),
    8: Description("a trade fair hall with booths, banners and visitors", has_text=True, has_faces=True),
    9: Description("a newspaper front page with a large headline and several columns of text", has_text=True),
}
"""One example per score, all taken from the packaged scored captions."""

_FACTORS = (
    "Objects: a few things, or many different ones?",
    "Colour: a few flat colours, or many that change from place to place?",
    "Texture: smooth surfaces, or fine structure such as fur, foliage, fabric or print?",
    "Depth: one subject against an empty background, or detail from front to back?",
    "Regularity: do symmetry and repetition make the rest of the image easy to guess from a part?",
    "Perception: do people notice small errors at once, as they do in faces, letters and digits?",
)

_FLAG_SENTENCES = {
    (False, False): "Neither text nor a face can be seen in the image.",
    (True, False): "Text or a number can be seen in the image, but no face.",
    (False, True): "A face can be seen in the image, but neither text nor a number.",
    (True, True): "Both a face and text or a number can be seen in the image.",
}

# Models often set the score in **bold**.
_REPLY = re.compile(r"\bscore[\s*]*:[\s*]*(\d+)\b(?!\.\d)", re.IGNORECASE)


def rubric_text() -> str:
    """Return the rubric: the factors, the scale with one example per score, and the reply format."""
    return "\n".join(
        [
            "Rate how much detail an image contains, given its description. More detail means that a faithful"
            " copy needs more storage. Consider:",
            *(f"- {factor}" for factor in _FACTORS),
            "",
            "Give an integer from 1 (almost nothing to draw) to 9 (as dense as images get). Examples:",
            *(f"{score}: {_one_line(anchor)}" for score, anchor in ANCHORS.items()),
            "",
            'Begin the reply with "Score: N out of 9", where N is that number; then give the reasons.',
        ]
    )


def prompt(description: Description) -> str:
    """Return the prompt for a language model; the description comes last, so that prefix caches help."""
    return f"{rubric_text()}\n\nThe image: {_one_line(description)}\n"


def parse_score(reply: str) -> int:
    """Parse the score 1..9 from a reply such as "Score: 7 out of 9. There are ...".

    Raises:
        UserError: the reply contains no valid score.
    """
    found = _REPLY.search(reply)
    score = int(found.group(1)) if found else 0
    if score not in SCORES:
        shown = " ".join(reply.split())[:80]
        raise UserError(f'no score in the reply {shown!r}: expected "Score: N out of 9" with N from 1 to 9')
    return score


def _one_line(description: Description) -> str:
    caption = " ".join(description.caption.split())
    stop = "" if caption.endswith((".", "!", "?")) else "."
    return f"{caption}{stop} {_FLAG_SENTENCES[bool(description.has_text), bool(description.has_faces)]}"
