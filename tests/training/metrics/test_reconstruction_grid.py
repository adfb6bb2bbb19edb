"""Grids of reconstructions: which pictures, at which ratios, and that they show what came back."""

import numpy as np
import pytest
import torch
from PIL import Image

from cat_fast.data.images.io import image_to_tensor
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError
from cat_fast.evaluation.metrics import psnr
from cat_fast.training.config.settings import LoggingConfig
from cat_fast.training.metrics.reconstruction_grid import ReconstructionGrid

CPU = torch.device("cpu")


def grid(size: int = 128, **logging) -> ReconstructionGrid:
    return ReconstructionGrid(LoggingConfig(**logging), size, CPU)


def test_held_out_photographs_of_different_kinds_are_shown():
    by_size = {photograph.path.name: photograph for photograph in photographs("held_out")}
    assert len(grid(grid_columns=99).pictures) == len(by_size)
    assert torch.equal(grid(grid_columns=2).pictures, grid(grid_columns=4).pictures[:2])


def test_pictures_of_a_folder_are_shown_in_order(tmp_path):
    for number, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        Image.new("RGB", (90, 70), colour).save(tmp_path / f"{number}.png")
    pictures = grid(size=8, grid_pictures=str(tmp_path), grid_columns=2).pictures
    assert pictures.shape == (2, 3, 8, 8)
    assert pictures[:, :, 0, 0].tolist() == [[1, -1, -1], [-1, 1, -1]]


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no picture"):
        grid(grid_pictures=str(tmp_path))


def test_each_row_shows_what_came_back_at_its_ratio_and_says_how_good_it_is():
    shown = grid(grid_columns=3)

    def reconstruct(picture, ratio):
        return picture * (1 - ratio / 64)

    image, figures = shown.draw(reconstruct, (8, 16, 32), "after 5 steps")
    assert list(figures) == ["held_out/psnr_8x", "held_out/psnr_16x", "held_out/psnr_32x"]
    assert figures["held_out/psnr_16x"] == pytest.approx(
        psnr(shown.pictures * 0.75, shown.pictures).mean().item(), abs=1e-4
    )
    pixels = image_to_tensor(image)
    for row, factor in enumerate([1, 7 / 8, 3 / 4, 1 / 2]):
        for column, picture in enumerate(shown.pictures):
            top, left = 44 + row * 132, 128 + column * 132
            cell = pixels[:, top : top + 128, left : left + 128]
            torch.testing.assert_close(cell, picture * factor, rtol=0, atol=1 / 127)
    assert (image.width, image.height) == (128 + 3 * 132 - 4 + 16, 44 + 4 * 132 - 4 + 16)
    labels = np.asarray(image)[44:, 16:127]  # the next column is a picture's edge
    for row in range(4):  # every row has its label, and no label runs into the pictures
        assert labels[row * 132 : row * 132 + 128].min() < 100
    assert labels[:, -4:].min() == 255


def test_small_pictures_are_enlarged_pixel_by_pixel():
    image, _ = grid(size=32, grid_columns=1).draw(lambda picture, ratio: picture, (8,), "")
    cell = np.asarray(image)[44 : 44 + 128, 128 : 128 + 128]
    blocks = cell.reshape(32, 4, 32, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_a_model_that_diverged_is_drawn_all_the_same():
    image, figures = grid(grid_columns=1).draw(lambda x, ratio: x * float("nan"), (8,), "")
    assert image.width > 0
    assert 0 < figures["held_out/psnr_8x"] < 20


def test_one_picture_goes_through_at_a_time_and_without_gradients():
    seen = []

    def reconstruct(picture, ratio):
        seen.append((tuple(picture.shape), ratio, torch.is_grad_enabled()))
        return picture

    grid(size=16, grid_columns=2).draw(reconstruct, (8, 16), "")
    assert seen == [((1, 3, 16, 16), ratio, False) for ratio in (8, 8, 16, 16)]
