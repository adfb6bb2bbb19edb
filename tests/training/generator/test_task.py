"""The generator task: token budgets, losses, captions and validation."""

import json
import math
import os
import re
import shutil
from functools import partialmethod

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from transformers import BertConfig, BertModel, BertTokenizerFast

from cat_fast.config import fill, read_yaml
from cat_fast.data.latents.dataset import LatentDataset, LatentShardWriter
from cat_fast.data.latents.scale import LatentScale
from cat_fast.data.ratio_origin import RatioOrigin, ScoredBy
from cat_fast.errors import UserError
from cat_fast.generator import DiT, PackedText
from cat_fast.generator.diffusion import load_schedule
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.training.config.settings import GeneratorRun
from cat_fast.training.generator.task import GeneratorTask, _batches_per_step, _spending_notice
from cat_fast.training.runtime import ranks
from cat_fast.training.runtime.ranks import Ranks
from tests.cli.conftest import tiny_tokenizer
from tests.training.runs import GENERATOR, ROOT
from tests.training.steps import train_step

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "plane", "in", "the", "sky", "page", "of", "text"]


def config(*overrides: str) -> GeneratorRun:
    path, *tiny = GENERATOR
    return fill(GeneratorRun, read_yaml(ROOT / path), [*tiny, *overrides])


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """Process group of this process only; its environment variables are removed afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
            patch.delenv(name, raising=False)
        before = dict(os.environ)
        ranks.start()
        yield
        ranks.stop()
        for name in set(os.environ) - set(before):
            del os.environ[name]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    with LatentShardWriter(folder, "0" * 16, resolution=128, class_names=["sky", "text"]) as writer:
        for number in range(12):
            ratio, label = (8, 16, 32)[number % 3], number % 2
            latent = torch.randn(4, 128 // ratio, 128 // ratio, generator=generator)
            caption = ["a plane in the sky", "a page of text"][label]
            writer.add(f"image{number}", latent, label=label, ratio=ratio, caption=caption)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny untrained text encoder."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("world_size", "overrides", "batches"),
    [
        (16, [], 1),
        (16, ["data.global_tokens=262144"], 1),
        (8, ["data.global_tokens=262144"], 2),
        (1, ["data.global_tokens=262144"], 16),
        (8, ["accumulation_steps=3"], 3),
    ],
)
def test_global_budget_determines_batches_per_step(world_size, overrides, batches):
    run = config("data.max_tokens=16384", *overrides)
    assert _batches_per_step(run, Ranks(world_size=world_size)) == batches


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.global_tokens=300"], r"global_tokens: expected a multiple of 256, .* got 300"),
        (["data.global_tokens=128"], "expected a multiple"),
        (["data.global_tokens=512", "accumulation_steps=2"], "remove one"),
        (["loss.prediction=x0"], r"loss\.prediction: 'x0' is not epsilon, v_prediction, flow"),
        (["loss.weighting=pixel"], r"loss\.weighting: 'pixel' is not token, image"),
        (["loss.beta_schedule=cosine"], r"loss\.beta_schedule: 'cosine' is not squaredcos_cap_v2, linear"),
        (["loss.beta_schedule=linear", "loss.prediction=flow"], "which has no betas; set it to squaredcos"),
        (["loss.prediction=flow", "loss.min_snr_gamma=5"], "not supported with prediction: flow"),
    ],
)
def test_invalid_budgets_and_losses_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        _batches_per_step(config(*overrides), Ranks(world_size=2))


@pytest.mark.parametrize(
    ("prediction", "betas"),
    [
        ("epsilon", "squaredcos_cap_v2"),
        ("epsilon", "linear"),
        ("v_prediction", "linear"),
        ("flow", "squaredcos_cap_v2"),
    ],
)
def test_run_trains_the_configured_noise_schedule_and_exports_it_with_the_model(
    tmp_path, latents, prediction, betas
):
    loss = [f"loss.prediction={prediction}", f"loss.beta_schedule={betas}"]
    run = config(f"data.latents={latents}", *loss, f"output_dir={tmp_path}")
    task = GeneratorTask(run, Ranks())
    for step in range(3):
        metrics = train_step(task, step)
        ratios = [name for name in metrics if name.startswith("loss_")]
        assert ratios
        assert all(math.isfinite(metrics[name]) for name in ratios)
        assert metrics["fill"] == metrics["tokens"] / 128 <= 1
        assert metrics["data_seconds"] >= 0
    task.export(tmp_path / "model")
    schedule = load_schedule(tmp_path / "model" / "scheduler")
    assert schedule.config.get("prediction_type", "flow") == prediction
    expected = None if prediction == "flow" else betas
    assert schedule.config.get("beta_schedule") == task.schedule.config.get("beta_schedule") == expected
    assert DiT.from_pretrained(tmp_path / "model").config.beta_schedule == expected


def test_loss_is_the_token_weighted_mean_over_ratios(tmp_path, latents):
    task = GeneratorTask(config(f"data.latents={latents}", "accumulation_steps=2"), Ranks())
    metrics = train_step(task, 0)
    counts = dict.fromkeys((8, 16, 32), 0)
    task = GeneratorTask(config(f"data.latents={latents}", "accumulation_steps=2"), Ranks())
    for batch in task._next_batches()[0]:
        assert batch.lengths == batch.packed.cu_seqlens.diff().tolist()
        for ratio, length in zip(batch.packed.ratio.tolist(), batch.lengths, strict=True):
            counts[ratio] += length
    mean = sum(count * metrics[f"loss_{f}x"] for f, count in counts.items() if count) / sum(counts.values())
    assert metrics["loss"] == pytest.approx(mean, rel=1e-6)
    assert metrics["tokens"] == sum(counts.values())


def test_captions_reach_the_model_through_the_text_encoder(tmp_path, latents, bert):
    run = config(f"data.latents={latents}", f"text_encoder={bert}", "model.class_dropout_prob=0")
    task = GeneratorTask(run, Ranks())
    task._next_batches()
    ((batch, text, *_),), _ = task._next_batches()
    captions = [["a plane in the sky", "a page of text"][label] for label in batch.label.tolist()]
    expected = PackedText.of([task.text_encoder([caption]).tokens for caption in captions])
    assert torch.equal(text.tokens, expected.tokens)
    assert torch.equal(text.cu_seqlens, expected.cu_seqlens)
    before = {name: p.detach().clone() for name, p in task.engine.module.named_parameters()}
    for step in range(3):  # gates start at zero: the first step opens them, later steps train their branches
        train_step(task, step)
    moved = {name for name, p in task.engine.module.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("text_embedder.") for name in moved)
    assert not any(p.requires_grad for p in task.text_encoder.model.parameters())
    task.export(tmp_path / "model")
    exported = json.loads((tmp_path / "model/config.json").read_text())
    assert exported["text_dim"] == 12
    assert exported["text_encoder_fingerprint"] == TextEncoder(bert).fingerprint()


def test_captions_are_encoded_once_if_all_fit_and_else_in_one_batch_per_step(latents, bert):
    encoded = {}
    for megabytes in (1, 0):
        run = [f"data.latents={latents}", f"text_encoder={bert}", f"text_cache_megabytes={megabytes}"]
        task = GeneratorTask(config(*run), Ranks())
        batches = encoded.setdefault(megabytes, [])
        task.text_encoder.model.register_forward_pre_hook(
            lambda _model, _args, kwargs, batches=batches: batches.append(len(kwargs["input_ids"])),
            with_kwargs=True,
        )
        sizes = [len(batch.packed) for _ in range(3) for batch in task._next_batches()[0]]
    assert encoded == {1: [1, 1], 0: sizes}  # there are two captions


def test_text_encoder_without_captions_is_refused(tmp_path, bert):
    with LatentShardWriter(tmp_path, "0" * 16, resolution=128, class_names=["sky"]) as writer:
        writer.add("one", torch.randn(4, 16, 16), label=0, ratio=8)
    with pytest.raises(UserError, match="have no captions; remove the key"):
        GeneratorTask(config(f"data.latents={tmp_path}", f"text_encoder={bert}"), Ranks())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.ratios=[16]"], r"has latents at 8x, but model\.ratios is \[16\]"),
        (["model.num_classes=1"], r"model\.num_classes is 1, but the latents have class 1: remove the key"),
        (["model.scaling_factor=1"], r"model\.scaling_factor: the latents, .*data\.normalized=none"),
        (["data.max_tokens=63"], r"63 is less than the longest sequence, 64 tokens"),
        (["model.patch_size=8"], r"patch_size: 8 does not divide latents of 4 × 4 at 32x: .* divisor of 4"),
        (["data.window=4"], r"4 latents, with 28 tokens on average, do not fill .* use at least 6"),
        (["compile=true", "deepspeed=deepspeed/zero3.json"], "compile: not supported with ZeRO 3"),
    ],
)
def test_mismatched_data_and_model_are_refused_before_the_first_step(latents, overrides, message):
    with pytest.raises(UserError, match=message):
        GeneratorTask(config(f"data.latents={latents}", *overrides), Ranks())


def test_normalization_of_latents_can_be_disabled(tmp_path, latents):
    task = GeneratorTask(config(f"data.latents={latents}", "data.normalized=false"), Ranks())
    ((batch, *_),), _ = task._next_batches()
    values = torch.cat([latent.flatten() for latent in batch.to_latents()])
    stored = LatentDataset(latents, normalized=False)
    by_key = {entry.key: stored[i].latent for i, entry in enumerate(stored.entries)}
    assert torch.equal(values, torch.cat([by_key[key].flatten() for key in batch.key]))
    task.export(tmp_path)
    model = DiT.from_pretrained(tmp_path).config
    assert (model.shift_factor, model.scaling_factor) == ([0.0] * 4, [1.0] * 4)


@pytest.mark.parametrize("normalized", ["none", "per_channel", "per_ratio"])
def test_the_scale_of_training_is_exported_and_undone(tmp_path, normalized):
    """The latents deviate by 5 and 10. Samples are clipped at 16 in the model's scale, whatever it is."""
    own = LatentScale([0.5] * 4, [0.2] * 4)
    generator, written = torch.Generator().manual_seed(0), {}
    with LatentShardWriter(
        tmp_path / "latents", "0" * 16, resolution=128, class_names=["a"], scale=own
    ) as writer:
        for number in range(12):
            ratio = (8, 16, 32)[number % 3]
            latent = (5 + 5 * (ratio == 32)) * torch.randn(4, 128 // ratio, 128 // ratio, generator=generator)
            writer.add(f"image{number}", latent, label=0, ratio=ratio)
            written[f"image{number}"] = latent
    task = GeneratorTask(
        config(f"data.latents={tmp_path / 'latents'}", f"data.normalized={normalized}"), Ranks()
    )
    ((batch, *_),), _ = task._next_batches()
    task.export(tmp_path / "model")
    model = DiT.from_pretrained(tmp_path / "model").config
    scale = LatentScale(model.shift_factor, model.scaling_factor)
    for key, ratio, latent in zip(batch.key, batch.ratio.tolist(), batch.to_latents(), strict=True):
        torch.testing.assert_close(scale.undo(latent, ratio), written[key], rtol=1e-4, atol=1e-4)
    if normalized == "none":
        assert (model.shift_factor, model.scaling_factor) == ([0.5] * 4, [0.2] * 4)
    if normalized == "per_ratio":
        assert model.scaling_factor["8"] == pytest.approx([0.2] * 4, rel=0.1)
        assert model.scaling_factor["32"] == pytest.approx([0.1] * 4, rel=0.3)
    schedule = load_schedule(tmp_path / "model" / "scheduler")
    assert (schedule.config.clip_sample, schedule.config.clip_sample_range) == (True, 16)
    assert all(latent.abs().max() < 16 for latent in batch.to_latents())


def test_a_tokenizer_that_is_named_gives_its_scale_to_latents_that_do_not_record_one(tmp_path):
    tokenizer = tiny_tokenizer(scaling_factor=0.18215)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    fingerprint = tokenizer.fingerprint()
    with LatentShardWriter(tmp_path / "latents", fingerprint, resolution=128, class_names=["a"]) as writer:
        for number in range(12):
            writer.add(f"{number}", torch.randn(4, 16, 16), label=0, ratio=8)
    header = tmp_path / "latents/latents.json"
    header.write_text(json.dumps({k: v for k, v in json.loads(header.read_text()).items() if k != "scale"}))
    run = [f"data.latents={header.parent}", "data.normalized=none"]
    with pytest.raises(UserError, match=r"does not record the scaling factor .* set data\.tokenizer"):
        GeneratorTask(config(*run), Ranks())
    task = GeneratorTask(config(*run, f"data.tokenizer={tmp_path / 'tokenizer'}"), Ranks())
    assert task.arguments["scaling_factor"] == [0.18215] * 4


def test_latents_beyond_the_clipping_range_of_samples_are_reported(tmp_path, caplog):
    with LatentShardWriter(tmp_path, "0" * 16, resolution=128, class_names=["a"]) as writer:
        for number in range(12):
            writer.add(f"{number}", 5.5 * torch.randn(4, 16, 16), label=0, ratio=8)
    GeneratorTask(config(f"data.latents={tmp_path}"), Ranks())
    assert "clipped" not in caplog.text
    GeneratorTask(config(f"data.latents={tmp_path}", "data.normalized=none"), Ranks())
    assert re.search(
        r"latents at 8x reach about ±2\d .* but samples are clipped at ±16: use per_channel", caplog.text
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.normalized=channels"], r"data\.normalized: expected one of none, per_channel, per_ratio"),
        (
            ["data.normalized=per_ratio"],
            r"none at 16x: set model\.ratios=\[8\], or data\.normalized=per_channel",
        ),
        (
            ["data.normalized=per_ratio", "model.ratios=[16]"],
            r"has latents at 8x, but model\.ratios is \[16\]",
        ),
    ],
)
def test_normalizations_that_the_latents_do_not_allow_are_refused(tmp_path, overrides, message):
    with LatentShardWriter(tmp_path, "0" * 16, resolution=128, class_names=["a"]) as writer:
        writer.add("one", torch.randn(4, 16, 16), label=0, ratio=8)
    with pytest.raises(UserError, match=message):
        GeneratorTask(config(f"data.latents={tmp_path}", *overrides), Ranks())


