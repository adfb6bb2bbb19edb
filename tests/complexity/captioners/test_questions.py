"""Prompts of captioners, and the reading of their replies."""

import json
from pathlib import Path

import pytest

from cat_fast.complexity import Description, rubric_text
from cat_fast.complexity.captioners.questions import (
    SHORT_CAPTION,
    Question,
    QuestionSet,
    parse_answer,
    read_caption,
)
from cat_fast.complexity.captioners.unified import parse_description
from cat_fast.complexity.rubric import ANCHORS, criteria_text, unified_text
from cat_fast.complexity.scorers.language_model.replies import ModelReply
from cat_fast.errors import UserError


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("yes", True),
        ("No.", False),
        (" **Yes**, there is a sign.", True),
        ("no, nobody", False),
        ("The answer is: no", False),
        ("There is text on the wall.", True),
        ("There are no faces.", False),
        ("There is not any text", False),
        ("<think>No? Yes, a sign.</think>\nYes", True),
    ],
)
def test_answers(reply: str, expected: bool) -> None:
    assert parse_answer(ModelReply(reply)) is expected


@pytest.mark.parametrize("reply", ["", "maybe", "Notably, a sign", "I see a yes sign", "<think>Yes", "1"])
def test_unclear_answers_are_invalid(reply: str) -> None:
    with pytest.raises(UserError):
        parse_answer(ModelReply(reply))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (ModelReply(' "A dog\n on grass." '), "A dog on grass."),
        (ModelReply("a dog on grass"), "a dog on grass"),
        (ModelReply("A dog. It sits on the gr", complete=False), "A dog."),
        (ModelReply("A dog. It sits"), "A dog. It sits"),
        (ModelReply("A dog that sits on 3.5 m of", complete=False), "A dog that sits on 3.5 m of"),
        (ModelReply("<think>hm</think> A dog."), "A dog."),
    ],
)
def test_captions(reply: ModelReply, expected: str) -> None:
    assert read_caption(reply) == expected


@pytest.mark.parametrize("reply", ["", " . ", "<think>A dog."])
def test_empty_captions_are_invalid(reply: str) -> None:
    with pytest.raises(UserError):
        read_caption(ModelReply(reply))


@pytest.mark.parametrize(
    "reply",
    [
        "Caption: A sign: Text here.\nText: Yes\nFaces: no\nScore: 4 out of 9",
        "**Caption:** A sign: Text here.\n\n**Text:** yes\n**Faces:** No\n**Score:** 4 out of 9",
        "caption: A sign:\nText here.\ntext: yes\nfaces: no.\nscore: 4 out of 9",
    ],
)
def test_unified_replies(reply: str) -> None:
    if "sign:\nText" in reply:
        assert parse_description(ModelReply(reply)) == Description("A sign: Text here.", True, False)
    assert parse_description(ModelReply(reply)).has_faces is False
    assert parse_description(ModelReply(reply)).caption == "A sign: Text here."


@pytest.mark.parametrize("reply", ["Score: 4 out of 9", "Caption: a dog\nText: no\nScore: 4 out of 9"])
def test_unified_replies_without_a_line_are_invalid(reply: str) -> None:
    with pytest.raises(UserError, match="no line"):
        parse_description(ModelReply(reply))


@pytest.mark.parametrize("scale", [9, 10])
def test_both_prompts_share_the_rubric(scale: int) -> None:
    for text in (rubric_text(scale), unified_text(scale)):
        assert criteria_text(scale) in text
        assert f"out of {scale}" in text
        assert "512 x 512" in text
    assert all(anchor in criteria_text() for anchor in ANCHORS.values())


def test_a_question_set_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    question = {"text": "Is it dark?", "if_yes": "It is dark."}
    path.write_text(json.dumps({"max_caption_tokens": 9, "questions": [question]}))
    assert QuestionSet.read(path) == QuestionSet(
        SHORT_CAPTION, 9, (Question("Is it dark?", if_yes="It is dark."),)
    )
    assert QuestionSet.read(path).hash != QuestionSet().hash


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "object"),
        ('{"caption": ""}', "caption prompt is empty"),
        ('{"prompt": "Describe."}', "prompt"),
        ('{"max_caption_tokens": true}', "max_caption_tokens"),
        ('{"questions": ["Is it dark?"]}', "not a question set"),
        ('{"questions": [{"text": "Is it dark?"}]}', "no effect"),
        ('{"questions": [{"text": "Is it dark?", "flag": "dark"}]}', "has_text or has_faces"),
    ],
)
def test_invalid_question_sets_are_named(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "questions.json"
    path.write_text(content)
    with pytest.raises(UserError, match=problem) as raised:
        QuestionSet.read(path)
    assert str(path) in str(raised.value)
