"""Figures of the nano report: the low-pass, error rates, intervals, the classifier and the nearest images."""

import json

import numpy as np
import pytest
import torch

from benchmarks.nano.acceptable import correlations
from benchmarks.nano.cards import figures_section, update_figures
from benchmarks.nano.chosen import chosen_ratios, describe_budget
from benchmarks.nano.emoji_classifier import augment, train_classifier
from benchmarks.nano.emoji_data import EmojiData
from benchmarks.nano.generators import compare
from benchmarks.nano.intervals import mean_with_interval, paired_difference
from benchmarks.nano.low_pass import low_pass
from benchmarks.nano.pages import character_error_rate
from benchmarks.nano.samples import Drawn, Prompts, find_nearest, recognised, sample_sheet
from benchmarks.nano.tables import tables, to_markdown
from benchmarks.nano_latents import optimised_psnr
from benchmarks.nano_trials import Batch, clean_errors
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.images.io import tensor_to_image
from cat_fast.errors import UserError
from cat_fast.generator import PackedText, make_schedule
from cat_fast.generator.diffusion import PREDICTIONS
from cat_fast.packing import PackedSequence
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.weights.shipped import SHIPPED


def test_the_low_pass_keeps_as_many_values_as_the_latents():
    image = np.random.default_rng(0).random((64, 64, 3))
    everything = low_pass(image, 1, 30)  # more values than pixels
    np.testing.assert_allclose(everything, image, atol=1e-9)
    flat = np.full((64, 64, 3), 0.3)
    np.testing.assert_allclose(low_pass(flat, 32, 16), flat, atol=1e-9)
    errors = [np.square(low_pass(image, ratio, 16) - image).mean() for ratio in (4, 8, 16, 32)]
    assert errors == sorted(errors)


def test_the_error_rate_is_the_edit_distance_per_character():
    assert character_error_rate("kitten", "sitting") == pytest.approx(3 / 7)
    assert character_error_rate("same", "same") == 0
    assert character_error_rate("", "lost") == 1
    assert character_error_rate("much longer than expected", "ab") == 1


def test_intervals_contain_the_mean_and_differences_are_paired():
    values = np.random.default_rng(0).normal(1, 1, 200)
    found = mean_with_interval(values)
    assert found["low"] < found["mean"] < found["high"]
    assert found["high"] - found["low"] == pytest.approx(4 * 0.98 / np.sqrt(200), rel=0.15)
    assert paired_difference(values + 0.01, values)["apart_from_zero"]
    assert not paired_difference(values, np.random.default_rng(1).permutation(values))["apart_from_zero"]


def test_the_prompts_are_forty_captions_and_twenty_that_are_none():
    prompts = Prompts.load()
    assert (len(prompts.trained), len(prompts.recombined), len({*prompts.all})) == (40, 20, 60)
    assert [*prompts.captions] == ["faces", "animals", "food", "objects", "symbols", "scenes"]
    captions = [*(f"other {i}, emoji" for i in range(500)), *prompts.trained]
    data = EmojiData([record(caption) for caption in captions])
    classes, images = data.evenly_spaced(240), data.evenly_spaced(520)
    assert images[:240] == classes
    assert len({*images}) == 520
    assert [data.captions[i] for i in classes[:40]] == prompts.trained


def record(caption: str, path: str = "", key: str = "emoji/1") -> ImageRecord:
    return ImageRecord(
        key=key, path=path, caption=caption, has_text=None, has_faces=None, score=None, ratio=None
    )


def test_generators_are_compared_prompt_by_prompt():
    ours = {"recognised": {"found": {str(i): i != 3 for i in range(40)}}}
    theirs = {"recognised": {"found": {str(i): i % 2 == 0 for i in range(40)}}}
    found = compare(ours, theirs)
    assert found["mean"] == pytest.approx(19 / 40)
    assert found["apart_from_zero"]


def squares(count: int, side: int = 48) -> torch.Tensor:
    """Return images of one coloured square each, at different places."""
    images = torch.ones(count, 3, side, side)
    for i in range(count):
        left = 4 + 8 * (i % 4)
        images[i, i % 3, 8:32, left : left + 14] = -1
    return images


