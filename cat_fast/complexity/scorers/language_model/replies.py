"""Replies of language models: strict parsing, and the distribution of the score from token probabilities."""

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from cat_fast.complexity.rubric import from_scale
from cat_fast.complexity.score import Score, round_score
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration
from cat_fast.data.text_files import valid_text
from cat_fast.errors import UserError

MIN_NEW_TOKENS = 16
"""Tokens that "Score: 10 out of 10" needs at most."""

# Models often set the score in **bold**.
_BEFORE = r"\bscore[\s*_]*:[\s*_]*"
_STATEMENT = re.compile(
    _BEFORE + r"(?P<value>[0-9]+(?:[.,][0-9]+)?)(?!\w)"
    r"(?P<range>\s*(?:-|–|—|to\b|or\b)\s*[0-9]+)?"
    r"(?:[\s*_]*(?:out\s+of|of|/)[\s*_]*(?P<scale>[0-9]+))?",
    re.IGNORECASE,
)
_HEAD = re.compile(_BEFORE + r"(?P<digits>[0-9]+)(?P<rest>.*)\Z", re.IGNORECASE | re.DOTALL)
THOUGHT = "<think>", "</think>"
"""Marks of the thoughts of a reasoning model."""


@dataclass(frozen=True)
class Token:
    """A token of a reply, with the most probable tokens at its position."""

    text: str
    alternatives: Mapping[str, float]
    """Probability per token text, the token itself included."""


@dataclass(frozen=True)
class ModelReply:
    """Text of a reply, with its tokens if their probabilities are known."""

    text: str
    tokens: Sequence[Token] = ()
    complete: bool = True
    """False if the limit on its length cut the reply."""


@dataclass(frozen=True)
class ParsedReply:
    """Score and reasons in a reply."""

    value: int
    """Score on the scale of the prompt."""
    statement: int
    """Index of the first character of "Score: N"."""
    digits: int
    """Index of the first digit of N."""
    reasons: str


def parse_reply(reply: str, scale: int = 9) -> ParsedReply:
    """Parse the score from a reply such as "Score: 7 out of 9. There are ...".

    The text of a reasoning model up to "</think>" is ignored. A score out of another number, a fraction, a
    range and contradicting scores are invalid. "Score: N" counts only if "Score: N out of `scale`" does not
    occur.

    Raises:
        UserError: the reply contains no valid score.
    """
    opening, closing = THOUGHT
    start = reply.rfind(closing) + len(closing) if closing in reply else 0
    if opening in reply[start:]:
        raise _invalid("an unfinished thought in", reply, scale)
    found = list(_STATEMENT.finditer(reply, start))
    found = [match for match in found if match["scale"]] or found
    values = {_value_of(match, scale) for match in found}
    if len(values) > 1:
        raise _invalid("contradicting scores in", reply, scale)
    value = values.pop() if values else None
    if value is None:
        raise _invalid("no valid score in", reply, scale)
    first = found[0]
    reasons = reply[first.end() :].lstrip(" \t\r\n.,;:*_-–—")
    return ParsedReply(value, first.start(), first.start("value"), valid_text(" ".join(reasons.split())))


def token_distribution(tokens: Sequence[Token], value: int, scale: int) -> dict[int, float]:
    """Return the probability of each score where the reply has its score, not normalized.

    Scores whose tokens are not among the alternatives are missing. Where "10" consists of two tokens, the
    probability of "1" is divided by the token that follows it in the reply; if the reply has another score,
    the share is unknown, and neither 1 nor 10 is counted.

    Returns:
        An empty dictionary if the tokens do not spell a reply with the score `value`.
    """
    text = "".join(token.text for token in tokens)
    try:
        parsed = parse_reply(text, scale)
    except UserError:
        return {}
    if parsed.value != value:
        return {}
    ends = list(accumulate(len(token.text) for token in tokens))
    index = bisect_right(ends, parsed.digits)
    token = tokens[index]
    head = text[parsed.statement : ends[index] - len(token.text)]
    result: dict[int, float] = {}
    for alternative, probability in token.alternatives.items():
        match = _HEAD.match(head + alternative)
        found = int(match["digits"]) if match and len(match["digits"]) <= 2 else 0
        if not match or not 1 <= found <= scale:
            continue
        if found == 1 and scale == 10 and not match["rest"]:
            if alternative != token.text or index + 1 == len(tokens):
                continue
            zero = sum(p for t, p in tokens[index + 1].alternatives.items() if t.startswith("0"))
            result[10] = result.get(10, 0.0) + probability * min(zero, 1.0)
            probability *= 1 - min(zero, 1.0)
        result[found] = result.get(found, 0.0) + probability
    return result


