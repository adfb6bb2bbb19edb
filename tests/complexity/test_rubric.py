"""The rubric's examples and prompts, and strict parsing of replies."""

import pytest

from cat_fast.complexity import Description, parse_score, prompt, read_scored, rubric_text
from cat_fast.complexity.rubric import ANCHORS
from cat_fast.errors import UserError


def test_every_score_has_an_anchor_with_that_score_among_the_captions() -> None:
    descriptions, values = read_scored()
    scores = {d.caption: value for d, value in zip(descriptions, values, strict=True)}
    assert list(ANCHORS) == list(range(1, 10))
    assert {score: scores[anchor.caption] for score, anchor in ANCHORS.items()} == {
        s: s for s in range(1, 10)
    }


def test_prompts_share_the_rubric_as_prefix_and_include_the_description() -> None:
    prompts = [
        prompt(Description("a clock\n tower", has_text, has_faces))
        for has_text in (False, True)
        for has_faces in (False, True)
    ]
    assert len(set(prompts)) == 4
    for text in prompts:
        assert text.startswith(rubric_text())
        assert "a clock tower. " in text[len(rubric_text()) :]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7 out of 9", 7),
        ("score:1", 1),
        ("**Score:** 9 out of 9\nbecause there is much text.", 9),
        ("Sure! Score: **4** out of 9. On another day I might give Score: 5.", 4),
    ],
)
def test_scores_are_parsed_from_replies(reply: str, score: int) -> None:
    assert parse_score(reply) == score


@pytest.mark.parametrize(
    "reply",
    ["", "seven", "Score: ? out of 9", "Score: 0 out of 9", "Score: 70", "Score: 7.5", "Score: -3", "7"],
)
def test_replies_without_a_score_are_rejected(reply: str) -> None:
    with pytest.raises(UserError, match="Score: N out of 9"):
        parse_score(reply)
