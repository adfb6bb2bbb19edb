"""`cat-fast pipeline`: combine trained models into a folder that `cat-fast sample` draws with."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cat_fast.complexity import Description, RatioThresholds, default_thresholds
from cat_fast.data.latents.dataset import LatentShardWriter
from cat_fast.generator import DiT, make_schedule
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.inference import CATPipeline
from tests.cli.conftest import assert_one_line_error, tiny_tokenizer
from tests.inference.tiny_encoder import WIDTH, save_encoder

NAMES = ["sky", "page, newspaper", "village street"]


def export(folder, **changes):
    """Export of a generator's run, with random weights."""
    torch.manual_seed(1)
    generator = DiT(
        in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=3, position_frame=4,
        **{"tokenizer_fingerprint": tiny_tokenizer().fingerprint()} | changes,
    )  # fmt: skip
    generator.save_pretrained(folder)
    make_schedule("flow").save_pretrained(folder / "scheduler")
    return folder


def write_latents(folder, fingerprint, **more):
    LatentShardWriter(folder, fingerprint, resolution=64, class_names=NAMES)
    header = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(json.dumps(header | more))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with tokenizer/model, generator/model and latents."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer/model")
    export(folder / "generator/model")
    write_latents(folder / "latents", tokenizer.fingerprint(), thresholds=[4, 7])
    (folder / "names.txt").write_text("\n".join(["heaven", *NAMES[1:]]) + "\n")
    return folder


@pytest.fixture
def assemble(cat_fast, trained, tmp_path):
    """Run the command on the trained models, into tmp_path/pipeline, with options changed or added."""

    def run(*more, **changed):
        given = {"tokenizer": trained / "tokenizer/model", "generator": trained / "generator/model"}
        given |= {"out": tmp_path / "pipeline", "latents": trained / "latents"}
        options = [(f"--{name}", value) for name, value in (given | changed).items() if value is not None]
        return cat_fast("pipeline", *(word for option in options for word in option), *more)

    return run


def test_trained_models_become_a_pipeline_that_draws(cat_fast, assemble, trained, tmp_path):
    result = assemble("--text-classes", "page, newspaper", "--face-classes", "2,0")
    assert result.exit_code == 0, result.output
    assert "3 classes at 64 px, thresholds 4,7" in result.stdout
    assert f"cat-fast sample --pipeline {tmp_path / 'pipeline'}" in result.stdout
    made = CATPipeline.from_pretrained(tmp_path / "pipeline")
    assert (made.labels, made.resolution, made.thresholds) == (NAMES, 64, RatioThresholds(4, 7))
    assert made.descriptions == [
        Description("this is an image of sky", has_text=False, has_faces=True),
        Description("this is an image of page, newspaper", has_text=True, has_faces=False),
        Description("this is an image of village street", has_text=False, has_faces=True),
    ]
    for name, tensor in DiT.from_pretrained(trained / "generator/model").state_dict().items():
        assert torch.equal(made.transformer.state_dict()[name], tensor)
    out = tmp_path / "images"
    result = cat_fast(
        "sample", "-p", tmp_path / "pipeline", "-o", out, "--scheduler", "euler", "--steps", 2, "--npz"
    )
    assert result.exit_code == 0, result.output
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    expected = made(NAMES, scheduler="euler", num_inference_steps=2, generator=generators).images
    for number, image in enumerate(expected):
        assert np.array_equal(Image.open(out / f"images/{number:06d}.png"), image)


def test_without_latents_names_and_resolution_are_given(assemble, trained, tmp_path):
    options = {"latents": None, "labels": trained / "names.txt", "resolution": 128}
    assert assemble(**options).exit_code == 0
    made = CATPipeline.from_pretrained(tmp_path / "pipeline")
    assert (made.labels[0], made.resolution, made.thresholds) == ("heaven", 128, default_thresholds())


def test_options_override_the_latents(assemble, trained, tmp_path):
    assert assemble(labels=trained / "names.txt", resolution=128, thresholds="2,8").exit_code == 0
    made = CATPipeline.from_pretrained(tmp_path / "pipeline")
    assert (made.labels[0], made.resolution, made.thresholds) == ("heaven", 128, RatioThresholds(2, 8))


def test_a_generator_with_text_accepts_its_own_encoder_only(assemble, tmp_path):
    own, other = save_encoder(tmp_path / "own"), save_encoder(tmp_path / "other", seed=1)
    known = {"text_dim": WIDTH, "text_encoder_fingerprint": TextEncoder(own).fingerprint()}
    generator = export(tmp_path / "generator", **known)
    assert_one_line_error(assemble(generator=generator), "trained with text", "--text-encoder")
    assert_one_line_error(
        assemble("--text-encoder", other, generator=generator), "use the text encoder it was trained with"
    )
    assert_one_line_error(assemble("--text-encoder", own), "trained without text")
    assert not (tmp_path / "pipeline").exists()
    assert assemble("--text-encoder", own, generator=generator).exit_code == 0
    assert CATPipeline.from_pretrained(tmp_path / "pipeline").plan("a red house")[0].text == "a red house"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"latents": None}, ["--latents or --labels", "name the classes"]),
        ({"latents": None, "labels": "names.txt"}, ["--resolution", "without --latents"]),
        ({"latents": "tokenizer"}, ["tokenizer holds no latents", "data.latents"]),
        ({"generator": "generator"}, ["not a trained generator; did you mean", "generator/model?"]),
        ({"generator": "nowhere"}, ["nowhere: no such folder", "trained generator"]),
        ({"tokenizer": "generator/model"}, ["config.json of a NestedAutoencoderKL"]),
        ({"labels": "two.txt"}, ["the transformer has 3 classes", "got 2"]),
        ({"resolution": 100}, ["an image of 100 px", "multiple of"]),
        ({"thresholds": "7"}, ["thresholds must be two numbers"]),
        ({"text-classes": "skies"}, ["'skies' is none of the 3 classes"]),
        ({"face-classes": "3"}, ["'3' is none of the 3 classes"]),
        ({"text-classes": ","}, ["--text-classes ','", "expected class names or numbers"]),
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(
    assemble, trained, tmp_path, monkeypatch, changed, words
):
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    for name in ("tokenizer", "generator", "names.txt"):
        (tmp_path / name).symlink_to(trained / name)
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(assemble(**changed), *words)
    assert not (tmp_path / "pipeline").exists()


def test_models_that_were_not_trained_together_are_refused(assemble, tmp_path):
    other = tiny_tokenizer(seed=3)
    other.save_pretrained(tmp_path / "other")
    assert_one_line_error(
        assemble(tokenizer=tmp_path / "other"), "latents", "the tokenizer that encoded them"
    )
    latents = write_latents(tmp_path / "latents", other.fingerprint())
    assert_one_line_error(
        assemble(tokenizer=tmp_path / "other", latents=latents), "use the tokenizer it was trained with"
    )
    (latents / "latents.json").write_text('{"fingerprint": "0"}')
    assert_one_line_error(assemble(latents=latents), "latents.json is incomplete", "class_names")


def test_a_generator_without_its_schedule_is_refused(assemble, tmp_path):
    generator = export(tmp_path / "generator")
    (generator / "scheduler/scheduler_config.json").unlink()
    assert_one_line_error(
        assemble(generator=generator), "scheduler_config.json", "not the config of a DDPMScheduler"
    )
