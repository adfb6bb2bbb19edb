"""The papers' efficiency claims: the counted figures agree with the published ones, or say why not."""

import json

import pytest

from benchmarks import claims
from benchmarks.efficiency import costs
from benchmarks.efficiency.comparison import IMAGENET, scoring_row
from benchmarks.efficiency.rates import average_rate, mean_tokens, parse_mix, rate_range
from benchmarks.efficiency.row import measured
from benchmarks.shared.committed import committed
from cat_fast.errors import UserError


def test_every_rate_of_the_table_of_scorers_follows_from_its_mix():
    rows = claims.rate_rows()
    assert len(rows) == 4 * 5
    for row in rows:
        mix = parse_mix(row.claim.rsplit(", ", 1)[1])
        low, high = rate_range(mix)
        assert low <= row.counted <= high
        assert bool(row.explanation) != (low - 0.005 <= row.published <= high + 0.005)
    assert not [row.claim for row in rows if row.explanation]


def test_tokens_and_rates_of_known_mixes():
    assert mean_tokens({16: 1.0}) == 256
    assert average_rate({8: 1.0}) == 8
    assert mean_tokens(IMAGENET) == pytest.approx(215.68)
    assert average_rate(parse_mix("9/54/37")) == pytest.approx(16.06, abs=0.005)  # published: 16.07


def test_claims_on_tokens_are_counted_to_their_last_digit():
    rows = {row.claim: row for row in claims.token_rows()}
    for claim, row in rows.items():
        if claim.startswith("fewer tokens than 8x"):
            assert round(row.counted, 2) == row.published
    assert round(rows["mean tokens in generation, ImageNet-512"].counted) == 216


def test_sizes_and_costs_are_those_of_the_documented_models():
    assert costs.tokenizer_parameters("cat_c16") == pytest.approx(190.10e6, rel=1e-4)
    assert costs.mean_over({8: 1.0, 16: 2.0, 32: 4.0}, IMAGENET) == pytest.approx(0.06 + 0.98 + 1.8)
    one = costs.generating(256)
    assert one["flops"] == pytest.approx(219.95e9, rel=1e-3)
    assert one["weight_bytes"] == pytest.approx(2 * 428.06e6, rel=1e-4)


def test_the_transformers_claims_follow_from_cat_xl():
    """0.82 is the mix of LLaVA's scores; 22.0 TFLOPs is an image at 16x, forward, with a slipped unit."""
    packing = json.loads(committed("packing").read_text(encoding="utf-8"))
    counts = packing["flops_per_image"]["presets"]["cat_xl"]
    rows = {row.claim: row for row in claims.flop_rows(counts)}
    relative = rows["FLOPs of generation against fixed 16x, 208 tokens"]
    assert relative.counted == pytest.approx(relative.published, abs=0.002)
    assert rows["FLOPs of generation against fixed 16x, 216 tokens"].counted == pytest.approx(
        0.865, abs=0.001
    )
    forward = rows["forward pass of the transformer, one image at 16x"]
    assert 100 * forward.counted == pytest.approx(forward.published, rel=0.001)
    training = rows["images per second in training against fixed 16x, at 197.44 tokens"]
    assert training.measured.value == pytest.approx(training.counted, rel=0.05)


def test_scoring_costs_more_than_the_arithmetic_of_training():
    # 10 TFLOPs per image: 1e6 * 512 * 1e13 / 156e12 seconds
    row = scoring_row({8: 80e12, 16: 80e12, 32: 80e12}, 8, 156e12)
    training, scoring = 512e6 * 1e13 / 156e12 / 3600, 380e6 * 1.63 / 3600
    assert row.counted == pytest.approx(100 * scoring / (scoring + training))
    assert row.counted > 90
    assert "172,056 H100-hours" in row.explanation


def test_a_figure_that_no_result_has_is_an_error():
    assert measured("packing", "197.ratio_vs_fixed16").value == 1.312
    with pytest.raises(UserError, match="has no figure 198"):
        measured("packing", "198.ratio_vs_fixed16")


def test_published_figures_are_written_as_they_are():
    rows = [vars(row) for row in claims.token_rows()[:1]]
    (row,) = claims._rounded({"claims": {"tokens": rows}})["claims"]["tokens"]
    assert row["published"] == 197.44
    assert row["counted"] == 196.48


def test_the_text_has_published_and_counted_side_by_side():
    report = {"claims": {"tokens": [vars(row) for row in claims.token_rows()[:2]]}}
    text = "\n".join(claims.lines(report))
    assert "mean tokens in generation, ImageNet-512: published 216, counted 215.68 tokens per image" in text