def test_a_classifier_learns_and_is_judged_on_other_augmentations():
    images, names = squares(4), ["a", "b", "c", "d"]
    source = torch.Generator().manual_seed(0)
    assert augment(images, source).shape == images.shape
    trained = train_classifier(images, names, steps=40)
    assert trained.top1 > 0.6
    drawn = Drawn(prompts=names, images=images, ratios=[16] * 4, tokens=[16] * 4)
    found = recognised(drawn, trained, 4)
    assert found["recognised"] == 4  # four classes, so all are in the top five
    assert found["shuffled"] == 4


def test_a_copy_of_a_training_image_is_found(tmp_path):
    training = squares(4)
    blurred = (training + 0.05).clamp(-1, 1)
    other = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = find_nearest(
        torch.cat([blurred[2:3], other]), training, lambda images: (images + 0.05).clamp(-1, 1)
    )
    assert (found[0].index, found[0].is_copy, found[1].is_copy) == (2, True, False)
    path = tmp_path / "one.png"
    tensor_to_image(training[0]).save(path)
    drawn = Drawn(
        prompts=["a prompt of more than eighteen letters", "b"], images=training[:2], ratios=[8], tokens=[1]
    )
    sheet = sample_sheet(drawn, found, [record("", str(path))] * 4, {"b": True})
    assert sheet.width > 2 * 128
    assert json.dumps(found[0].distance)


def test_metrics_are_correlated_with_minus_the_maximum_acceptable_ratio(tmp_path):
    records, figures = [], []
    for i, (at_16, at_32) in enumerate(((39.5, 39), (29, 20), (20, 15), (39.5, 39))):
        path = tmp_path / f"{i}.png"
        tensor_to_image(squares(4)[i]).save(path)
        records.append(record("a" * i, str(path), str(i)))
        psnr = {"8": 40.0 if i in (0, 3) else 30.0, "16": at_16, "32": at_32}
        figures.append({"psnr": psnr, "st_lpips": {"16": float(i)}})
    scores = {"0": 1.0, "1": 5.0, "2": 9.0, "3": 1.0}
    chosen = {"0": 32, "1": 16, "2": 8, "3": 8}
    found = correlations(records, figures, scores, chosen, 48)
    assert found["mix of maximum acceptable ratios"] == {"8x": 1, "16x": 1, "32x": 2}
    assert found["chosen equals maximum acceptable"] == 0.75
    assert found["correlation"]["complexity score"] > 0.9


def test_chosen_ratios_cost_at_most_a_fixed_16x():
    scores = {str(i): 1 + i % 9 for i in range(100)}
    ratios = chosen_ratios(scores)
    found = describe_budget(ratios)
    assert 0.95 <= found["tokens of a fixed 16x"] <= 1
    assert ratios["8"] < ratios["0"]
    assert sum(found["mix"].values()) == 100


def test_tables_have_the_figures_of_a_report():
    figure = {"mean": 25.126, "low": 24.0, "high": 26.5, "images": 24}
    at = {"psnr": figure, "low_pass": figure, "st_lpips": figure}
    samples = {"prompts": 40, "recognised": 30, "top1": 20, "shuffled": 1.234, "mean_tokens": 16.0}
    found = tables(
        {"tokenizer": {"means": {"emoji": {"8x": at}}}, "samples": {"recognised": {"8x": samples}}}
    )
    assert [table["title"] for table in found] == ["Reconstruction", "Recognised samples"]
    assert found[0]["rows"] == [
        ["emoji", 24, "8x", "25.13 (24.00 to 26.50)", "25.13 (24.00 to 26.50)", "25.126 (24.000 to 26.500)"]
    ]
    assert "| 8x | 30 of 40 | 60 to 86 % | 20 | 1.2 | 16.0 |" in to_markdown(found[1])
    assert tables({}) == []
    (missing,) = tables({"twin": {"missing": "no such folder"}, "cut": {"lines": {"c = 4": "cut"}}})
    assert missing["rows"] == [
        ["chosen ratios against the fixed 16x tokenizer", "the twin is not trained yet"],
        ["c = 4", "cut"],
    ]


