"""The papers' efficiency claims: the counted figures agree with the published ones, or say why not."""

import json

import pytest

from benchmarks import claims, packing
from benchmarks.bounds.data_sheets import read_sheets
from benchmarks.bounds.steps import StepWork
from benchmarks.bounds.trace import Call
from benchmarks.efficiency import comparison, costs
from benchmarks.efficiency.rates import average_rate, mean_tokens, parse_mix, rate_range
from benchmarks.efficiency.row import Results, counted_cell, measured_cell
from benchmarks.efficiency.scoring import second_rows, share_rows
from benchmarks.shared.committed import committed, read
from benchmarks.shared.mixes import IMAGENET
from cat_fast.errors import UserError
from cat_fast.training.tokenizer.live_bytes import LiveBytes

SHEETS, ASSUMED = read_sheets()


def test_every_rate_of_the_table_of_scorers_follows_from_its_mix():
    rows = claims.rate_rows()
    assert len(rows) == 4 * 5
    for row in rows:
        mix = parse_mix(row.claim.rsplit(", ", 1)[1])
        low, high = rate_range(mix)
        assert low <= row.counted <= high
        assert low - 0.005 <= row.published <= high + 0.005
        assert bool(row.explanation) == (abs(row.published - row.counted) >= 0.01)


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
    assert costs.forward_flops(256) == pytest.approx(219.95e9, rel=2e-5)


def test_the_transformers_claims_follow_from_cat_xl():
    """0.82 is the mix of LLaVA's scores; 22.0 TFLOPs is an image at 16x, forward, with a slipped unit."""
    packing = json.loads(committed("packing").read_text(encoding="utf-8"))
    counts = packing["flops_per_image"]["presets"]["cat_xl"]
    rows = {row.claim: row for row in claims.flop_rows(counts, Results())}
    relative = rows["FLOPs of generation against fixed 16x, 208 tokens"]
    assert relative.counted == pytest.approx(relative.published, abs=0.002)
    assert rows["FLOPs of generation against fixed 16x, 216 tokens"].counted == pytest.approx(
        0.865, abs=0.001
    )
    forward = rows["forward pass of the transformer, one image at 16x"]
    assert 100 * forward.counted == pytest.approx(forward.published, rel=0.001)
    training = rows["images per second in training against fixed 16x, at 197.44 tokens"].measured
    assert training.of == "training step of a transformer 768 wide and 2 deep, 192.75 tokens per image"
    assert training.value == pytest.approx(training.expected, rel=0.02)
    assert training.file == committed("packing").name
    generation = rows["images per second in generation against fixed 16x, at 216 tokens"].measured
    assert generation.of == "DiT-S/2 with CAT's decoder, 250 steps with guidance, on amd-epyc-2t"
    assert generation.value == pytest.approx(generation.expected, rel=0.05)
    assert generation.file == committed("training_steps").name


def test_the_claim_on_generation_is_measured_by_training_only_without_results(tmp_path, monkeypatch):
    cases = {
        f"generate.{name}": {"rates": {"images": rate}, "flops_per_image": flops}
        for name, rate, flops in (("mix", 3.0, 80.0), ("fixed_16x", 2.0, 100.0))
    }
    about = {"cpu": {"processor": "Other", "threads": 4}}
    content = {"about": about, "compared": {"denoising_steps": 250}, "cases": cases}
    monkeypatch.setattr("benchmarks.shared.committed.FOLDER", tmp_path)
    packed = committed("packing")
    (tmp_path / packed.name).write_text(packed.read_text())
    trained = claims.generation(Results())
    assert trained.of == "training step of a transformer 768 wide and 2 deep, 215.58 tokens per image"
    assert trained.value == pytest.approx(trained.expected, rel=0.02)
    (tmp_path / "training_steps_other-4t_2026-12-01.json").write_text(json.dumps(content))
    generated = claims.generation(Results())
    assert (generated.value, generated.expected) == (1.5, 1.25)
    assert generated.key == "cases/generate.mix/rates/images"


