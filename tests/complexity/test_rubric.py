"""The rubric: published content, examples on the scale of the rated captions, scales to 9 and to 10."""

import re
from itertools import pairwise
from statistics import mean

import pytest

from cat_fast.complexity.rated_captions import read_rated
from cat_fast.complexity.rubric import ANCHORS, flag_sentence, from_scale, rubric_text, to_scale
from cat_fast.errors import UserError

NEAR = {
    1: r"(plane|jet).* in .*(clear|blue|empty|cloudless) sky|distant airplane",
    2: r"t-shirt with an emoji|t-shirt with a (dinosaur|dog|cat|heart)",
    3: r"dog (is )?(laying|lying|stretched out) (down )?(on|in) (the |some )?(grass|lawn)",
    4: r"woman .*(ski(s|ing)) .*(slope|hill|snow)",
    5: r"(kids|children) (walking|strolling|playing).* beach",
    6: r"(dining|dinner)? ?table (full|covered|filled|topped) (of|with) .*(dishes|plates|food|foods)",
    7: r"close.?up .*(old|elderly) (man|woman)|^an (old|elderly) (man|woman)$",
    8: r"(crowd of|many) people .*(gathered|gathering|watching|stadium|standing)",
    9: r"newspaper (front )?page|wall of newspapers|trading screen|dashboard with",
}
"""Rated captions that mean nearly the same as each example."""


@pytest.mark.parametrize("score", range(1, 10))
def test_examples_have_the_scores_of_near_captions(score: int) -> None:
    ratings = [
        row.mean
        for row in read_rated()
        if re.search(NEAR[score], row.description.caption, re.IGNORECASE)
        and len(row.description.caption) < 90
    ]
    assert ratings
    assert abs(mean(ratings) - score) <= 1
    assert list(ANCHORS)[score - 1] == score


def test_the_rubric_has_the_published_content() -> None:
    text = " ".join(rubric_text().split())
    for factor in ("Objects", "Colours", "Texture", "Foreground and background", "Symmetry", "perception"):
        assert factor in text
    assert (
        "Text and facial details are complex by themselves, because human perception depends on them" in text
    )
    assert "512 x 512 pixels" in text
    assert '"Score: N out of 9", where N is that integer; then give the reasons' in text
    for score, anchor in ANCHORS.items():
        assert f"{score}: {anchor}" in text


def test_each_combination_of_flags_has_its_sentence() -> None:
    flags = (False, True, None)
    sentences = {(t, f): flag_sentence(t, f) for t in flags for f in flags}
    assert len(set(sentences.values())) == 9
    for (has_text, has_faces), sentence in sentences.items():
        assert ("caption must show" in sentence) == (None in (has_text, has_faces))


def test_a_scale_to_ten_maps_to_nine_with_equal_ends() -> None:
    assert [from_scale(value, 9) for value in range(1, 10)] == list(range(1, 10))
    mapped = [from_scale(value, 10) for value in range(1, 11)]
    assert (mapped[0], mapped[-1]) == (1, 9)
    assert all(b - a == pytest.approx(8 / 9) for a, b in pairwise(mapped))
    assert [round(from_scale(to_scale(score, 10), 10)) for score in ANCHORS] == list(ANCHORS)
    assert "10: newspapers" in rubric_text(10)
    assert "out of 10" in rubric_text(10)
    with pytest.raises(UserError, match=r"must be 9 .* or 10"):
        rubric_text(5)
