"""Ghost pass: ranks at different ratios produce all gradients in the same order, at little cost."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.config import fill, read_yaml
from cat_fast.models.build import build_model
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.training.config.settings import TokenizerRun
from tests.training.tokenizer.gan_case import RATIOS, SIDE, tiny_models

CONFIGS = Path(__file__).parents[3] / "configs" / "tokenizer"


def loss_at(model: NestedAutoencoderKL, ratio: int, ghost_pass: bool) -> torch.Tensor:
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(ratio))
    output, _ = model.reconstruct(images, ratio, sample_posterior=False, ghost_pass=ghost_pass)
    return output.square().mean()


def gradient_order(ratio: int) -> list[str]:
    """Return the names of parameters in the order in which their gradients are complete at `ratio`."""
    (model, _), order = tiny_models(), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    loss_at(model, ratio, ghost_pass=True).backward()
    return order


def test_every_ratio_produces_every_gradient_in_the_same_order():
    orders = [gradient_order(ratio) for ratio in RATIOS]
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == sorted(name for name, _ in tiny_models()[0].named_parameters())


@pytest.mark.parametrize("ratio", RATIOS)
def test_without_the_ghost_pass_gradients_are_missing(ratio):
    model, _ = tiny_models()
    loss_at(model, ratio, ghost_pass=False).backward()
    assert any(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_ghost_pass_changes_neither_output_nor_gradients(ratio):
    results = []
    for ghost_pass in (False, True):
        model, _ = tiny_models()
        loss = loss_at(model, ratio, ghost_pass)
        loss.backward()
        gradients = {
            n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()
        }
        results.append((loss.detach(), gradients))
    (plain, plain_gradients), (ghost, ghost_gradients) = results
    assert torch.equal(plain, ghost)
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradient, ghost_gradients[name]), name


@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_ghost_pass_costs_less_than_two_percent_at_the_papers_size(ratio):
    """The base is the autoencoder's forward and backward pass, without the losses' networks."""
    config = fill(TokenizerRun, read_yaml(CONFIGS / "cat_c16.yaml"), [])
    with torch.device("meta"):
        model = build_model(NestedAutoencoderKL, config.model)
        images = torch.empty(config.data.batch_size, 3, config.data.image_size, config.data.image_size)
    assert images.shape == (8, 3, 512, 512)
    plain, ghost = (flops(model, images, ratio, ghost_pass) for ghost_pass in (False, True))
    # Each ratio skips some blocks, and these differ.
    assert 0 < ghost - plain < 0.02 * ghost


def flops(model: NestedAutoencoderKL, images: torch.Tensor, ratio: int, ghost_pass: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        output, _ = model.reconstruct(images, ratio, ghost_pass=ghost_pass)
        output.sum().backward()
    return counter.get_total_flops()