def test_the_share_of_scoring_is_an_estimate_with_both_ends():
    # a step of 8 images takes 0.5 s at the peak: 1e6 * 512 / 8 * 0.5 seconds
    published, *ours = share_rows({8: 0.5, 16: 0.5, 32: 0.5}, 8, Results())
    training, scoring = 1e6 * 512 / 8 * 0.5 / 3600, 380e6 * 1.63 / 3600
    low, high = published.estimated
    assert high == pytest.approx(100 * scoring / (scoring + training))
    assert low == pytest.approx(100 * scoring / (scoring + training / 0.4))
    assert published.counted is None
    assert counted_cell(vars(published)) == "estimate, 88.6 to 95.1"
    assert published.claim.endswith(", share of scoring in scoring and training")
    assert "172,056 hours of an H100" in published.explanation
    assert all("Hours of a CPU core and of an A100, added as they are." in row.explanation for row in ours)
    assert {row.measured.key for row in ours} == {"scorers/accurate/seconds", "scorers/jpeg/seconds"}
    assert all(row.estimated[1] < low for row in ours)


def test_published_seconds_of_scoring_stand_next_to_ours():
    rows = {row.published: row for row in second_rows(Results())}
    assert set(rows) == {1.84, 1.63, 1.0, 0.05, ""}
    assert rows[1.0].measured.file == committed("scoring").name
    assert rows[1.0].measured.value < 0.05


def test_a_figure_that_no_result_has_is_an_error():
    ratio = read(committed("packing"))["197.ratio_vs_fixed16"]
    assert Results().measured("packing", "197.ratio_vs_fixed16").value == ratio
    with pytest.raises(UserError, match="has no figure 198"):
        Results().measured("packing", "198.ratio_vs_fixed16")


def test_results_of_a_folder_come_before_the_committed_ones(tmp_path):
    content = {"scorers": {"jpeg": {"seconds": 0.25}}}
    (tmp_path / "scoring_other-4t_2026-01-01.json").write_text(json.dumps(content))
    found = Results(tmp_path).measured("scoring", "scorers/jpeg/seconds")
    assert (found.value, found.file) == (0.25, "scoring_other-4t_2026-01-01.json")
    assert Results(tmp_path).measured("packing", "197.ratio_vs_fixed16").file == committed("packing").name
    assert claims.main(["--quick", "--results", str(tmp_path / "none")]) == 2


def test_figures_that_a_folder_lacks_are_the_committed_ones(tmp_path):
    """Quick, missing, failed and wrong cases are not figures."""
    full = json.loads(committed("packing").read_text(encoding="utf-8"))
    file = tmp_path / "packing_other-4t_2026-12-01.json"

    def file_of(mix, **changes):
        file.write_text(json.dumps(full | changes))
        return claims.packed_step(mix, Results(tmp_path)).file

    quick = {"effort": full["about"]["effort"] | {"min_pairs": 1}}
    assert file_of("197") == file.name
    assert file_of("197", about=full["about"] | quick) == committed("packing").name
    wrong = {"197": full["cases"]["197"] | {"right": False, "seconds": {}}}
    assert file_of("197", cases=full["cases"] | wrong) == committed("packing").name
    assert file_of("216", cases={"216": full["cases"]["216"]}) == file.name
    assert file_of("197", cases={"216": full["cases"]["216"]}) == committed("packing").name

    measured = json.loads(committed("autoencoder").read_text(encoding="utf-8"))
    measured["about"]["cpu"]["processor"] = "Other"
    measured["cases"]["heads512.32x.encode.fp32"] = {"right": False, "seconds": {}, "peak_bytes": {}}
    (tmp_path / "autoencoder_other-4t_2026-12-01.json").write_text(json.dumps(measured))
    assert {one.of for one in claims.coding_seconds(Results(tmp_path)).values()} == {"on amd-epyc-2t"}
    coded = dict(comparison._measured_coding(Results(tmp_path)))
    assert "measured on amd-epyc-2t, ms" in coded["encode"]
    assert "measured on other-2t, ms" in coded["decode"]


def test_coding_is_measured_in_seconds_on_a_named_machine():
    cases = read(committed("autoencoder"))["cases"]
    encoding, decoding = (
        cases[f"heads512.16x.{use}.fp32"]["seconds"]["ours"] for use in ("encode", "decode")
    )
    found = claims.coding_seconds(Results())[16]
    assert found.value == pytest.approx(encoding["median"] + decoding["median"])
    assert measured_cell(vars(found)) == f"{found.value:.4g} s per image (on amd-epyc-2t)"


