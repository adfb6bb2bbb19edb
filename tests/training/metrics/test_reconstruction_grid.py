"""Reconstruction grids: content, labels and metrics."""

import numpy as np
import pytest
import torch

from cat_fast.data.images.io import image_to_tensor, load_image
from cat_fast.data.photographs import photographs
from cat_fast.evaluation.metrics import psnr
from cat_fast.training.metrics.reconstruction_grid import GridImages, ReconstructionGrid

CPU = torch.device("cpu")


def grid(count: int, size: int = 128, held_out: bool = True) -> ReconstructionGrid:
    images = [load_image(photograph.path) for photograph in photographs("held_out")[:count]]
    return ReconstructionGrid(GridImages(images, held_out), size, CPU)


def test_each_row_shows_reconstructions_at_its_ratio_with_their_psnr():
    shown = grid(3)

    def reconstruct(image, ratio):
        return image * (1 - ratio / 64)

    sheet, figures = shown.draw(reconstruct, (8, 16, 32), "after 5 steps")
    assert list(figures) == ["held_out/psnr_8x", "held_out/psnr_16x", "held_out/psnr_32x"]
    assert figures["held_out/psnr_16x"] == pytest.approx(
        psnr(shown.originals * 0.75, shown.originals).mean().item(), abs=1e-4
    )
    pixels = image_to_tensor(sheet)
    for row, factor in enumerate([1, 7 / 8, 3 / 4, 1 / 2]):
        for column, image in enumerate(shown.originals):
            top, left = 44 + row * 136, 120 + column * 136
            cell = pixels[:, top : top + 128, left : left + 128]
            torch.testing.assert_close(cell, image * factor, rtol=0, atol=1 / 127)
    assert (sheet.width, sheet.height) == (120 + 3 * 136, 44 + 4 * 136)
    labels = np.asarray(sheet)[44:, 8:120]  # the next column is the edge of an image
    for row in range(4):  # every row has its label, and no label runs into the images
        assert labels[row * 136 : row * 136 + 128].min() < 100
    assert labels[:, -8:].min() == 255


def test_small_images_are_enlarged_by_whole_pixels():
    image, _ = grid(1, size=32).draw(lambda x, ratio: x, (8,), "")
    cell = np.asarray(image)[44 : 44 + 128, 120 : 120 + 128]
    blocks = cell.reshape(32, 4, 32, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_training_images_are_labelled_as_such():
    sheets = []
    for held_out in (True, False):
        sheet, figures = grid(4, 128, held_out).draw(lambda x, ratio: x, (8,), "after 5 steps")
        assert list(figures) == [f"{'held_out' if held_out else 'training'}/psnr_8x"]
        sheets.append(np.asarray(sheet))
    ours, theirs = sheets
    assert np.array_equal(ours[44:], theirs[44:])
    assert not np.array_equal(ours[:44], theirs[:44])  # the titles differ


def test_diverged_model_can_be_drawn():
    image, figures = grid(1).draw(lambda x, ratio: x * float("nan"), (8,), "")
    assert image.width > 0
    assert 0 < figures["held_out/psnr_8x"] < 20


def test_images_are_reconstructed_one_at_a_time_without_gradients():
    seen = []

    def reconstruct(image, ratio):
        seen.append((tuple(image.shape), ratio, torch.is_grad_enabled()))
        return image

    grid(2, size=16).draw(reconstruct, (8, 16), "")
    assert seen == [((1, 3, 16, 16), ratio, False) for ratio in (8, 8, 16, 16)]