@pytest.mark.parametrize(("given", "read"), [("true", "per_channel"), ("false", "none"), ("none", "none")])
def test_booleans_of_former_configurations_are_read_as_normalizations(given, read):
    assert config(f"data.normalized={given}").data.normalized == read


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, latents):
    task, folder = GeneratorTask(config(f"data.latents={latents}"), Ranks()), tmp_path_factory.mktemp("saved")
    train_step(task, 0)
    task.save(folder)
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed: expected 0, as at the start of the run, got 1"),
        ("loss.prediction=flow", r"loss\.prediction: expected 'epsilon', .* got 'flow'"),
        ("loss.beta_schedule=linear", r"beta_schedule: expected 'squaredcos_cap_v2', .* got 'linear'"),
        ("data.normalized=per_ratio", r"data\.normalized: expected 'per_channel', .* got 'per_ratio'"),
        ("data.normalized=false", r"data\.normalized: expected 'per_channel', .* got 'none'"),
        # weights of the same shapes, with another function
        ("model.num_heads=4", r"model\.num_heads: expected 2, as at the start of the run, got 4"),
        ("model.position_frame=16", r"model\.position_frame: expected 32, .* got 16"),
        ("model.ratios=[32,16,8]", r"model\.ratios: expected \[8, 16, 32\], .* got \[32, 16, 8\]"),
        ("model.rope=true", r"model\.rope: expected False, .* got True"),
        # weights of other shapes
        ("model.hidden_size=32", r"model\.hidden_size: expected 16, .* got 32"),
        ("model.class_dropout_prob=0", r"model\.class_dropout_prob > 0: expected True, .* got False"),
    ],
)
def test_changed_settings_are_refused_on_resume(latents, checkpoint, override, message):
    task = GeneratorTask(config(f"data.latents={latents}", override), Ranks())
    with pytest.raises(UserError, match=message):
        task.load(checkpoint)


