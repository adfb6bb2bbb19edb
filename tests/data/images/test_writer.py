"""Images are written in the background: bounded in number, atomically, and errors are not lost."""

import threading

import pytest
from PIL import Image

from cat_fast.data.images.writer import ImageWriter, is_complete_image
from cat_fast.errors import UserError


class Slow:
    """An image whose encoding waits for `released`."""

    def __init__(self, released):
        self.released = released

    def save(self, path, format):
        assert self.released.wait(30)
        Image.new("RGB", (2, 2)).save(path, format=format)


def test_drawing_goes_on_while_files_are_encoded(tmp_path):
    released = threading.Event()
    with ImageWriter(threads=2) as writer:
        for number in range(writer.capacity):
            writer.write(tmp_path / f"{number}.png", Slow(released), format="PNG")
        assert not list(tmp_path.glob("*.png"))  # all are waiting, and none has blocked the caller
        released.set()
    assert len(list(tmp_path.glob("*.png"))) == writer.capacity


def test_the_number_of_waiting_images_is_bounded(tmp_path):
    released, written = threading.Event(), threading.Event()
    with ImageWriter(threads=1) as writer:
        for number in range(writer.capacity):
            writer.write(tmp_path / f"{number}.png", Slow(released), format="PNG")

        def one_more():
            writer.write(tmp_path / "more.png", Slow(released), format="PNG")
            written.set()

        threading.Thread(target=one_more).start()
        assert not written.wait(0.2)
        released.set()
        assert written.wait(30)
    assert (tmp_path / "more.png").exists()


def test_an_error_is_raised(tmp_path):
    (tmp_path / "file").write_text("")
    image = Image.new("RGB", (2, 2))
    with pytest.raises(UserError), ImageWriter(threads=1) as writer:
        writer.write(tmp_path / "file" / "a.png", image, format="PNG")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_cut_and_empty_files_are_not_complete_images(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    assert not is_complete_image(path)
    Image.effect_noise((21, 13), 90).convert("RGB").save(path)
    assert is_complete_image(path)
    whole = path.read_bytes()
    for content in (b"", whole[:3], whole[:-1], whole[: len(whole) // 2], b"\0" * len(whole)):
        path.write_bytes(content)
        assert not is_complete_image(path)
