"""Words of rendered pages, their errors, and faces of photographs; skipped where the programs are missing."""

import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cat_fast.data.images.io import load_image, resize_center_crop
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError
from cat_fast.evaluation.tokenizers import faces, text
from cat_fast.evaluation.tokenizers.perception import perception, result_of
from cat_fast.evaluation.tokenizers.text import Word

needs_tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="tesseract-ocr is missing")


def page(*lines):
    image = Image.new("RGB", (512, 256), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((20, 20 + 60 * number), line, "black", ImageFont.load_default(36))
    return image


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distance(first, second, distance):
    assert text.edit_distance(first, second) == distance
    assert text.edit_distance(second, first) == distance


def test_edit_distance_equals_the_recursion():
    random = np.random.default_rng(0)

    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    for _ in range(30):
        a, b = ("".join(random.choice(list("xyz"), random.integers(0, 6))) for _ in range(2))
        assert text.edit_distance(a, b) == slow(a, b)


def test_words_are_compared_by_their_boxes():
    original = [Word("tall", 90, 0, 0, 40, 20), Word("small", 80, 0, 50, 40, 5)]
    other = [Word("tell", 70, 2, 1, 40, 20), Word("far", 70, 200, 200, 40, 20)]
    assert text.word_errors(original, other) == [(20.0, 1, 4), (5.0, 5, 5)]
    assert text.mean_confidence(original) == 85
    assert text.mean_confidence([]) is None
    assert text.character_errors([Word("a", 1, 0, 0, 1, 1), Word("b", 1, 0, 0, 1, 1)], []) == (3, 3)


def test_bins_are_those_of_the_nearest_resolution():
    assert text.bin_edges(text.BINS, 512) == (0.01, 0.02, 0.03, 1.0)
    assert text.bin_edges(text.BINS, 64) == text.BINS[256]
    assert text.bin_edges(text.BINS, 900) == text.BINS[1024]


@needs_tesseract
def test_text_of_a_page_and_of_its_damaged_copy():
    clean = page("NESTED LATENT", "QUICK BROWN FOX")
    words = text.read_words(clean)
    assert [word.text for word in words] == ["NESTED", "LATENT", "QUICK", "BROWN", "FOX"]
    damaged = text.read_words(clean.filter(ImageFilter.GaussianBlur(9)))
    errors, characters = text.character_errors(words, damaged)
    assert characters == len("NESTED LATENT QUICK BROWN FOX")
    assert errors > 5
    assert text.character_errors(words, words)[0] == 0
    assert text.read_words(Image.new("RGB", (64, 64), "white")) == []


def test_faces_found_again():
    pytest.importorskip("cv2")
    faces.require_detector()
    people = next(
        (found, image)
        for photograph in photographs()
        if (image := resize_center_crop(load_image(photograph.path), 256))
        and (found := faces.find_faces(image))
    )
    found, image = people
    assert faces.found_again(found, faces.find_faces(image)) == [True] * len(found)
    blurred = faces.find_faces(image.filter(ImageFilter.GaussianBlur(20)))
    assert faces.found_again(found, blurred) == [False] * len(found)
    assert faces.found_again([(0, 0, 10, 10)], [(5, 0, 10, 10)]) == [False]  # a third overlaps
    assert faces.find_faces(Image.new("RGB", (8, 8))) == []
    assert faces.relative_size((0, 0, 64, 60), 256) == 0.25
    assert faces.relative_size((0, 0, 64, 60), 1280) == 0.1  # boxes of large images are those at 640 px


@needs_tesseract
def test_processes_find_what_this_one_finds():
    image = np.array(page("HELLO"))
    with perception(ocr=True, detect=False, workers=1) as found:
        assert found.versions["tesseract"]
        perceived = result_of(found.submit(image))
    assert [word.text for word in perceived.words] == ["HELLO"]
    assert perceived.faces is None


def test_missing_programs_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"tesseract-ocr|cat-fast\[eval\]"):
        text.require_tesseract()
