"""Configuration dataclasses validate themselves; errors name the invalid key."""

import json

import pytest

from cat_fast.config import fill
from cat_fast.errors import UserError
from cat_fast.training.config.deepspeed_json import read_deepspeed_config
from cat_fast.training.config.runs import RUNS

BASE = {"output_dir": "somewhere"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=0", "optimizer.lr: 0.0 must be positive"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected two numbers"),
        ("optimizer.max_grad_norm=0", "optimizer.max_grad_norm"),
        ("optimizer.betas=[0.9,1]", r"optimizer.betas: \[0.9, 1.0\] are not within \[0, 1\)"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay: -0.1 is negative"),
        ("optimizer.eps=-1", "optimizer.eps: -1.0 is negative"),
        ("optimizer.lr=.inf", "optimizer.lr: inf is not a finite number"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay: nan is not a finite number"),
        ("optimizer.eps=.inf", "optimizer.eps: inf is not a finite number"),
        ("watchdog.timeout_seconds=.inf", "watchdog.timeout_seconds: inf is not finite; 0 disables"),
        ("seed=-1", "seed: -1 is negative"),
        ("schedule.total_steps=0", "schedule.total_steps: 0 must be positive"),
        ("schedule.warmup_steps=-1", "schedule.warmup_steps: -1 is negative"),
        ("schedule.kind=linear", "schedule.kind: 'linear' is not constant or cosine"),
        ("schedule.min_ratio=1.5", "schedule.min_ratio"),
        ("checkpoint.every_steps=0", "checkpoint.every_steps"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last"),
        ("checkpoint.resume=maybe", "checkpoint.resume: 'maybe' is not auto or never"),
        ("logging.every_steps=0", "logging.every_steps: 0 must be positive"),
        ("logging.scalars_every_steps=0", "logging.scalars_every_steps"),
        ("logging.every_seconds=0", "logging.every_seconds"),
        ("logging.grid_every_steps=-1", "logging.grid_every_steps: -1 is negative"),
        ("ema_decay=1", "ema_decay: 1.0 is not within"),
        ("output_dir=''", "output_dir is missing"),
        ("precision=fp16", "precision: 'fp16' is not fp32 or bf16"),
        ("accumulation_steps=0", "accumulation_steps: 0 must be positive"),
        ("deepspeed=nowhere.json", "deepspeed: nowhere.json is neither a file"),
    ],
)
@pytest.mark.parametrize("task", sorted(RUNS))
def test_invalid_shared_settings_are_rejected(task, override, message):
    with pytest.raises(UserError, match=message):
        fill(RUNS[task], {"task": task, **BASE}, [override])


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("tokenizer", "data.image_size=0", "data.image_size: 0 must be positive"),
        ("tokenizer", "data.image=jpg", "data.image=jpg: applies to data.shards and data.dataset only"),
        ("tokenizer", "data.image_size=[48,0]", r"data.image_size: \[48, 0\] must be positive"),
        ("tokenizer", "data.image_size=[48]", r"data.image_size: expected .* or \[height, width\]"),
        ("tokenizer", "data.image_size=48x96", r"\[height, width\] such as \[48, 96\], got '48x96'"),
        ("tokenizer", "data.image_size=true", r"data.image_size: expected a side in pixels"),
        ("tokenizer", "data.image_size=[48.0,96]", r"data.image_size: expected a side in pixels"),
        ("tokenizer", "data.batch_size=-1", "data.batch_size"),
        ("tokenizer", "data.min_crop=0", "data.min_crop"),
        ("tokenizer", "data.min_crop=1.1", "data.min_crop"),
        ("tokenizer", "sampler.pool=mine", "sampler.pool"),
        ("tokenizer", "sampler.shares={8: -1}", "sampler.shares"),
        ("tokenizer", "sampler.shares={8: .nan, 16: 1}", "sampler.shares: .*nan.* must be .* finite"),
        ("tokenizer", "sampler.shares={8: .inf, 16: 1}", "sampler.shares"),
        ("tokenizer", "data.stream.first_wait=.nan", "data.stream.first_wait: nan is .* not finite"),
        ("tokenizer", "loss.perceptual=magic", "loss.perceptual"),
        ("tokenizer", "loss.gan_weight=-1", "loss.gan_weight"),
        ("tokenizer", "discriminator.optimizer.lr=0", "optimizer.lr"),
        (
            "tokenizer",
            "deepspeed=deepspeed/zero3.json",
            r"partitions weights that this task uses without .* is for the generator",
        ),
        ("tokenizer", "discriminator.resolution=100", "discriminator.resolution: 100 is not a power of two"),
        ("tokenizer", "discriminator.channel_base=128", "discriminator.channel_base: 128 must be at least"),
        ("tokenizer", "discriminator.channel_max=0", "discriminator.channel_max: 0 must be positive"),
        ("generator", "data.max_tokens=0", "data.max_tokens"),
        ("probe", "logging.grid_every_steps=10", "logging.grid_every_steps: a probe draws no images"),
        ("probe", "initial_weights=model", "initial_weights: .* set finetune"),
        ("generator", "logging.grid_every_steps=10", "has no tokenizer to draw grids with"),
        ("generator", "loss.weighting=pixel", r"loss\.weighting: 'pixel' is not token, image"),
    ],
)
def test_invalid_task_settings_are_rejected(task, override, message):
    with pytest.raises(UserError, match=message):
        fill(RUNS[task], {"task": task, **BASE}, [override])


@pytest.mark.parametrize(("given", "size"), [("64", (64, 64)), ("[48,96]", (48, 96)), ("[96,48]", (96, 48))])
def test_crops_are_squares_or_have_a_height_and_a_width(given, size):
    config = fill(RUNS["tokenizer"], {"task": "tokenizer", **BASE}, [f"data.image_size={given}"])
    assert config.data.crop_size == size


def test_generator_accepts_zero_3():
    config = fill(RUNS["generator"], {"task": "generator", **BASE}, ["deepspeed=deepspeed/zero3.json"])
    assert config.deepspeed == "deepspeed/zero3.json"


@pytest.mark.parametrize("task", sorted(RUNS))
def test_gradient_checkpointing_is_refused_where_it_would_have_no_effect(task):
    def load() -> bool:
        return fill(
            RUNS[task], {"task": task, **BASE}, ["gradient_checkpointing=true"]
        ).gradient_checkpointing

    if task in ("tokenizer", "generator"):
        assert load()
    else:
        with pytest.raises(UserError, match=r"gradient_checkpointing: not supported .*; set it to false"):
            load()


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("gradient_clipping", 0.5, "optimizer.max_grad_norm"),
        ("train_batch_size", "auto", "data"),
        ("train_micro_batch_size_per_gpu", 8, "data"),
        ("gradient_accumulation_steps", 2, "accumulation_steps"),
        ("optimizer", {"type": "AdamW"}, "optimizer"),
        ("scheduler", {"type": "WarmupLR"}, "schedule"),
    ],
)
def test_deepspeed_settings_that_the_run_determines_are_refused(tmp_path, key, value, instead):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: value}))
    with pytest.raises(UserError, match=f"^deepspeed: .*own.json sets {key}; .* {instead}"):
        read_deepspeed_config(str(path))


def test_a_deepspeed_file_without_an_object_is_refused(tmp_path):
    path = tmp_path / "own.json"
    path.write_text("[]")
    with pytest.raises(UserError, match=r"^deepspeed: .*own.json: expected a JSON object"):
        read_deepspeed_config(str(path))
