"""Mixed ratios, tiling and gradient checkpointing give the results of plain calls."""

from itertools import product

import numpy as np
import pytest
import torch

from cat_fast.tokenizer.tiling import tiled
from tests.tokenizer.test_autoencoder import perturbed, tiny

RATIOS = (32, 8, 16, 8)


def images(*sides):
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, height, width, generator=generator) * 2 - 1 for height, width in sides]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_mixed_batch_equals_single_images_in_order():
    model = perturbed(tiny())
    batch = torch.stack(images(*[(64, 64)] * 4))
    posteriors = model.encode_mixed(batch, RATIOS)
    latents = [posterior.mode()[0] for posterior in posteriors]
    again = model.decode_mixed(latents, RATIOS)
    for image, ratio, posterior, decoded in zip(batch, RATIOS, posteriors, again, strict=True):
        alone = model.encode(image[None], ratio).latent_dist
        close(posterior.mean, alone.mean)
        close(posterior.logvar, alone.logvar)
        close(decoded, model.decode(alone.mode(), ratio).sample[0])


@torch.no_grad()
def test_a_mixed_batch_takes_several_sizes_with_one_call_per_ratio_and_size():
    model, calls = perturbed(tiny()), []
    model.encoder.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape))
    sides = [(64, 96), (32, 32), (64, 96), (32, 32)]
    posteriors = model.encode_mixed(images(*sides), [16, 32, 16, 8])
    assert [tuple(p.mean.shape[2:]) for p in posteriors] == [(4, 6), (1, 1), (4, 6), (4, 4)]
    assert sorted(calls) == [(1, 3, 32, 32), (1, 3, 32, 32), (2, 3, 64, 96)]


@torch.no_grad()
@pytest.mark.parametrize("ratio", [8, 32])
def test_tiling_leaves_images_of_one_tile_unchanged(ratio):
    model = perturbed(tiny())
    batch = torch.stack(images((64, 96)))
    latent = model.encode(batch, ratio).latent_dist.mean
    image = model.decode(latent, ratio).sample
    model.enable_tiling(96, 1 / 3)
    assert torch.equal(model.encode(batch, ratio).latent_dist.mean, latent)
    assert torch.equal(model.decode(latent, ratio).sample, image)


@torch.no_grad()
def test_tiles_of_a_local_function_blend_exactly():
    """A function of single cells has the same result with and without tiles, for any tile size."""
    x = torch.rand(2, 3, 7 * 8, 11 * 8)
    average = torch.nn.AvgPool2d(8)
    for size, overlap in ((2, 1), (3, 1), (5, 2), (4, 2), (16, 3)):
        got = tiled(average, x, cell_in=8, cell_out=1, size=size, overlap=overlap)
        torch.testing.assert_close(got, average(x))
    up = torch.nn.Upsample(scale_factor=4)
    got = tiled(up, x[..., :13, :9], cell_in=1, cell_out=4, size=6, overlap=2)
    torch.testing.assert_close(got, up(x[..., :13, :9]))


@pytest.mark.parametrize("dim", [-1, -2])
def test_overlaps_fade_linearly_from_one_tile_to_the_next(dim):
    """Tiles of 4 cells that overlap by 2 have constant values, so the result shows their weights."""
    values = [1.0, 5.0, 2.0]
    constants = iter(values)

    def constant(tile):
        return torch.full((1, 1, *(3 * side for side in tile.shape[-2:])), next(constants))

    x = torch.zeros(1, 1, 2, 8).transpose(dim, -1)
    got = tiled(constant, x, cell_in=1, cell_out=3, size=4, overlap=2).transpose(dim, -1)
    # The second tile starts at pixel 6, the first one ends and the third one starts at 12, ...
    expected = np.interp(np.arange(24) + 0.5, [6, 12, 18], values)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32).expand(1, 1, 6, 24))


