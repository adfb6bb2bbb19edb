"""The packaged scorer: its files, quality, determinism across processes, and refitting."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cat_fast import complexity
from cat_fast.complexity import (
    SCORED_CAPTIONS,
    Description,
    EmbeddedScorer,
    Score,
    choose_ratio,
    choose_ratios,
    default_scorer,
    default_thresholds,
    read_scored,
)
from cat_fast.complexity.embedded_scorer import REPORT_FILE, SCORER_FILE
from cat_fast.complexity.fitting import FitResult, Quality, fit
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError


@pytest.fixture(scope="module")
def captions() -> tuple[list[Description], list[int]]:
    return read_scored()


@pytest.fixture(scope="module")
def refit(captions: tuple[list[Description], list[int]]) -> FitResult:
    return fit(*captions)


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads(REPORT_FILE.read_text())


def test_packaged_scorer_is_small_plain_arrays() -> None:
    assert SCORER_FILE.stat().st_size < 3e6
    with np.load(SCORER_FILE, allow_pickle=False) as stored:  # raises on an object array
        assert all(stored[name].dtype.kind in "fU" for name in stored.files)
        assert all(np.isfinite(stored[name]).all() for name in stored.files if stored[name].dtype.kind == "f")


def test_report_matches_the_packaged_captions(report: dict, captions: tuple) -> None:
    assert hashlib.sha256(SCORED_CAPTIONS.read_bytes()).hexdigest() == report["captions_sha256"]
    assert len(captions[0]) == len({description.caption for description in captions[0]}) == report["captions"]


def test_refitting_reproduces_the_packaged_scorer(refit: FitResult, report: dict) -> None:
    shipped = EmbeddedScorer.load()
    for name in ("words", "chars"):
        np.testing.assert_array_equal(getattr(refit.scorer.space, name), getattr(shipped.space, name))
    np.testing.assert_allclose(refit.scorer.coefficients, shipped.coefficients, atol=1e-6)
    np.testing.assert_allclose(refit.scorer.knots, shipped.knots, atol=1e-6)
    for name, value in report["cross_validation"].items():
        assert getattr(refit.quality, name) == pytest.approx(value, abs=0.005)


def test_held_out_captions_are_scored_well(captions: tuple) -> None:
    # A split other than the fit's own folds: every fourth caption is held out.
    descriptions, scores = captions
    held_out = np.arange(len(scores)) % 4 == 0
    scorer = fit(
        [d for d, out in zip(descriptions, held_out, strict=True) if not out],
        np.array(scores)[~held_out].tolist(),
    ).scorer
    unseen = [d for d, out in zip(descriptions, held_out, strict=True) if out]
    quality = Quality.measure(scorer.continuous_scores(unseen), np.array(scores)[held_out])
    assert quality.pearson > 0.80
    assert quality.mae < 1.0
    assert quality.within_one > 0.78


def test_out_of_fold_scores_have_the_target_distribution(refit: FitResult, captions: tuple) -> None:
    assert Counter(refit.out_of_fold.tolist()) == Counter(captions[1])


def test_captions_of_packaged_photographs_were_not_fitted_on(captions: tuple) -> None:
    fitted = {" ".join(description.caption.lower().split()) for description in captions[0]}
    shown = {" ".join(photograph.caption.lower().split()) for photograph in photographs()}
    assert len(shown) >= 24
    assert not shown & fitted


def test_scores_are_the_same_in_every_process_and_order(captions: tuple) -> None:
    descriptions = captions[0][::10]
    here = [default_scorer().score_many([description])[0].expected for description in descriptions]
    code = (
        "from cat_fast.complexity import *\n"
        "scorer = EmbeddedScorer.load()\n"
        "print([scorer.score_many([d])[0].expected for d in read_scored()[0][::10]])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3"}
    there = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(there.stdout) == here
    assert default_scorer().score_many(descriptions[::-1]) == default_scorer().score_many(descriptions)[::-1]


def test_scores_are_the_continuous_ones_rounded(captions: tuple) -> None:
    for score in default_scorer().score_many(captions[0]):
        assert abs(score.score - score.expected) <= 0.5
        assert 1 <= score.score <= 9


@pytest.mark.parametrize(
    ("simple", "busy"),
    [
        (Description("a clear blue sky"), Description("a crowded street market with many stalls and signs")),
        (Description("a newspaper"), Description("a newspaper", has_text=True)),
        (Description("someone in a park"), Description("someone in a park", has_faces=True)),
    ],
)
def test_more_detail_scores_higher(simple: Description, busy: Description) -> None:
    assert default_scorer().score_many([simple])[0].expected < default_scorer().score_many([busy])[0].expected


@pytest.mark.parametrize("caption", ["x", "?!", "щось зовсім інше", "🦊", "word " * 20_000, "a\x00b"])
def test_any_caption_gets_a_score(caption: str) -> None:
    assert 1 <= default_scorer().score_many([Description(caption)])[0].score <= 9


def test_contributions_sum_to_the_prediction() -> None:
    described = Description("two dogs on a beach, and a kite", has_text=True)
    parts = default_scorer().contributions(described)
    total = sum(value for _, value in parts) + default_scorer().intercept
    assert total == pytest.approx(default_scorer().predict([described])[0])
    assert "has text" in dict(parts)
    assert "has faces" not in dict(parts)


def test_save_and_load_round_trip(tmp_path: Path, refit: FitResult, captions: tuple) -> None:
    refit.scorer.save(tmp_path / "scorer.npz")
    loaded = EmbeddedScorer.load(tmp_path / "scorer.npz")
    np.testing.assert_array_equal(loaded.predict(captions[0]), refit.scorer.predict(captions[0]))


def test_file_without_a_scorer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such scorer"):
        EmbeddedScorer.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not arrays")
    np.savez(tmp_path / "other.npz", words=np.zeros(3))
    np.save(tmp_path / "single.npy", np.zeros(3))
    np.savez(tmp_path / "pickled.npz", words=np.array([{}], dtype=object))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "half.npz").write_bytes(SCORER_FILE.read_bytes()[:50_000])
    damaged = bytearray(SCORER_FILE.read_bytes())
    damaged[5_000:6_000] = bytes(1_000)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    for name in (
        "text.npz",
        "other.npz",
        "single.npy",
        "pickled.npz",
        "empty.npz",
        "half.npz",
        "damaged.npz",
    ):
        with pytest.raises(UserError, match="not a scorer file"):
            EmbeddedScorer.load(tmp_path / name)


def test_too_few_captions_to_fit_are_rejected(captions: tuple) -> None:
    with pytest.raises(UserError, match="at least 5 captions of every score"):
        fit(captions[0][:20], captions[1][:20])
    with pytest.raises(UserError, match="one score"):
        fit(captions[0], captions[1][:-1])


def test_choose_ratio_accepts_a_custom_scorer_and_thresholds() -> None:
    class AlwaysFive:
        name, version = "five", "1"

        def score_many(self, descriptions: list[Description]) -> list[Score]:
            return [Score.of_expected(5.2)] * len(descriptions)

    cat = Description("a cat")
    assert choose_ratio(cat, AlwaysFive(), default_thresholds()).ratio == 16
    result = choose_ratio(cat, AlwaysFive())
    assert (result.description, result.score, result.tokens()) == (cat, 5, 256)
    assert choose_ratios([]) == []


def test_importing_complexity_loads_neither_torch_nor_scikit_learn() -> None:
    # Stub the top-level package, so that imports in its __init__ do not count.
    code = (
        "import sys, types\n"
        "sys.modules['cat_fast'] = package = types.ModuleType('cat_fast')\n"
        f"package.__path__ = [{str(Path(complexity.__file__).parents[1])!r}]\n"
        "import cat_fast.complexity\n"
        "sys.exit(' '.join({'torch', 'sklearn'} & set(sys.modules)))"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert imported.stderr.strip() == ""
