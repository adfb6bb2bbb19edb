"""Captions, answers and scores over an OpenAI-compatible vision endpoint: a local HTTP server."""

import base64
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from cat_fast.complexity import Description, ScoringFailure
from cat_fast.complexity.captioners.base import DescriptionFailure
from cat_fast.complexity.captioners.endpoint_vision import EndpointVision
from cat_fast.complexity.captioners.model_captioner import ModelCaptioner
from cat_fast.complexity.captioners.questions import (
    FACES_QUESTION,
    LONG_CAPTION,
    TEXT_QUESTION,
    Question,
    QuestionSet,
)
from cat_fast.complexity.captioners.unified import UnifiedScorer, unified_pattern
from cat_fast.complexity.image_score import ImageScore
from cat_fast.complexity.scorers.language_model import json_client
from cat_fast.errors import UserError
from tests.complexity.scorers.stub_server import Raw, Stub, chat, serve, token

KEY = "sk-test-5c1d0fa2"
PATH = "/v1/chat/completions"
RED, GREEN, BLUE = (Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue"))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(json_client, "sleep", lambda seconds: None)


def colour_and_prompt(body: dict[str, Any]) -> tuple[str, str]:
    """Return the colour of the image in a request, and the prompt, which comes after it."""
    picture, text = body["messages"][0]["content"]
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    pixel = Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0))
    return ("red", "green", "blue")[max(range(3), key=lambda i: pixel[i])], text["text"]


def good(path: str, body: dict[str, Any]) -> dict[str, Any] | Raw:
    """Answer that red images contain text, and blue ones faces."""
    colour, prompt = colour_and_prompt(body)
    if prompt.startswith("Describe"):
        return chat(f"A {colour} wall.")
    return chat("Yes" if colour == ("red" if "text" in prompt else "blue") else "No")


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serve(good) as running:
        yield running


def captioner_of(stub: Stub, questions: QuestionSet | None = None, **options: Any) -> ModelCaptioner:
    return ModelCaptioner(
        EndpointVision("m", f"{stub.url}/v1", **{"timeout": 5.0, "retries": 1, **options}), questions
    )


def test_descriptions_come_in_order(stub: Stub) -> None:
    results = captioner_of(stub).describe_many([RED, GREEN, BLUE] * 3)
    assert (
        results
        == [
            Description("A red wall.", has_text=True, has_faces=False),
            Description("A green wall.", has_text=False, has_faces=False),
            Description("A blue wall.", has_text=False, has_faces=True),
        ]
        * 3
    )
    first = stub.bodies(PATH)[0]
    assert first["max_tokens"] == QuestionSet().max_caption_tokens
    assert "structured_outputs" not in first
    assert stub.bodies(PATH)[-1]["structured_outputs"] == {"regex": "(Yes|No)"}
    assert stub.requests[0][2]["Authorization"] == f"Bearer {KEY}"


