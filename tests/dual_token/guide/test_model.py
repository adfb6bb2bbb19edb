"""The guide's model: sizes, targets, loading and refusals."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, to_pil_image
from torchvision.transforms.functional import resize as torchvision_resize

from cat_fast.dual_token.guide.model import GuideModel
from cat_fast.dual_token.resize import resize
from cat_fast.errors import UserError
from tests.dual_token.conftest import tiny_guide


@pytest.mark.parametrize("grid", [(2, 2), (5, 3), (20, 17)])
def test_sizes_follow_the_grid(grid):
    model = tiny_guide()
    images = torch.rand(2, 3, 70, 90) * 2 - 1
    inputs = model.resize_input(images, grid)
    assert inputs.shape[-2:] == (8 * grid[0], 8 * grid[1])
    output = model(inputs)
    assert output.quantized.codes.shape == (2, *grid)
    assert output.guide.shape == model.resize_target(images, grid).shape == (2, 3, 2 * grid[0], 2 * grid[1])
    codes = model.encode(inputs)
    assert torch.equal(codes, output.quantized.codes)
    torch.testing.assert_close(model.decode(codes), output.guide, rtol=1e-5, atol=1e-5)


def test_the_papers_model_has_the_papers_token_counts():
    with torch.device("meta"):
        model = GuideModel()
    assert (model.stride, model.scale) == (32, 8)
    assert [model.guide_size((side, side))[0] for side in (2, 4, 8, 16)] == [16, 32, 64, 128]
    assert model.resize_input(torch.zeros(1, 3, 256, 256), (8, 8)).shape[-2:] == (256, 256)
    assert model.guide_size((20, 17)) == (160, 136)


def test_target_is_an_antialiased_bicubic_resize():
    torch.manual_seed(0)
    pixels = (torch.rand(3, 40, 60) * 255).to(torch.uint8)
    ours = resize(pixels[None].float() / 127.5 - 1, (10, 12))[0]
    pillow = pil_to_tensor(to_pil_image(pixels).resize((12, 10), Image.Resampling.BICUBIC))
    assert ((ours + 1) * 127.5 - pillow).abs().max() < 1.5
    other = torchvision_resize(pixels, [10, 12], InterpolationMode.BICUBIC, antialias=True)
    assert ((ours + 1) * 127.5 - other).abs().max() < 1.5
    assert resize(ours[None], (10, 12))[0] is not None


def test_save_and_load_keep_codes_and_fingerprint(tmp_path):
    model = tiny_guide()
    model.quantizer.cluster_size.uniform_()
    model.save_pretrained(tmp_path)
    loaded = GuideModel.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 16) * 2 - 1
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert torch.equal(loaded.quantizer.cluster_size, model.quantizer.cluster_size)
    assert loaded.fingerprint() == model.fingerprint()
    assert tiny_guide(seed=1).fingerprint() != model.fingerprint()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder_out_channels": [8, 8, 8, 8]}, "fewer levels than the encoder's 4"),
        ({"norm_num_groups": 3}, "divisible by 3 groups"),
        ({"codebook": "lfq"}, "expected ema or gradient"),
        ({"codebook_size": 1}, "at least 2 codes"),
    ],
)
def test_impossible_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_guide(**changes)


def test_an_image_smaller_than_its_guide_is_refused():
    model = tiny_guide()
    model.require_large_enough(8, 16, (4, 8))
    with pytest.raises(UserError, match="15 x 8 px is smaller than its guide of 16 x 8 px"):
        model.require_large_enough(8, 15, (4, 8))