@torch.no_grad()
@pytest.mark.parametrize("ratio", [8, 16])
@pytest.mark.parametrize(("factor", "tiles"), [(0.5, [0, 32, 64, 96]), (0.25, [0, 48, 96])])
def test_tiles_have_the_given_size_and_overlap(ratio, factor, tiles):
    """Tiles of 64 px of an image of 160 px start every 32 or 48 px, and the last one ends at its border."""
    model = perturbed(tiny(ratios=(8, 16)))
    model.enable_tiling(64, factor)
    batch = torch.stack(images((160, 160)))
    inputs = {model.encoder: [], model.decoder: []}
    for part, seen in inputs.items():
        part.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
    latent = model.encode(batch, ratio).latent_dist.mean
    model.decode(latent, ratio)
    corners = list(product(tiles, tiles))
    for tile, (y, x) in zip(inputs[model.encoder], corners, strict=True):
        assert torch.equal(tile, batch[..., y : y + 64, x : x + 64])
    assert [tile.shape[-2:] for tile in inputs[model.decoder]] == [(64 // ratio, 64 // ratio)] * len(corners)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_tiled_reconstructions_have_no_seam(ratio):
    """Pixels change at tile borders as little as near them in a reconstruction without tiles."""
    model = tiny(block_out_channels=(16, 32, 48, 96, 128, 128), initialisation="pyramid").eval()
    across = torch.linspace(-1, 1, 256)
    image = (0.6 * torch.sin(4 * across[:, None] * across + across)).expand(1, 3, 256, 256)

    def steps(decoded):
        """Return the largest difference between columns n and n + 1, for each n."""
        return decoded.diff(dim=-1).abs().amax(dim=(0, 1, 2))

    whole = steps(model(image, ratio).sample)
    limits = torch.nn.functional.max_pool1d(whole[None], 2 * ratio + 1, 1, ratio)[0]
    model.enable_tiling(128, 0.5)
    latent = model.encode(image, ratio).latent_dist.mean
    tiles = steps(model.decode(latent, ratio).sample)
    for border in (64, 128, 192):  # first column of a tile, or first one after a tile
        assert tiles[border - 1] <= 1.5 * limits[border - 1]
    model.disable_tiling()
    hard = torch.cat([model.decode(part, ratio).sample for part in latent.chunk(2, -1)], dim=-1)
    assert steps(hard)[127] > 3 * limits[127], "tiles without an overlap have a seam"


@pytest.mark.parametrize(
    ("size", "overlap_factor", "message"),
    [(48, 1 / 3, "multiples of the ratio 32"), (64, 1, "at most 0.5"), (0, 0.25, "multiples of the ratio 8")],
)
def test_impossible_tiles_are_refused(size, overlap_factor, message):
    with pytest.raises(ValueError, match=message):
        tiny().enable_tiling(size, overlap_factor)


@pytest.mark.parametrize("ghost_pass", [False, True])
@pytest.mark.parametrize("ratio", [8, 32])
def test_gradient_checkpointing_leaves_gradients_unchanged(ratio, ghost_pass):
    model = perturbed(tiny()).train()
    batch = torch.stack(images((64, 64)))

    def gradients():
        model.zero_grad()
        y, _ = model.reconstruct(batch, ratio, sample_posterior=False, ghost_pass=ghost_pass)
        y.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain = gradients()
    model.enable_gradient_checkpointing()
    runs = []
    model.encoder.mid_block.register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed = gradients()
    assert len(runs) == 2  # forward, and recomputation for the backward pass
    for name, gradient in plain.items():
        assert (gradient is None) == (checkpointed[name] is None)
        if gradient is not None:
            torch.testing.assert_close(checkpointed[name], gradient)


def test_channel_matching_is_optional_where_widths_agree():
    lean = tiny(encoder_matching=(8,), decoder_matching=())
    assert list(lean.encoder.channel_matching) == ["8"]
    assert not lean.decoder.channel_matching
    assert lean.decode(lean.encode(torch.rand(1, 3, 32, 32), 8).latent_dist.mode(), 8).sample.shape[2:] == (
        32,
        32,
    )
    with pytest.raises(ValueError, match="encoder_matching: ratio 8 is 8 channels wide and the mid block 16"):
        tiny(block_out_channels=(8, 8, 8, 8, 16, 16), encoder_matching=())
    with pytest.raises(ValueError, match="got 64"):
        tiny(decoder_matching=(64,))
