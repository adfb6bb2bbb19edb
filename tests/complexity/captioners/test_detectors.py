"""Detectors of text and faces: on packaged photographs, and without their packages."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

from cat_fast.complexity import Description, extras
from cat_fast.complexity.captioners import faces
from cat_fast.complexity.captioners.base import DescriptionFailure
from cat_fast.complexity.captioners.detectors import Detectors
from cat_fast.complexity.captioners.faces import overlap
from cat_fast.complexity.captioners.text_boxes import TextBox, contains_text
from cat_fast.data.images.io import load_image
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError

REAL_IMPORT = importlib.import_module


@pytest.fixture(scope="module")
def detectors() -> Detectors:
    return Detectors()


def load(key: str) -> Image.Image:
    return load_image(next(photo.path for photo in photographs() if photo.key == key))


@pytest.mark.parametrize(
    ("key", "has_text", "has_faces"),
    [
        ("astronaut", False, True),
        ("grace_hopper", False, True),
        ("l3_news_logo", True, False),
        ("forest_stream", False, False),  # one cascade alone finds a face here
        ("coffee", False, False),  # the cup is read as the letter O
    ],
)
def test_flags_of_photographs(detectors: Detectors, key: str, has_text: bool, has_faces: bool) -> None:
    assert detectors.describe_many([load(key)], ["mine"]) == [Description("mine", has_text, has_faces)]


def test_the_caption_comes_from_the_caller(detectors: Detectors) -> None:
    plain = Image.new("RGB", (64, 64), "white")
    label = Description.from_label("goldfish").caption
    known, unknown, blank = detectors.describe_many([plain] * 3, [label, None, " "])
    assert known == Description("this is an image of goldfish", has_text=False, has_faces=False)
    assert isinstance(unknown, DescriptionFailure)
    assert "give a caption or a label" in unknown.error
    assert isinstance(blank, DescriptionFailure)
    with pytest.raises(UserError, match="one caption per image"):
        detectors.describe_many([plain], [])


@pytest.mark.parametrize("size", [(1, 1), (20, 20), (1000, 3), (3, 1000)])
def test_images_of_any_size(detectors: Detectors, size: tuple[int, int]) -> None:
    assert detectors.find_flags(Image.new("RGB", size, "gray")) == (False, False)


def test_drawn_text_is_found(detectors: Detectors) -> None:
    image = Image.new("RGB", (400, 200), "white")
    ImageDraw.Draw(image).text((40, 70), "Exit 27", "black", ImageFont.load_default(48))
    assert detectors.find_flags(image)[0]


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([], False),
        ([TextBox("EXIT", 0.9, 0.01)], True),
        ([TextBox("EXIT", 0.9, 0.0005)], False),
        ([TextBox("EXIT", 0.9, 0.0005)] * 3, True),
        ([TextBox("O", 0.9, 0.2)] * 3, False),
        ([TextBox("EXIT", 0.5, 0.2)] * 3, False),
    ],
)
def test_few_or_small_boxes_are_not_text(boxes: list[TextBox], expected: bool) -> None:
    assert contains_text(boxes) is expected


def test_overlap_of_boxes() -> None:
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (5, 0, 10, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (10, 0, 10, 10)) == 0


@pytest.mark.parametrize("missing", ["cv2", "rapidocr_onnxruntime"])
def test_a_missing_package_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> Any:
        if name == missing:
            raise ImportError(f"No module named {name!r}")
        return REAL_IMPORT(name)

    monkeypatch.setattr(extras.importlib, "import_module", import_module)
    with pytest.raises(UserError, match=r"pip install 'cat-fast\[detect\]'") as raised:
        Detectors()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("parts", [{}, {"data": SimpleNamespace(haarcascades="/missing/")}])
def test_opencv_without_cascades_is_named(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    newer = SimpleNamespace(__version__="5.0.0", **parts)
    monkeypatch.setattr(faces, "import_extra", lambda *arguments: newer)
    with pytest.raises(UserError, match=r"OpenCV 5.0.0 has no face cascades.*cat-fast\[detect\]"):
        faces.FaceDetector()