def test_a_model_of_other_sizes_is_refused_by_its_weights_if_a_checkpoint_does_not_record_them(
    tmp_path, latents, checkpoint
):
    older = shutil.copytree(checkpoint, tmp_path / "older")
    state = json.loads((older / "task.json").read_text())
    del state["began_with"]
    (older / "task.json").write_text(json.dumps(state))
    task = GeneratorTask(config(f"data.latents={latents}", "model.hidden_size=32"), Ranks())
    with pytest.raises(UserError, match=r"model has other sizes, .*restore the sizes under model") as error:
        task.load(older)
    assert "\n" not in str(error.value)


def test_defaults_that_are_set_and_another_class_dropout_resume(latents, checkpoint):
    options = ["model.position_frame=32", "model.ratios=[8,16,32]", "model.class_dropout_prob=0.2"]
    task = GeneratorTask(config(f"data.latents={latents}", *options), Ranks())
    task.load(checkpoint)


def test_another_budget_and_window_resume_with_a_new_packing(latents, checkpoint, capsys):
    task = GeneratorTask(config(f"data.latents={latents}", "data.max_tokens=96", "data.window=20"), Ranks())
    task.load(checkpoint)
    assert "new packing (data.max_tokens 128 -> 96, data.window 16 -> 20)" in capsys.readouterr().out
    assert train_step(task, 1)["tokens"] <= 96


