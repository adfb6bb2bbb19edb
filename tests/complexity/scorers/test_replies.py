"""Strict parsing of replies, and scores from token probabilities."""

import math

import pytest

from cat_fast.complexity.scorers.language_model.replies import (
    ModelReply,
    Token,
    chat_reply,
    parse_reply,
    read_score,
    read_tokens,
    token_distribution,
)
from cat_fast.errors import UserError


@pytest.mark.parametrize(
    ("reply", "score", "reasons"),
    [
        ("Score: 7 out of 9", 7, ""),
        ("score:1", 1, ""),
        ("**Score:** 9 out of 9\nbecause there is\n much text.", 9, "because there is much text."),
        ("Sure! Score: **4** out of 9. I also thought of Score: 5.", 4, "I also thought of Score: 5."),
        ("Complexity score: 6/9 - many objects", 6, "many objects"),
        ("Score: 5 of 9, plain\ud800", 5, "plain\ufffd"),
        ("<think>maybe Score: 2 out of 9</think>\n\nScore: 8 out of 9", 8, ""),
    ],
)  # fmt: skip
def test_scores_and_reasons_are_parsed(reply: str, score: int, reasons: str) -> None:
    parsed = parse_reply(reply)
    assert (parsed.value, parsed.reasons) == (score, reasons)
    assert reply[parsed.digits] == str(score)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "seven",
        "7",
        "Score: ? out of 9",
        "Score: N out of 9",
        "Score: 0 out of 9",
        "Score: 70",
        "Score: 7.5",
        "Score: 7,5 out of 9",
        "Score: -3",
        "Score: 7 out of 10",
        "Score: 6-8 out of 9",
        "Score: 6 to 8",
        "Score: 6 or 7 out of 9",
        "Score: 3 out of 9. No: Score: 8 out of 9.",
        "Score: 3. Score: 4.",
        "Score: 7th",
        "Score: ７",
        "<think>Score: 5 out of 9",
        "the score is high \U0001f600" * 50,
    ],
)
def test_replies_without_one_valid_score_are_refused(reply: str) -> None:
    with pytest.raises(UserError, match='expected "Score: N out of 9"') as raised:
        parse_reply(reply)
    assert len(str(raised.value)) < 250


def test_a_scale_to_ten_has_its_own_valid_scores() -> None:
    assert parse_reply("Score: 10 out of 10", 10).value == 10
    with pytest.raises(UserError, match="out of 10"):
        parse_reply("Score: 7 out of 9", 10)


def reply_of(*tokens: str | dict[str, float]) -> ModelReply:
    """Return a reply whose tokens are texts, or alternatives of which the first is the token."""
    rows = [Token(t, {t: 1.0}) if isinstance(t, str) else Token(next(iter(t)), t) for t in tokens]
    return ModelReply("".join(row.text for row in rows), rows)


def test_digits_with_and_without_a_space_are_one_score() -> None:
    reply = reply_of(
        "Score", ":", {" 7": 0.4, "7": 0.1, " 6": 0.2, " eight": 0.2, " 8.": 0.05, " 77": 0.05}, " out of 9"
    )
    assert token_distribution(reply.tokens, 7, 9) == pytest.approx({7: 0.5, 6: 0.2, 8: 0.05})
    score = read_score(reply, 9)
    assert score.score == 7
    assert score.expected == pytest.approx((7 * 0.5 + 6 * 0.2 + 8 * 0.05) / 0.75)
    assert score.confidence == pytest.approx(0.5 / 0.75)


def test_a_token_of_its_own_for_the_space_is_no_obstacle() -> None:
    reply = reply_of("Score:", " ", {"3": 0.6, "4": 0.4}, " out", " of", " ", {"9": 0.9, "1": 0.1})
    score = read_score(reply, 9)
    assert (score.score, score.expected, score.confidence) == (3, pytest.approx(3.4), pytest.approx(0.6))


def test_a_ten_of_two_tokens_shares_the_probability_of_its_one() -> None:
    reply = reply_of("Score: ", {"1": 0.8, "9": 0.2}, {"0": 0.75, " out": 0.25}, " out of 10")
    assert token_distribution(reply.tokens, 10, 10) == pytest.approx({10: 0.6, 1: 0.2, 9: 0.2})
    score = read_score(reply, 10)
    assert score.score == 9
    assert score.expected == pytest.approx(9 * 0.6 + 1 * 0.2 + (1 + 8 * 8 / 9) * 0.2)
    assert score.confidence == pytest.approx(0.6)
    # A reply of 9 does not show how the 1 would have continued.
    other = reply_of("Score: ", {"9": 0.6, "1": 0.3, "8": 0.1}, " out of 10")
    assert token_distribution(other.tokens, 9, 10) == pytest.approx({9: 0.6, 8: 0.1})
    whole = reply_of("Score: ", {"10": 0.6, "9": 0.4}, " out of 10")
    assert token_distribution(whole.tokens, 10, 10) == pytest.approx({10: 0.6, 9: 0.4})


def test_without_probabilities_the_integer_is_the_expected_score() -> None:
    score = read_score(ModelReply("Score: 4 out of 9"), 9)
    assert (score.score, score.expected, score.confidence) == (4, 4.0, None)
    other_text = reply_of("Score: ", {"5": 0.9, "6": 0.1})
    assert read_score(ModelReply("Score: 4 out of 9", other_text.tokens), 9).expected == 4


def test_probabilities_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        read_score(reply_of("Score: ", {"5": math.nan}), 9)


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"choices": []},
        {"choices": [{"message": {"content": None}}]},
        {"choices": {"a": 1}},
        {"choices": [7]},
    ],
)
def test_responses_without_a_reply_are_refused(payload: dict) -> None:
    with pytest.raises(UserError, match="contains no reply"):
        chat_reply(payload)


@pytest.mark.parametrize(
    "rows", [None, 3, "x", [3], [{"token": 3, "logprob": 0}], [{"token": "a", "logprob": "b"}]]
)
def test_malformed_probabilities_are_not_used(rows: object) -> None:
    assert read_tokens(rows) == []
