"""Losses of the semantic branch against the paper's equations, written out."""

import math

import pytest
import torch

from cat_fast.dual_token.semantic.code_decoder import CodeDecoder, cosine_loss
from cat_fast.dual_token.semantic.contrastive import Temperature, info_nce
from cat_fast.dual_token.semantic.reverse_qformer import state_loss


def test_info_nce_is_equation_6():
    torch.manual_seed(0)
    z, t = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    tau, total = 0.2, 0.0
    for i in range(4):
        similar = [float(z[i] @ t[j] / (z[i].norm() * t[j].norm())) for j in range(4)]
        total -= math.log(math.exp(similar[i] / tau) / sum(math.exp(s / tau) for s in similar)) / 4
    loss, _ = info_nce(z, t, torch.arange(4), torch.tensor(tau))
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_ranks_with_all_texts_have_the_gradient_of_the_global_batch():
    """Each rank's loss covers its own images against all texts; the mean over ranks is the global loss."""
    torch.manual_seed(0)
    texts = torch.randn(6, 5)
    images = torch.randn(6, 5, requires_grad=True)
    weight = torch.randn(5, 5, requires_grad=True)  # the text projection, which every rank applies to all
    (expected, expected_weight) = torch.autograd.grad(
        info_nce(images, texts @ weight, torch.arange(6), torch.tensor(0.1))[0], (images, weight)
    )
    per_rank = [
        info_nce(images[own], texts @ weight, own, torch.tensor(0.1))[0]
        for own in (torch.arange(3), torch.arange(3, 6))
    ]
    found, found_weight = torch.autograd.grad(sum(per_rank) / 2, (images, weight))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_weight, expected_weight)


def test_accuracy_is_one_directional():
    images, texts = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    _, accuracy = info_nce(images, texts, torch.arange(3), torch.tensor(0.1))
    assert accuracy.item() == pytest.approx(1 / 3)


def test_temperature_is_fixed_or_learned():
    fixed, learned = Temperature(0.1, learned=False), Temperature(0.1)
    assert fixed().item() == pytest.approx(0.1)
    assert list(fixed.parameters()) == []
    assert [p.numel() for p in learned.parameters()] == [1]
    learned.log_scale.data.fill_(100.0)
    assert learned().item() == pytest.approx(0.01)  # logits are scaled by at most 100
    with pytest.raises(ValueError, match="temperature"):
        Temperature(0.0)


def test_cosine_loss_is_equation_7():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    terms = [(x @ y / (x.norm() * y.norm())).item() for x, y in zip(a.view(6, 4), b.view(6, 4), strict=True)]
    assert cosine_loss(a, b).item() == pytest.approx(-sum(terms) / 6, rel=1e-5)
    assert cosine_loss(a, 3 * a).item() == pytest.approx(-1.0, rel=1e-5)


def test_state_loss_is_equation_8_and_ignores_the_padding():
    torch.manual_seed(0)
    states = torch.randn(2, 5, 4)
    targets = [torch.randn(5, 4), torch.randn(2, 4)]
    mse, entropy, cosine = state_loss(states, None, targets)
    expected = [(states[0] - targets[0]).square().mean(), (states[1, :2] - targets[1]).square().mean()]
    torch.testing.assert_close(mse, sum(expected) / 2)
    assert entropy == 0
    changed = states.clone()
    changed[1, 2:] = 100.0
    torch.testing.assert_close(state_loss(changed, None, targets)[0], mse)
    perfect = torch.zeros(2, 5, 4)
    perfect[0], perfect[1, :2] = targets[0], targets[1]
    logits = torch.full((2, 5), -50.0)
    logits[0, 4] = logits[1, 1] = 50.0
    mse, entropy, cosine = state_loss(perfect, logits, targets)
    assert mse == 0
    assert entropy < 1e-6
    torch.testing.assert_close(cosine, torch.tensor(1.0))


def test_the_code_decoder_uses_positions():
    torch.manual_seed(0)
    decoder = CodeDecoder(3, 8, 4, layers=1, heads=2).eval()
    same = torch.ones(1, 4, 3)
    assert (decoder(same)[0, 0] - decoder(same)[0, 1]).abs().max() > 1e-4