def read_score(reply: ModelReply, scale: int, calibration: ScoreCalibration | None = None) -> Score:
    """Return the score on 1..9 of a reply to a prompt that asks for 1..`scale`.

    Uncalibrated, `score` is the replied integer, `expected` the expectation over the probabilities of all
    valid scores, and `confidence` their share within 0.5 of `score`; without probabilities they are the
    integer and None. A calibration maps `expected`; `score` is then its rounded value, and `confidence`
    follows from the error that the calibration measured.

    Raises:
        UserError: the reply contains no valid score, or a probability is not finite.
    """
    parsed = parse_reply(reply.text, scale)
    probabilities = token_distribution(reply.tokens, parsed.value, scale)
    total = sum(probabilities.values())
    if not math.isfinite(total):
        raise UserError("the model's probabilities are not finite; try another dtype")
    replied = from_scale(parsed.value, scale)
    shares = {from_scale(value, scale): p / total for value, p in probabilities.items()} if total else {}
    expected = sum(value * share for value, share in shares.items()) if shares else replied
    expected = min(max(expected, 1.0), 9.0)  # the shares may sum to more than 1 in the last bit
    if calibration:
        expected = calibration.apply(expected)
        confidence = calibration.confidence(expected)
        return Score(round_score(expected), expected, confidence, parsed.reasons)
    score = round_score(replied)
    near = sum(share for value, share in shares.items() if abs(value - score) <= 0.5)
    return Score(score, expected, min(near, 1.0) if shares else None, parsed.reasons)


def chat_reply(payload: Mapping[str, Any]) -> ModelReply:
    """Return the reply in a response of OpenAI's chat completions; token probabilities are optional.

    Raises:
        UserError: the response contains no text.
    """
    try:
        choice = payload["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str):
            raise TypeError
    except (KeyError, IndexError, TypeError):
        raise UserError("the response contains no reply; expected choices[0].message.content") from None
    logprobs = choice.get("logprobs")
    tokens = read_tokens(logprobs.get("content") if isinstance(logprobs, dict) else None)
    return ModelReply(text, tokens, choice.get("finish_reason") != "length")


def read_tokens(rows: Any) -> list[Token]:
    """Return the tokens of a JSON list of {"token", "logprob", "top_logprobs"}; empty if it is malformed."""
    try:
        return [
            Token(row["token"], _probabilities([*row.get("top_logprobs", []), row])) for row in rows or []
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _probabilities(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    result = {}
    for row in rows:
        if not isinstance(row["token"], str):
            raise TypeError
        result[row["token"]] = math.exp(min(float(row["logprob"]), 0.0))
    return result


def _value_of(match: re.Match[str], scale: int) -> int | None:
    """Return the score of a statement; None if it is not valid."""
    if match["range"] or not match["value"].isdecimal() or len(match["value"]) > 2:
        return None
    value = int(match["value"])
    return value if 1 <= value <= scale and match["scale"] in (None, str(scale)) else None


def _invalid(problem: str, reply: str, scale: int) -> UserError:
    shown = valid_text(" ".join(reply[:400].split())[:80])
    return UserError(
        f'{problem} the reply {shown!r}: expected "Score: N out of {scale}" with N from 1 to {scale}'
    )