def test_generating_shares_a_pack_of_many_images():
    """Both passes and all images read the weights once, so that times follow the FLOPs."""
    figures = {ratio: dict(comparison._generating(ratio, SHEETS, ASSUMED)) for ratio in (16, 32)}
    fixed = figures[16]
    assert fixed["GFLOPs"] == pytest.approx(500 * 219.95 + 659.7, rel=1e-4)
    assert fixed["H100 bound, ms"] < fixed["H100 predicted, ms"] < 2.5 * fixed["H100 bound, ms"]
    assert 0 < fixed["H100 predicted, of which decoding, ms"] < 0.05 * fixed["H100 predicted, ms"]
    less = figures[32]["GFLOPs"] / fixed["GFLOPs"]
    assert figures[32]["H100 predicted, ms"] / fixed["H100 predicted, ms"] == pytest.approx(less, rel=0.2)


def test_no_flops_take_longer_at_the_peak_than_the_bound(monkeypatch):
    """Upsampling that is merged into convolutions counts in neither."""
    step = StepWork(
        name="step",
        dtype="bfloat16",
        images=2,
        tokens=1.0,
        compulsory=0,
        calls=[Call("convolution", 9 * 10**9, 4, "bfloat16", avoidable=5 * 10**9)],
        parameters={"autoencoder": 1},
    )
    monkeypatch.setattr(comparison, "vae_step", lambda *given: step)
    monkeypatch.setattr(costs, "training_memory", lambda *given: 0)
    decode = costs.coding("fixed_16x_c16", 16, half=True)["decode"]
    for figures in (
        comparison._coding(decode, SHEETS, ASSUMED),
        comparison._tokenizer_training(16, SHEETS, ASSUMED),
    ):
        found = dict(figures)
        for gpu, sheet in SHEETS.items():
            at_the_peak = 1e3 * 1e9 * found["GFLOPs"] / sheet.matrix_flops("bfloat16")
            assert at_the_peak <= found[f"{gpu} bound, ms"] * (1 + 1e-9)


def test_memory_of_training_is_that_of_states_and_images():
    assert costs.training_states(autoencoder=10, discriminator=1) == 11 * (4 + 4 + 8) + 10 * 4
    arguments = {"in_channels": 4, "hidden_size": 64, "depth": 8, "num_heads": 2, "class_dropout_prob": 0.0}
    model = packing.build(arguments)
    live = {}
    for images in (1, 3):
        batch = packing.make_batch([256] * images, arguments)
        with LiveBytes(list(model.parameters())) as counted:
            sample = model(batch.packed).sample
        live[images] = counted.live
        del sample
    kept = costs.transformer_activation_bytes(model, 256, item=4, stream=4)
    assert (live[3] - live[1]) / 2 == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("names", [("fixed_16x", "mix"), ()])
def test_measured_steps_of_fixed_ratios_are_shown_where_they_exist(tmp_path, names, monkeypatch):
    monkeypatch.setattr("benchmarks.shared.committed.FOLDER", tmp_path / "none")
    case = {"rates": {"images": 4.0}, "peak_bytes": {"ours": 3 * 2**20}}
    content = {
        "about": {"cpu": {"processor": "AMD EPYC", "threads": 2}},
        "cases": {
            "train.transformer.fixed_8x": {"right": False, "seconds": {}},
            **{f"train.transformer.{name}": case for name in names},
        },
    }
    (tmp_path / "training_steps_amd-epyc-2t_2026-12-01.json").write_text(json.dumps(content))
    found = dict(comparison._measured_steps(Results(tmp_path)))
    times = {"16x": 250.0, "CAT": 250.0}
    peaks = {"16x": 3.0, "CAT": 3.0}
    where = "measured on amd-epyc-2t with DiT-S/2"
    assert found == (
        {"training the transformer": {f"{where}, ms": times, f"{where}, MiB of the step": peaks}}
        if names
        else {}
    )


def test_published_figures_are_written_as_they_are():
    rows = [vars(row) for row in claims.token_rows()[:1]]
    (row,) = claims._rounded({"claims": {"tokens": rows}})["claims"]["tokens"]
    assert row["published"] == 197.44
    assert row["counted"] == 196.48


def test_the_text_has_published_and_counted_side_by_side():
    report = {"claims": {"tokens": [vars(row) for row in claims.token_rows()[:2]]}}
    text = "\n".join(claims.lines(report))
    assert "mean tokens in generation, ImageNet-512, tokens per image: published 216, counted 215.68" in text
