"""Captions and answers of tiny models of the real classes: real processors, real generation, no network."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cat_fast.complexity import Description
from cat_fast.complexity.captioners.base import DescriptionFailure
from cat_fast.complexity.captioners.model_captioner import ModelCaptioner
from cat_fast.complexity.captioners.questions import QuestionSet
from cat_fast.complexity.captioners.transformers_vision import TransformersVision
from cat_fast.complexity.captioners.unified import UnifiedScorer
from cat_fast.complexity.image_score import ImageScore
from cat_fast.errors import UserError
from tests.complexity.captioners.tiny_vision import KINDS, save_model

CAPTION = {"sentence.": "A", "A": "red", "red": "dog", "dog": "barks."}


def images(*sizes: tuple[int, int]) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return random models, by class."""
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_captions_and_answers_of_every_class(kind: str, tmp_path: Path) -> None:
    model = TransformersVision(
        save_model(tmp_path, kind, CAPTION | {"no.": "Yes"}), device="cpu", batch_size=2
    )
    results = ModelCaptioner(model).describe_many(
        images((40, 60), (64, 28), (100, 100)), [None, "mine", None]
    )
    expected = Description("A red dog barks.", has_text=True, has_faces=True)
    assert results == [expected, Description("mine", has_text=True, has_faces=True), expected]


@pytest.mark.parametrize("kind", KINDS)
def test_replies_depend_on_the_image_and_not_on_the_batch(kind: str, folders: dict[str, Path]) -> None:
    model = TransformersVision(folders[kind], device="cpu", batch_size=3)
    requests = [(image, "word1 word2") for image in images((40, 60), (64, 28), (100, 100))]
    together = [reply.text for reply in model.reply_many(requests, 12)]
    model.batch_size = 1
    assert [reply.text for reply in model.reply_many(requests, 12)] == together
    assert len(set(together)) > 1


@pytest.mark.parametrize("kind", ["llava", "instructblip"])
def test_prompts_of_different_length_in_a_batch(kind: str, folders: dict[str, Path]) -> None:
    image = images((40, 60))[0]
    model = TransformersVision(folders[kind], device="cpu", batch_size=2)
    requests = [(image, "word1"), (image, "word1 word2 word3 word4 word5")]
    together = model.reply_many(requests, 8)
    assert [model.reply_many([request], 8)[0].text for request in requests] == [r.text for r in together]


def test_an_unclear_answer_is_asked_for_once_more(tmp_path: Path) -> None:
    following = CAPTION | {"no.": "Perhaps", "only.": "No"}
    captioner = ModelCaptioner(TransformersVision(save_model(tmp_path, "llava", following), device="cpu"))
    assert captioner.describe_many(images((30, 30))) == [Description("A red dog barks.", False, False)]


def test_an_unclear_second_answer_is_a_failure(tmp_path: Path) -> None:
    following = CAPTION | {"no.": "Perhaps", "only.": "Perhaps"}
    captioner = ModelCaptioner(TransformersVision(save_model(tmp_path, "llava", following), device="cpu"))
    (failure,) = captioner.describe_many(images((30, 30)))
    assert isinstance(failure, DescriptionFailure)
    assert "Perhaps" in failure.error
    assert "text or a number" in failure.error


def test_an_image_that_the_processor_rejects_fails_alone(tmp_path: Path) -> None:
    model = TransformersVision(save_model(tmp_path, "qwen2_vl", CAPTION | {"no.": "No"}), device="cpu")
    results = ModelCaptioner(model).describe_many(images((40, 60), (2, 1000), (30, 30)))
    assert results[0] == results[2] == Description("A red dog barks.", False, False)
    assert isinstance(results[1], DescriptionFailure)
    assert "aspect ratio" in results[1].error


def test_the_whole_reply_is_greedy_and_bfloat16_runs(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llava", {"go": "a", "a": "b", "b": "a"})  # penalized if repeated
    model = TransformersVision(folder, device="cpu", dtype="bfloat16")
    (reply,) = model.reply_many([(images((30, 30))[0], "go")], 7)
    assert reply.text == "a b a b a b a"
    assert not reply.complete


def test_unified_reply_of_a_model_has_an_expected_score(tmp_path: Path) -> None:
    # Words are separated by spaces, so that line feeds belong to words.
    words = ["go", "Caption:", "A", "dog.\nText:", "no\nFaces:", "yes\nScore:", "4", "out", "of", "9"]
    following = dict(pairwise(words))
    model = TransformersVision(save_model(tmp_path, "llava", following), device="cpu")
    prompt = "Reply with Caption: Text: Faces: and Score: now go"
    (result,) = UnifiedScorer(model, prompt=prompt).score_images(images((30, 30)))
    assert isinstance(result, ImageScore), result
    assert result.description == Description("A dog.", has_text=False, has_faces=True)
    assert result.score.score == 4


def test_the_identity_depends_on_weights_and_template(folders: dict[str, Path]) -> None:
    first = TransformersVision(folders["llava"], device="cpu")
    assert TransformersVision(folders["llava"], device="cpu").identity == first.identity
    assert TransformersVision(folders["llava"], device="cpu", dtype="bfloat16").identity != first.identity
    assert TransformersVision(folders["instructblip"], device="cpu").identity != first.identity
    long = ModelCaptioner(first, QuestionSet.long())
    assert long.version != ModelCaptioner(first).version


def test_invalid_arguments_and_models_are_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        TransformersVision(folders["llava"], batch_size=0)
    with pytest.raises(UserError, match="the template must contain"):
        TransformersVision(folders["llava"], template="<image>")
    with pytest.raises(UserError, match="not an image-text-to-text model"):
        TransformersVision(tmp_path / "missing")
    captioner = ModelCaptioner(TransformersVision(folders["instructblip"], device="cpu"))
    with pytest.raises(UserError, match="one caption per image"):
        captioner.describe_many(images((30, 30)), [])
    assert captioner.describe_many([]) == []


def test_a_template_for_models_without_a_chat_template(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llava", CAPTION, chat=False)
    image = images((30, 30))[0]
    model = TransformersVision(folder, device="cpu", template="USER: <image> {prompt}")
    assert model.reply_many([(image, "In one sentence.")], 8)[0].text == "A red dog barks."
    with pytest.raises(UserError, match="does not contain the image"):
        TransformersVision(folder, device="cpu")