def test_checkpoint_without_initial_settings_can_be_resumed(tmp_path, latents, checkpoint):
    folder = tmp_path / "older"
    shutil.copytree(checkpoint, folder)
    state = json.loads((folder / "task.json").read_text())
    del state["began_with"]
    (folder / "task.json").write_text(json.dumps(state))
    task, older = (GeneratorTask(config(f"data.latents={latents}"), Ranks()) for _ in range(2))
    task.load(checkpoint)
    older.load(folder)
    assert train_step(older, 1)["loss"] == train_step(task, 1)["loss"]
    linear = GeneratorTask(config(f"data.latents={latents}", "loss.beta_schedule=linear"), Ranks())
    with pytest.raises(UserError, match="beta_schedule: expected 'squaredcos_cap_v2'"):  # all had those
        linear.load(folder)


def test_a_run_starts_from_the_weights_of_another_one(tmp_path, latents, checkpoint):
    first = GeneratorTask(config(f"data.latents={latents}"), Ranks())
    train_step(first, 0)
    first.export(tmp_path / "model")
    start = f"initial_weights={tmp_path / 'model'}"
    second = GeneratorTask(config(f"data.latents={latents}", start, "model.class_dropout_prob=0.3"), Ranks())
    for name, value in DiT.from_pretrained(tmp_path / "model").named_parameters():
        assert torch.equal(dict(second.engine.module.named_parameters())[name], value), name
    with pytest.raises(UserError, match="initial_weights: expected None, as at the start of the run, got '"):
        second.load(checkpoint)  # of a run without initial weights
    with pytest.raises(UserError, match=r"to predict epsilon with squared.* betas, this run predicts v_pred"):
        GeneratorTask(config(f"data.latents={latents}", start, "loss.prediction=v_prediction"), Ranks())


