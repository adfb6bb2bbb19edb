"""Inception Score, KID, precision and recall against torch-fidelity and their definitions."""

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from cat_fast.errors import UserError
from cat_fast.evaluation.distances.inception_score import inception_score
from cat_fast.evaluation.distances.kernel import kernel_distance, subset_kernel_distance
from cat_fast.evaluation.distances.neighbours import num_blocks, precision_recall


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_inception_score_equals_torch_fidelity():
    logits = draw(203, 30) * 3
    expected = isc_features_to_metric(logits, splits=10, shuffle=False)
    found = inception_score(logits)
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_inception_score_of_sure_and_of_unsure_classifiers():
    sure = torch.eye(10).repeat(10, 1) * 2000  # other classes underflow to 0
    assert inception_score(sure).mean == pytest.approx(10)
    assert inception_score(torch.zeros(20, 10)).mean == pytest.approx(1)
    with pytest.raises(UserError, match="at least 10 images"):
        inception_score(torch.zeros(9, 10))


def test_kid_over_subsets_equals_torch_fidelity():
    x, y = draw(120, 8), draw(90, 8, seed=1) + 0.3
    options = {"kid_subsets": 20, "kid_subset_size": 50, "rng_seed": 7, "verbose": False}
    expected = kid_features_to_metric(x, y, **options)
    found = subset_kernel_distance(x, y, subsets=20, size=50, seed=7)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)
    with pytest.raises(UserError, match="at least 100 images"):
        subset_kernel_distance(x, y, size=100)


def test_kid_is_the_unbiased_estimate_over_all_pairs():
    x, y = draw(30, 4).double(), draw(20, 4, seed=1).double()

    def k(a, b):
        return ((a @ b / 4) + 1) ** 3

    def mean(a, b):
        return sum(k(p, q) for p in a for q in b) / (len(a) * len(b))

    def without_self(a):
        return sum(k(p, q) for i, p in enumerate(a) for j, q in enumerate(a) if i != j) / (
            len(a) * (len(a) - 1)
        )

    expected = without_self(x) + without_self(y) - 2 * mean(x, y)
    assert kernel_distance(x, y).value == pytest.approx(expected.item(), rel=1e-10)


def test_the_interval_of_kid_covers_what_it_should():
    """Sets of one distribution: 95 % intervals must contain 0 in most of 60 draws, and be of its spread."""
    found = [kernel_distance(draw(60, 3, seed=s), draw(80, 3, seed=s + 500)) for s in range(60)]
    covered = sum(one.low <= 0 <= one.high for one in found) / len(found)
    spread = torch.tensor([one.value for one in found]).std().item()
    half = sum(one.high - one.value for one in found) / len(found) / 1.96
    assert 0.85 <= covered <= 1
    assert half == pytest.approx(spread, rel=0.5)


@pytest.mark.parametrize("block", [16, 1000])
def test_precision_and_recall_equal_torch_fidelity(block):
    samples, reference = draw(150, 6) * 0.8, draw(110, 6, seed=1)
    options = {"prc_neighborhood": 3, "prc_batch_size": 50, "save_cpu_ram": True, "verbose": False}
    expected = prc_features_to_metric(samples, reference, **options)
    blocks = []
    found = precision_recall(samples, reference, block=block, on_block=lambda: blocks.append(1))
    assert found.precision == pytest.approx(expected["precision"], abs=1e-6)
    assert found.recall == pytest.approx(expected["recall"], abs=1e-6)
    assert 0 < found.recall < found.precision < 1
    assert len(blocks) == num_blocks(150, 110, block)


def test_precision_and_recall_far_from_the_origin():
    samples, reference = draw(150, 6) * 0.8, draw(110, 6, seed=1)
    expected = precision_recall(samples, reference)
    assert precision_recall(samples + 300, reference + 300) == pytest.approx(expected, abs=0.02)


def test_copies_of_the_reference_are_precise_and_complete():
    reference = draw(40, 5)
    assert precision_recall(reference.clone(), reference) == (1.0, 1.0)
    assert precision_recall(reference + 100, reference) == (0.0, 0.0)
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(reference[:3], reference)


def test_precision_of_a_line():
    """Points 0..5 of a line reach their third neighbours at 3, 2, 2, 2, 2 and 3."""
    samples = torch.tensor([[-3.0], [-3.1], [8.0], [8.1]])
    assert precision_recall(samples, torch.arange(6.0)[:, None]).precision == 0.5