def test_large_images_are_scaled_down(stub: Stub) -> None:
    captioner_of(stub, max_side=64).describe_many([Image.new("RGB", (640, 320), "red")])
    url = stub.bodies(PATH)[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (64, 32)


def test_known_captions_are_kept_and_long_captions_asked_for(stub: Stub) -> None:
    results = captioner_of(stub, QuestionSet.long()).describe_many([RED, BLUE], ["a door", None])
    assert results == [Description("a door", True, False), Description("A blue wall.", False, True)]
    prompts = [colour_and_prompt(body)[1] for body in stub.bodies(PATH)]
    assert prompts.count(LONG_CAPTION) == 1
    assert len(prompts) == 5


def test_more_questions_extend_the_caption(stub: Stub) -> None:
    night = Question("Is it a night scene with text?", if_yes="It is night.", if_no="It is day.")
    results = captioner_of(stub, QuestionSet(questions=(FACES_QUESTION, night))).describe_many([RED, BLUE])
    assert results == [
        Description("A red wall. It is night.", has_faces=False),
        Description("A blue wall. It is day.", has_faces=True),
    ]


def test_failures_concern_their_image(stub: Stub) -> None:
    def answer(path: str, body: dict[str, Any]) -> dict[str, Any] | Raw:
        colour, prompt = colour_and_prompt(body)
        if colour == "green":
            return chat("") if prompt.startswith("Describe") else chat("No")
        if colour == "blue" and "faces" in prompt:
            return Raw(500, b"overloaded")
        return good(path, body)

    stub.answer = answer
    red, green, blue = captioner_of(stub).describe_many([RED, GREEN, BLUE])
    assert red == Description("A red wall.", True, False)
    assert isinstance(green, DescriptionFailure)
    assert "caption is empty" in green.error
    assert isinstance(blue, DescriptionFailure)
    assert "overloaded" in blue.error


def test_a_failed_image_is_not_asked_again(stub: Stub) -> None:
    stub.answer = lambda path, body: chat("" if colour_and_prompt(body)[0] == "green" else "Yes, it is.")
    results = captioner_of(stub).describe_many([RED, GREEN])
    assert results[0] == Description("Yes, it is.", True, True)
    assert sum(colour_and_prompt(body)[0] == "green" for body in stub.bodies(PATH)) == 1


@pytest.mark.parametrize(
    ("failure", "hint"), [(Raw(401, b"no"), "OPENAI_API_KEY"), (Raw(404, b"no such model"), "no such model")]
)
def test_an_unusable_server_is_one_error(stub: Stub, failure: Raw, hint: str) -> None:
    stub.answer = lambda path, body: failure
    with pytest.raises(UserError, match=hint):
        captioner_of(stub).describe_many([RED] * 5)
    assert len(stub.requests) == 1


def test_a_plain_server_is_asked_without_structure(stub: Stub) -> None:
    def answer(path: str, body: dict[str, Any]) -> dict[str, Any] | Raw:
        return Raw(400, b"unknown field") if "logprobs" in body else good(path, body)

    stub.answer = answer
    assert captioner_of(stub).describe_many([RED]) == [Description("A red wall.", True, False)]


def test_the_key_is_in_no_message(stub: Stub) -> None:
    stub.answer = lambda path, body: Raw(500, f"Bearer {KEY}".encode())
    with pytest.raises(UserError) as raised:
        captioner_of(stub).describe_many([RED] * 4)
    captioner = captioner_of(stub)
    assert KEY not in str(raised.value) + repr(vars(captioner)) + captioner.name + captioner.version


def unified(text: str, score: str = "4", faces: str = "no") -> str:
    return f"Caption: {text}\nText: yes\nFaces: {faces}\nScore: {score} out of 9"


def test_unified_describes_and_scores_in_one_call(stub: Stub) -> None:
    top = {"4": math.log(0.5), "6": math.log(0.5)}
    rows = [token("Caption: A wall.\nText: yes\nFaces: no\nScore: "), token("4", math.log(0.5), top)]
    stub.answer = lambda path, body: chat(unified("A wall."), [*rows, token(" out of 9")])
    model = EndpointVision("m", f"{stub.url}/v1")
    (result,) = UnifiedScorer(model).score_images([RED])
    assert isinstance(result, ImageScore)
    assert result.description == Description("A wall.", True, False)
    assert (result.score.score, result.score.expected) == (4, pytest.approx(5))
    (body,) = stub.bodies(PATH)
    assert body["regex"] == unified_pattern(9)


def test_unified_takes_no_description_from_thoughts(stub: Stub) -> None:
    thoughts = "<think>\n" + unified("A draft.", score="2", faces="yes") + "\nNo faces after all.</think>\n"
    stub.answer = lambda path, body: chat(thoughts + unified("A wall."))
    (result,) = UnifiedScorer(EndpointVision("m", f"{stub.url}/v1")).score_images([RED])
    assert isinstance(result, ImageScore)
    assert result.description == Description("A wall.", True, False)
    assert result.score.score == 4


def test_unified_asks_once_more_and_records_failures(stub: Stub) -> None:
    def answer(path: str, body: dict[str, Any]) -> dict[str, Any] | Raw:
        colour, prompt = colour_and_prompt(body)
        if colour == "blue" or (colour == "green" and "another form" not in prompt):
            return chat(unified("A wall.", faces="perhaps"))
        return chat(unified(f"A {colour} wall.", score="7"))

    stub.answer = answer
    red, green, blue = UnifiedScorer(EndpointVision("m", f"{stub.url}/v1")).score_images([RED, GREEN, BLUE])
    assert isinstance(red, ImageScore)
    assert isinstance(green, ImageScore)
    assert green.description.caption == "A green wall."
    assert green.score.score == 7
    assert type(blue) is ScoringFailure
    assert "expected yes or no" in blue.error
    assert len(stub.bodies(PATH)) == 5


def test_invalid_arguments_are_named(stub: Stub) -> None:
    model = EndpointVision("m", f"{stub.url}/v1")
    with pytest.raises(UserError, match="max_side"):
        EndpointVision("m", f"{stub.url}/v1", max_side=0)
    with pytest.raises(UserError, match="model's name"):
        EndpointVision("", f"{stub.url}/v1")
    with pytest.raises(UserError, match="Faces:"):
        UnifiedScorer(model, prompt="Reply with Caption:, Text: and Score:")
    with pytest.raises(UserError, match="max_new_tokens"):
        UnifiedScorer(model, max_new_tokens=8)
    with pytest.raises(UserError, match="same flag"):
        QuestionSet(questions=(TEXT_QUESTION, TEXT_QUESTION))
