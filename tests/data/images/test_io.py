"""Image input: every common kind of image file is loaded as displayed, or rejected with a one-line error."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from cat_fast.data.images.io import (
    find_images,
    image_to_tensor,
    load_image,
    resize_center_crop,
    tensor_to_image,
)
from cat_fast.errors import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(size: int = 32) -> Image.Image:
    """Return an image with red and green above, blue and white below, which shows any rotation or flip."""
    half = size // 2
    image = Image.new("RGB", (size, size), WHITE)
    image.paste(RED, (0, 0, half, half))
    image.paste(GREEN, (half, 0, size, half))
    image.paste(BLUE, (0, half, half, size))
    return image


def corners(image: Image.Image) -> list[tuple[int, int, int]]:
    width, height = image.size
    x, y = width // 4, height // 4
    return [image.getpixel(at) for at in ((x, y), (width - x, y), (x, height - y), (width - x, height - y))]


def assert_close(actual: Image.Image, expected: Image.Image, tolerance: int) -> None:
    assert actual.mode == "RGB"
    difference = np.asarray(actual).astype(int) - np.asarray(expected.convert("RGB")).astype(int)
    assert np.abs(difference).max() <= tolerance


def exif_with(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


class TestKindsOfImage:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
    def test_lossless_formats_are_bit_exact(self, tmp_path, suffix):
        quadrants().save(tmp_path / f"a.{suffix}")
        assert_close(load_image(tmp_path / f"a.{suffix}"), quadrants(), 0)

    def test_lossless_webp(self, tmp_path):
        quadrants().save(tmp_path / "a.webp", lossless=True)
        assert_close(load_image(tmp_path / "a.webp"), quadrants(), 0)

    def test_jpeg(self, tmp_path):
        quadrants().save(tmp_path / "a.jpg", quality=95, subsampling=0)
        assert_close(load_image(tmp_path / "a.jpg"), quadrants(), 6)

    @pytest.mark.parametrize(
        ("orientation", "seen"),
        [
            (1, [RED, GREEN, BLUE, WHITE]),
            (2, [GREEN, RED, WHITE, BLUE]),
            (3, [WHITE, BLUE, GREEN, RED]),
            (6, [BLUE, RED, WHITE, GREEN]),  # portrait: rotate clockwise to display
            (8, [GREEN, WHITE, RED, BLUE]),
        ],
    )
    def test_exif_orientation_is_applied(self, tmp_path, orientation, seen):
        quadrants().save(tmp_path / "a.png", exif=exif_with(orientation))
        assert corners(load_image(tmp_path / "a.png")) == seen

    def test_a_rotated_portrait_has_its_sides_swapped(self, tmp_path):
        Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif_with(6))
        assert load_image(tmp_path / "a.jpg").size == (20, 40)

    def test_damaged_exif_is_ignored(self, tmp_path):
        quadrants().save(tmp_path / "a.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
        assert_close(load_image(tmp_path / "a.png"), quadrants(), 0)

    def test_grey_and_bilevel(self, tmp_path):
        grey = Image.linear_gradient("L")
        grey.save(tmp_path / "grey.png")
        assert_close(load_image(tmp_path / "grey.png"), grey, 0)
        bilevel = grey.point(lambda level: 255 * (level > 100)).convert("1")
        bilevel.save(tmp_path / "bilevel.png")
        assert_close(load_image(tmp_path / "bilevel.png"), bilevel, 0)

    def test_palette(self, tmp_path):
        quadrants().convert("P", palette=Image.Palette.ADAPTIVE, colors=4).save(tmp_path / "a.png")
        assert_close(load_image(tmp_path / "a.png"), quadrants(), 0)

    def test_transparent_palette_entry_is_white(self, tmp_path):
        palette = quadrants().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
        palette.save(tmp_path / "a.png", transparency=palette.getpixel((0, 0)))
        assert corners(load_image(tmp_path / "a.png")) == [WHITE, GREEN, BLUE, WHITE]

    def test_alpha_is_composited_on_white(self, tmp_path):
        image = quadrants().convert("RGBA")
        image.putalpha(Image.new("L", image.size, 102))  # 40 % opaque
        image.save(tmp_path / "a.png")
        # 0.4 * red + 0.6 * white
        assert corners(load_image(tmp_path / "a.png"))[0] == (255, 153, 153)

    def test_hidden_colour_under_full_transparency_does_not_shine_through(self, tmp_path):
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.webp", lossless=True)
        assert load_image(tmp_path / "a.webp").getcolors() == [(64, WHITE)]

    def test_grey_with_alpha(self, tmp_path):
        Image.new("LA", (8, 8), (0, 51)).save(tmp_path / "a.png")  # black, 20 % opaque
        assert load_image(tmp_path / "a.png").getcolors() == [(64, (204, 204, 204))]

    def test_colour_key_transparency_of_rgb(self, tmp_path):
        quadrants().save(tmp_path / "a.png", transparency=RED)
        assert corners(load_image(tmp_path / "a.png")) == [WHITE, GREEN, BLUE, WHITE]

    def test_cmyk_without_a_profile(self, tmp_path):
        quadrants().convert("CMYK").save(tmp_path / "a.jpg", quality=100)
        assert_close(load_image(tmp_path / "a.jpg"), quadrants(), 6)

    @pytest.mark.parametrize("suffix", ["png", "tiff"])
    def test_16_bit_grey_is_scaled_not_clipped(self, tmp_path, suffix):
        values = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        levels = np.asarray(load_image(tmp_path / f"a.{suffix}"))[..., 0]
        np.testing.assert_array_equal(levels, np.rint(values / 257))

    def test_transparent_level_of_16_bit_grey_is_white(self, tmp_path):
        values = np.array([[1000, 30000]], dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png"))[0, :, 0], [255, 117])

    def test_16_bit_rgb(self, tmp_path):
        raw = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
        (tmp_path / "a.png").write_bytes(png(7, 5, bit_depth=16, colour_type=2, rows=raw.astype(">u2")))
        levels = np.asarray(load_image(tmp_path / "a.png")).astype(float)
        assert np.abs(levels - raw / 257).max() <= 1

    @pytest.mark.parametrize(
        "values", [np.full((4, 4), 0.5, np.float32), *(np.full((4, 4), v, np.int32) for v in (200, 70000))]
    )
    def test_pixels_without_a_natural_range_are_rejected(self, tmp_path, values):
        Image.fromarray(values).save(tmp_path / "a.tiff")
        with pytest.raises(UserError, match=r"a\.tiff: expected 8 or 16 bits per channel, got 32"):
            load_image(tmp_path / "a.tiff")

    def test_first_frame_of_an_animation(self, tmp_path):
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
        frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
        assert load_image(tmp_path / "a.webp").getcolors() == [(64, RED)]


class TestColourProfiles:
    """Colour profiles; the reference is littlecms, applied directly to the same pixels."""

    def test_rgb_profile_is_converted_to_srgb(self, tmp_path):
        wide = ImageCms.ImageCmsProfile(io.BytesIO(swapped_primaries()))
        quadrants().save(tmp_path / "a.png", icc_profile=wide.tobytes())
        expected = ImageCms.profileToProfile(quadrants(), wide, ImageCms.createProfile("sRGB"))
        actual = load_image(tmp_path / "a.png")
        assert_close(actual, expected, 0)
        # Red was stored in a space whose red is sRGB's green.
        assert actual.getpixel((4, 4)) == pytest.approx(GREEN, abs=3)

    def test_srgb_profile_changes_nothing(self, tmp_path):
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        quadrants().save(tmp_path / "a.png", icc_profile=srgb)
        assert_close(load_image(tmp_path / "a.png"), quadrants(), 1)

    def test_alpha_survives_the_conversion(self, tmp_path):
        image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
        image.save(tmp_path / "a.png", icc_profile=swapped_primaries())
        assert load_image(tmp_path / "a.png").getcolors() == [(64, WHITE)]

    def test_cmyk_profile_is_converted_to_srgb(self, tmp_path):
        Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(
            tmp_path / "a.jpg", icc_profile=cmyk_profile(), quality=100
        )
        # In this profile full cyan ink is L* = 40, a* = b* = 0: a mid grey, unlike in any fixed formula.
        grey = load_image(tmp_path / "a.jpg").getpixel((4, 4))
        assert grey == pytest.approx((94, 94, 94), abs=3)

    @pytest.mark.parametrize("profile", [b"not a profile", b"\x00" * 200])
    def test_damaged_profile_is_ignored(self, tmp_path, profile):
        quadrants().save(tmp_path / "a.png", icc_profile=profile)
        assert_close(load_image(tmp_path / "a.png"), quadrants(), 0)

    def test_profile_of_another_colour_space_is_ignored(self, tmp_path):
        quadrants().save(tmp_path / "a.png", icc_profile=cmyk_profile())
        assert_close(load_image(tmp_path / "a.png"), quadrants(), 0)


class TestRefusals:
    def refused(self, path: Path, reason: str, **options) -> None:
        with pytest.raises(UserError, match=reason) as caught:
            load_image(path, **options)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)

    def test_missing(self, tmp_path):
        self.refused(tmp_path / "a.jpg", "no such file")

    def test_folder(self, tmp_path):
        self.refused(tmp_path, "is a folder")

    def test_empty(self, tmp_path):
        (tmp_path / "a.jpg").touch()
        self.refused(tmp_path / "a.jpg", "empty")

    @pytest.mark.parametrize("content", [b"hello, this is text\n" * 40, b"%!PS-Adobe-3.0 EPSF-3.0\n" * 20])
    def test_not_an_image(self, tmp_path, content):
        (tmp_path / "a.jpg").write_bytes(content)
        self.refused(tmp_path / "a.jpg", "not an image")

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
    def test_truncated(self, tmp_path, suffix):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        whole = tmp_path / f"whole.{suffix}"
        Image.fromarray(noise).save(whole)
        half = tmp_path / f"half.{suffix}"
        half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        self.refused(half, "damaged or truncated")

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
    def test_random_damage_raises_only_user_errors(self, tmp_path, suffix):
        whole = io.BytesIO()
        quadrants().save(whole, format="JPEG" if suffix == "jpg" else suffix)
        random = np.random.default_rng(7)
        refused = 0
        for _ in range(150):
            damaged = bytearray(whole.getvalue())
            for at in random.integers(0, len(damaged), 6):
                damaged[at] = random.integers(0, 256)
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(damaged)
            try:
                assert load_image(path).mode == "RGB"
            except UserError:
                refused += 1
        assert refused > 0

    def test_decompression_bomb_is_rejected_by_its_header(self, tmp_path):
        # The header declares 10^10 pixels; the file contains none.
        (tmp_path / "a.png").write_bytes(png(100_000, 100_000, bit_depth=8, colour_type=2, rows=b""))
        self.refused(tmp_path / "a.png", "limit of 179 million")

    def test_the_limit_can_be_lowered(self, tmp_path):
        Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png", max_pixels=600).size == (30, 20)
        self.refused(tmp_path / "a.png", "30 x 20 pixels is more than the limit", max_pixels=599)

    def test_text_chunk_bomb(self, tmp_path, monkeypatch):
        monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1000)
        info = PngImagePlugin.PngInfo()
        info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 10), zip=True)
        quadrants().save(tmp_path / "a.png", pnginfo=info)
        self.refused(tmp_path / "a.png", "damaged")


class TestLongMetadata:
    """Metadata of more than 1 MB; it compresses well, as editing histories do."""

    @pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt"])
    def test_text_of_a_png(self, tmp_path, kind):
        info = PngImagePlugin.PngInfo()
        if kind == "iTXt":
            info.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
        else:
            info.add_text("prompt", "x" * 3_000_000, zip=kind == "zTXt")
        quadrants().save(tmp_path / "a.png", pnginfo=info)
        assert_close(load_image(tmp_path / "a.png"), quadrants(), 0)

    def test_profile_of_a_png(self, tmp_path):
        wide = ImageCms.ImageCmsProfile(io.BytesIO(swapped_primaries())).tobytes()
        quadrants().save(tmp_path / "small.png", icc_profile=wide)
        quadrants().save(tmp_path / "large.png", icc_profile=wide + bytes(2_000_000))
        assert_close(load_image(tmp_path / "large.png"), load_image(tmp_path / "small.png"), 0)


class TestResize:
    @pytest.mark.parametrize("size", [(48, 32), (32, 48), (32, 32)])
    def test_the_middle_of_the_long_side_is_kept(self, size):
        image = Image.new("RGB", size, BLUE)
        left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
        image.paste(quadrants(), (left, top))
        assert_close(resize_center_crop(image, 32), quadrants(), 0)

    def test_scaling_down_averages_instead_of_picking_pixels(self):
        stripes = np.zeros((256, 256, 3), np.uint8)
        stripes[:, ::2] = 255
        small = np.asarray(resize_center_crop(Image.fromarray(stripes), 32)).astype(int)
        assert np.abs(small[4:-4, 4:-4] - 127.5).max() < 3

    def test_agrees_with_scaling_the_short_side_then_cropping(self):
        ramp = np.linspace(0, 255, 300 * 200 * 3).reshape(200, 300, 3).astype(np.uint8)
        image = Image.fromarray(ramp)
        scaled = image.resize((150, 100), Image.Resampling.BICUBIC).crop((25, 0, 125, 100))
        difference = np.asarray(resize_center_crop(image, 100)).astype(int) - np.asarray(scaled).astype(int)
        assert np.abs(difference[:, 3:-3]).max() <= 1

    def test_small_images_are_enlarged(self):
        enlarged = quadrants(8).resize((64, 64), Image.Resampling.BICUBIC)
        assert_close(resize_center_crop(quadrants(8), 64), enlarged, 0)

    @pytest.mark.parametrize("size", [(32, 64), (64, 32), [24, 32]])
    def test_a_non_square_crop_is_the_largest_in_the_middle(self, size):
        height, width = size
        for scale, border in ((1, (30, 0)), (2, (0, 40)), (1, (0, 0))):
            inner = Image.effect_noise((width * scale, height * scale), 80).convert("RGB")
            image = Image.new("RGB", (inner.width + 2 * border[0], inner.height + 2 * border[1]), BLUE)
            image.paste(inner, border)
            expected = inner.resize((width, height), Image.Resampling.LANCZOS)
            assert_close(resize_center_crop(image, size), expected, 0 if scale == 1 else 60)

    def test_extreme_strip(self):
        assert resize_center_crop(Image.new("RGB", (1, 100_000), RED), 64).getcolors() == [(4096, RED)]


class TestTensors:
    def test_every_level_makes_the_round_trip(self):
        levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
        x = image_to_tensor(Image.fromarray(levels))
        assert x.shape == (3, 16, 16)
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert (x.min(), x.max()) == (-1.0, 1.0)
        np.testing.assert_array_equal(np.asarray(tensor_to_image(x)), levels)

    def test_axes(self):
        x = image_to_tensor(quadrants())
        assert x[:, 4, 28].tolist() == [-1, 1, -1]  # green, above right
        assert x[:, 28, 4].tolist() == [-1, -1, 1]  # blue, below left

    def test_values_outside_the_range_are_clipped(self):
        x = torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1).to(torch.bfloat16)
        assert tensor_to_image(x).getpixel((0, 0)) == (0, 128, 255)

    @pytest.mark.parametrize(
        "x", [torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4), torch.full((3, 4, 4), torch.nan)]
    )
    def test_invalid_tensors_are_rejected(self, x):
        with pytest.raises(ValueError, match=r"expected|NaN"):
            tensor_to_image(x)


class TestFindImages:
    def test_folders_are_searched_in_sorted_order_and_files_kept_as_given(self, tmp_path):
        for name in ("z.JPG", "a.png", "sub/b.webp", "notes.txt", ".hidden.jpg", ".cache/c.jpg"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).touch()
        other = tmp_path / "odd.name"
        found = find_images([other, tmp_path / "in"])
        inside = ["a.png", "sub/b.webp", "z.JPG"]
        assert found == [other, *(tmp_path / "in" / name for name in inside)]

    def test_a_file_named_twice_is_taken_once(self, tmp_path):
        (tmp_path / "a.png").touch()
        assert find_images([tmp_path / "a.png", str(tmp_path)]) == [tmp_path / "a.png"]

    def test_an_empty_folder_is_an_error(self, tmp_path):
        with pytest.raises(UserError, match="contains no image"):
            find_images([tmp_path])

    def test_nothing_given_is_an_error(self):
        with pytest.raises(UserError, match="no image given"):
            find_images([])


def png(width: int, height: int, *, bit_depth: int, colour_type: int, rows: np.ndarray | bytes) -> bytes:
    """Return a hand-written PNG file, for features Pillow cannot write (16-bit RGB, wrong sizes)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    scanlines = b"".join(b"\x00" + row.tobytes() for row in rows) if len(rows) else b""
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def icc(colour_space: bytes, connection_space: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Return an ICC version 2 profile: 128-byte header, tag table, tags."""
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += b"\x00" * (-len(content) % 4)
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    d50 = struct.pack(">iii", 63190, 65536, 54061)
    header = struct.pack(">I", start + len(body)) + b"\x00" * 4 + b"\x02\x40\x00\x00"
    header += kind + colour_space + connection_space + b"\x00" * 12 + b"acsp" + b"\x00" * 28 + d50
    return header.ljust(128, b"\x00") + table + body


def swapped_primaries() -> bytes:
    """Return a profile with the sRGB primaries, red and green swapped, in linear light."""

    def xyz(x: float, y: float, z: float) -> bytes:
        return b"XYZ \x00\x00\x00\x00" + struct.pack(">iii", *(round(v * 65536) for v in (x, y, z)))

    linear = b"curv\x00\x00\x00\x00" + struct.pack(">I", 0)
    tags = {
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"gXYZ": xyz(0.4361, 0.2225, 0.0139),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        b"rTRC": linear,
        b"gTRC": linear,
        b"bTRC": linear,
    }
    return icc(b"RGB ", b"XYZ ", b"mntr", tags)


def cmyk_profile() -> bytes:
    """Return a profile of greys: one full ink gives L* = 40, four give black, none white; a* = b* = 0."""
    curve = bytes(range(256))
    grid = b""
    for corner in range(16):
        lightness = {0: 100, 15: 0}.get(corner, 40)
        grid += bytes([round(lightness * 2.55), 128, 128])
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1\x00\x00\x00\x00" + bytes([4, 3, 2, 0]) + identity + curve * 4 + grid + curve * 3
    return icc(b"CMYK", b"Lab ", b"prtr", {b"A2B0": lut})

    @pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPEG"])
    def test_all_extensions_of_jpeg(self, tmp_path, suffix):
        quadrants().save(tmp_path / f"a.{suffix}", "JPEG")
        assert find_images([tmp_path]) == [tmp_path / f"a.{suffix}"]
        assert load_image(tmp_path / f"a.{suffix}").size == (32, 32)

    def test_images_of_other_formats_are_counted(self, tmp_path, caplog):
        for name in ("a.heic", "b.HEIC", "c.jxl", "notes.txt"):
            (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match=r"contains no image; expected .*, got 2 \.heic, 1 \.jxl$"):
            find_images([tmp_path])
        (tmp_path / "d.png").write_bytes(b"")
        assert find_images([tmp_path]) == [tmp_path / "d.png"]
        assert "images are skipped: 2 .heic, 1 .jxl; convert" in caplog.text

    def test_symbolic_links_are_followed_but_not_into_a_loop(self, tmp_path, caplog):
        root, other = tmp_path / "root", tmp_path / "other"
        for folder in (root / "a", other):
            folder.mkdir(parents=True)
            (folder / "x.png").write_bytes(b"")
        links = {"b": other, "c": other, "a/up": root, "d": tmp_path / "none", "e": root / "e", "f": "f/g"}
        for name, target in links.items():
            (root / name).symlink_to(target)
        (other / "back").symlink_to(root)
        assert find_images([root]) == [root / name for name in ("a/x.png", "b/x.png", "c/x.png")]
        assert f"{root}/a/up is skipped: it is a symbolic link to a folder around it" in caplog.text
        assert f"{root}/d is skipped: its target is missing" in caplog.text