def test_recombined_prompts_count_if_a_part_is_found():
    tops = {"blue frog": ["blue book", "sky"], "tiger face with mask": ["face with mask", "sky"]}
    samples = {
        "classifier": {"classes": 240, "top1 on held-out augmentations": 0.95},
        "top 5 of the recombined prompts": tops,
        "copies": 0,
        "distance to the nearest training image": {"mean": 0.15, "low": 0.1, "high": 0.2},
    }
    (found,) = tables({"samples": samples})
    assert ["recombined prompts with one of their parts in the top 5", "1 of 2"] in found["rows"]


def test_figures_of_a_report_replace_those_of_the_cards(tmp_path):
    cards = [tmp_path / name for name in ("nano/transformer", "nano/vae", "nano-fixed-16x/vae")]
    for folder in cards:
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("# Model\n\n## Figures\n\nold\n\n## Limits\n\nSmall.\n")
    recognised = {"recognised": 3, "prompts": 4, "top1": 2, "shuffled": 0.5, "mean_tokens": 16.0}
    update_figures({"samples": {"recognised": {"8x": recognised}}}, tmp_path)
    ours, _, twin = [(folder / "README.md").read_text() for folder in cards]
    assert ours.startswith("# Model\n\n## Figures\n\n### Recognised samples")
    assert "| 3 of 4 |" in ours
    assert "old" not in ours
    assert ours.endswith("|\n\n## Limits\n\nSmall.\n")
    assert "Not measured yet" in twin
    (cards[0] / "README.md").write_text("# Model\n")
    with pytest.raises(UserError, match="expected one section Figures before Limits, found 0; export again"):
        update_figures({}, tmp_path)


def test_the_shipped_cards_have_the_figures_of_the_demo():
    tables = json.loads((SHIPPED / "nano" / "tables.json").read_text(encoding="utf-8"))
    for part in ("transformer", "vae"):
        assert figures_section(tables) in (SHIPPED / "nano" / part / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_trials_find_no_error_in_an_exact_prediction(prediction):
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(4, size, size, generator=generator) for size in (4, 2)]
    packed = PackedSequence.from_latents(latents, [8, 16], 2)
    batch = Batch(packed, PackedText.of([torch.zeros(1, 3)] * 2), torch.randn(packed.tokens.shape), 1.0)
    schedule = make_schedule(prediction)

    class Exact(torch.nn.Module):
        off = 0.0

        def forward(self, noisy, timesteps, labels, text, return_dict):
            index = noisy.sequence_index()
            if prediction == "flow":
                target = batch.noise - packed.tokens
            elif prediction == "epsilon":
                target = batch.noise
            else:
                target = schedule.get_velocity(packed.tokens, batch.noise, timesteps[index])
            return (target + self.off,)

    model = Exact()
    for level in (0.9, 0.25):
        assert clean_errors(model, schedule, batch, level) == pytest.approx([0, 0], abs=1e-4)
    model.off = 1.0  # an error of the clean latent of at least the noise
    assert min(clean_errors(model, schedule, batch, 0.75)) > 0.4


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_trials_compare_latents_of_any_scale_at_equal_noise_to_signal_ratios(prediction):
    packed = PackedSequence.from_latents([torch.randn(4, 4, 4)], [8], 2)
    seen = {}

    class Recorder(torch.nn.Module):
        def forward(self, noisy, timesteps, labels, text, return_dict):
            seen[scale] = noisy.tokens / noisy.tokens.std()
            return (torch.zeros_like(noisy.tokens),)

    for scale in (1.0, 0.5):
        scaled = packed.replace(tokens=packed.tokens * scale)
        text, noise = PackedText.of([torch.zeros(1, 3)]), torch.ones(packed.tokens.shape)
        clean_errors(Recorder(), make_schedule(prediction), Batch(scaled, text, noise, scale), 0.5)
    torch.testing.assert_close(seen[1.0], seen[0.5], atol=0.01, rtol=0)


def test_optimised_latents_reconstruct_better_and_leave_the_model_as_it_is():
    torch.manual_seed(0)
    model = NestedAutoencoderKL.from_pretrained("nano").eval().float().requires_grad_(False)
    before = model.fingerprint()
    image = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    found = optimised_psnr(model, image, 8)
    assert found[0] < found[1] < found[2]
    assert model.fingerprint() == before