def test_other_latents_have_another_digest(tmp_path):
    def written(name: str, fingerprint: str = "0", key: str = "one", side: int = 16, **changes) -> str:
        with LatentShardWriter(
            tmp_path / name, fingerprint * 16, resolution=128, class_names=["a", "b"]
        ) as writer:
            writer.add(key, torch.ones(4, side, side), **{"label": 0, "ratio": 8} | changes)
        return LatentDataset(tmp_path / name).digest

    digests = {
        written("first"),
        written("relabelled", label=1),
        written("renamed", key="two"),
        written("smaller", side=8),
        written("of another ratio", ratio=16),
        written("of another tokenizer", fingerprint="1"),
    }
    assert len(digests) == 6
    assert written("again") in digests


@pytest.mark.parametrize(
    ("changes", "device", "compiles"),
    [
        ([], "cuda", True),
        ([], "cpu", False),
        (["compile=true"], "cpu", True),
        (["compile=false"], "cuda", False),
        (["deepspeed=deepspeed/zero3.json"], "cuda", False),
    ],
)
def test_blocks_are_compiled_on_gpus_by_default(changes, device, compiles):
    assert config(*changes).compiles(device) == compiles


@pytest.mark.slow
def test_compiled_run_recompiles_at_most_once_when_lengths_change(latents, monkeypatch):
    """Full training steps with an engine, the loss and batches of changing lengths."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=counter))
    torch._dynamo.reset()
    run = [f"data.latents={latents}", "data.max_tokens=200", "model.hidden_size=64"]
    compiled, eager = (GeneratorTask(config(*run, f"compile={on}"), Ranks()) for on in ("true", "false"))
    counts = []
    for step in range(8):
        loss = train_step(compiled, step)["loss"]
        counts.append(counter.frame_count)
        assert loss == pytest.approx(train_step(eager, step)["loss"], rel=1e-5)
    assert counts[0] > 0
    assert counts[-1] - counts[0] <= 1


@pytest.mark.slow
def test_rehearsal_of_a_compiled_run_compiles_nothing(latents, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=counter))
    torch._dynamo.reset()
    task = GeneratorTask(config(f"data.latents={latents}", "compile=true"), Ranks())
    before = [parameter.clone() for parameter in task.engine.module.parameters()]
    task.largest_step().run()
    assert counter.frame_count == 0
    after = list(task.engine.module.parameters())
    assert all(map(torch.equal, before, after))
    assert all(parameter.grad is None for parameter in after)
    train_step(task, 0)
    assert counter.frame_count > 0


@pytest.mark.parametrize("versions", [("1", "1"), ("1", "2")])
def test_mixed_scorers_of_latents_are_noticed_with_the_mean_tokens(tmp_path, versions):
    generator = torch.Generator().manual_seed(0)
    with LatentShardWriter(tmp_path, "0" * 16, resolution=128, class_names=["sky"]) as writer:
        for ratio, version in zip((8, 16), versions, strict=True):
            origin = RatioOrigin(source="ratio", scored_by=ScoredBy("words", version, (2, 6)))
            latent = torch.randn(4, 128 // ratio, 128 // ratio, generator=generator)
            writer.add(f"{ratio}", latent, label=0, ratio=ratio, origin=origin)
    notice = _spending_notice(LatentDataset(tmp_path))
    if versions[0] == versions[1]:
        assert notice is None
    else:
        assert "scores of 2 scorers are mixed (words 1 50%, words 2 50%)" in notice
        assert "mean 40.0 tokens per image at 128 px, against 16 at a fixed 16x (+150.0%)" in notice
