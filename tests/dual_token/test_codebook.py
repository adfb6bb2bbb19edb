"""The vector quantiser against definitions, and its updates on one and several ranks."""

import math

import pytest
import torch

from cat_fast.dual_token.codebook import Statistics, VectorQuantizer, usage


def quantizer(size=7, dim=3, ema=True):
    torch.manual_seed(0)
    return VectorQuantizer(size, dim, "ema" if ema else "gradient")


@pytest.mark.parametrize("ema", [True, False])
def test_nearest_code_and_straight_through_gradients(ema):
    model = quantizer(ema=ema)
    z = torch.randn(2, 5, 3, requires_grad=True)
    found = model(z)
    expected = torch.cdist(z.double(), model.codebook.double()).argmin(-1)
    assert torch.equal(found.codes, expected)
    torch.testing.assert_close(found.values, model.codebook[expected])
    weights = torch.randn_like(found.values)
    (gradient,) = torch.autograd.grad((found.values * weights).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weights)
    distance = (z - model.codebook[expected]).square().mean()
    torch.testing.assert_close(found.commitment, distance)
    (gradient,) = torch.autograd.grad(found.commitment, z, retain_graph=True)
    torch.testing.assert_close(gradient, 2 * (z - model.codebook[expected]) / z.numel())
    if ema:
        assert found.codebook == 0
    else:
        torch.testing.assert_close(found.codebook, distance)
        (gradient,) = torch.autograd.grad(found.codebook, model.codebook)
        assert gradient.abs().sum() > 0


def test_chunks_of_vectors_change_nothing(monkeypatch):
    model, z = quantizer(), torch.randn(50, 3)
    whole = model.nearest(z)
    monkeypatch.setattr("cat_fast.dual_token.codebook._CHUNK", 30)
    assert torch.equal(model.nearest(z), whole)


def test_ema_is_the_decayed_mean_of_the_vectors_and_adds_over_ranks():
    model, other = quantizer(), quantizer()
    batches = [torch.randn(6, 3), torch.randn(4, 3)]
    start = model.codebook.clone()
    codes = [model.nearest(z) for z in batches]
    parts = [model.statistics(z, index) for z, index in zip(batches, codes, strict=True)]
    model.update(Statistics(*(sum(pair) for pair in zip(*parts, strict=True))), decay=0.9)
    other.update(other.statistics(torch.cat(batches), torch.cat(codes)), decay=0.9)
    torch.testing.assert_close(model.codebook, other.codebook)
    everything, index = torch.cat(batches), torch.cat(codes)
    for code in range(7):
        own = everything[index == code]
        torch.testing.assert_close(model.codebook[code], own.mean(0) if len(own) else start[code])
        assert model.cluster_size[code] == pytest.approx(0.1 * 7 * len(own) / 10, rel=1e-5)
    # second step, by hand
    z = torch.randn(5, 3)
    index = model.nearest(z)
    size, total = model.cluster_size.clone(), model.cluster_sum.clone()
    model.update(model.statistics(z, index), decay=0.9)
    for code in index.unique().tolist():
        mass = 0.9 * size[code] + 0.1 * 7 / 5 * (index == code).sum()
        vector = 0.9 * total[code] + 0.1 * 7 / 5 * z[index == code].sum(0)
        torch.testing.assert_close(model.codebook[code], vector / mass)


@pytest.mark.parametrize("ema", [True, False])
def test_dead_codes_become_candidates_and_are_alive(ema):
    model = quantizer(ema=ema)
    model.cluster_size.fill_(1.0)
    model.cluster_size[[2, 5, 6]] = 0.01
    before = model.codebook.detach().clone()
    candidates = torch.randn(2, 3)
    assert model.revive(candidates, limit=0.1).tolist() == [2, 5]  # one candidate too few
    assert torch.equal(model.codebook[[2, 5]], candidates)
    kept = [0, 1, 3, 4, 6]
    assert torch.equal(model.codebook[kept], before[kept])
    assert model.revive(candidates, limit=0.1).tolist() == [6]
    assert model.revive(candidates, limit=0.1).tolist() == []


def test_revival_lets_a_collapsed_codebook_use_all_codes():
    model = quantizer(size=16, dim=2)
    torch.manual_seed(1)
    data = torch.randn(400, 2) * 0.3 + 20.0  # far from all codes: one code gets everything
    assert usage(torch.bincount(model.nearest(data), minlength=16)).share < 0.2
    for step in range(60):
        batch = data[torch.randperm(400)[:100]]
        model.update(model.statistics(batch, model.nearest(batch)), decay=0.8)
        if step % 5 == 0:
            model.revive(batch[:16], limit=0.1)
    found = usage(torch.bincount(model.nearest(data), minlength=16))
    assert found.share == 1.0
    assert found.perplexity > 12
    assert (data - model.lookup(model.nearest(data))).square().mean() < 0.03


def test_usage():
    found = usage(torch.tensor([2, 2, 0, 0]))
    assert found.share == 0.5
    assert found.perplexity == pytest.approx(2.0)
    assert usage(torch.ones(9)).perplexity == pytest.approx(9.0)
    skewed = usage(torch.tensor([3, 1]))
    assert skewed.perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 2 codes"):
        VectorQuantizer(1, 4)
    with pytest.raises(ValueError, match="expected ema or gradient"):
        VectorQuantizer(4, 4, "lfq")
