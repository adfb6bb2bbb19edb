"""Folders that are not a complete CATPipeline are refused with one line that names the part."""

import inspect
import json
import re
import shutil
import socket
import stat

import pytest
from diffusers import DiffusionPipeline

from cat_fast.errors import UserError
from cat_fast.inference import CATPipeline
from cat_fast.inference.pipeline.cat_pipeline import PIPELINE_OPTIONS
from cat_fast.inference.pipeline.folder import pipeline_digest


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pipe")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        CATPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_every_file_has_the_mode_of_a_new_file(saved):
    mode = stat.S_IMODE((saved / "model_index.json").stat().st_mode)
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {p.name: mode for p in files}


def test_an_empty_folder(tmp_path):
    refused(tmp_path, r"is not a pipeline: model_index\.json is missing")


def test_a_folder_that_does_not_exist(tmp_path):
    refused(tmp_path / "nowhere", "nowhere is not a pipeline: no such folder")
    refused(str(tmp_path / "nowhere"), "nowhere is not a pipeline: no such folder")


def test_a_repository_of_the_hub(saved, monkeypatch):
    asked = {}

    def download(name, **options):
        asked[name] = options
        if name != "owner/cat":
            raise OSError("offline")
        return str(saved)

    monkeypatch.setattr("cat_fast.inference.pipeline.folder.snapshot_download", download)
    assert CATPipeline.from_pretrained("owner/cat", revision="main").resolution == 64
    assert asked == {"owner/cat": {"revision": "main"}}
    refused("owner/dog", r"owner/dog is not a pipeline: no such folder, and not found on the hub \(offline\)")


@pytest.mark.parametrize("part", ["vae", "transformer", "scheduler"])
def test_a_missing_part_is_named_and_not_searched_on_the_hub(folder, monkeypatch, part):
    """`pipe/vae` could be the name of a model on the hub."""
    monkeypatch.chdir(folder.parent)
    for target, name in ((socket, "getaddrinfo"), (socket.socket, "connect")):
        monkeypatch.setattr(target, name, lambda *_, **__: pytest.fail("connected to the network"))
    shutil.rmtree(folder / part)
    refused("pipe", f"pipe is not a complete pipeline: pipe/{part}/.*config.json is missing")


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_part_without_weights(folder, part):
    (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    refused(folder, f"is not a complete pipeline: .*/{part}: the checkpoint cannot be loaded")


@pytest.mark.parametrize("part", ["vae", "transformer", "scheduler"])
def test_a_part_that_is_not_listed(folder, part):
    index = folder / "model_index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != part}))
    refused(folder, f"model_index.json does not list '{part}'")


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("vae", ["diffusers", "AutoencoderKL"]),
        ("transformer", ["diffusers", "DiTTransformer2DModel"]),
        ("scheduler", ["diffusers", "PNDMScheduler"]),
        ("text_encoder", ["transformers", "T5EncoderModel"]),
    ],
)
def test_a_part_of_another_class(folder, part, entry):
    change(folder / "model_index.json", **{part: entry})
    refused(folder, f"model_index.json: {part} is a {entry[1]}, expected a ")


@pytest.mark.parametrize(
    ("part", "name"), [("vae", "AutoencoderKL"), ("transformer", "DiTTransformer2DModel")]
)
def test_a_sub_folder_of_another_class(folder, part, name):
    change(folder / part / "config.json", _class_name=name)
    refused(folder, f"{part}/config.json: {part} is a {name}, expected a ")


def test_a_pipeline_of_another_class(folder):
    change(folder / "model_index.json", _class_name="DiTPipeline")
    refused(folder, "pipe holds a DiTPipeline, expected a CATPipeline")


def test_an_index_that_is_not_json(folder):
    (folder / "model_index.json").write_text("{")
    refused(folder, "is not a complete pipeline: .*model_index.json is not valid JSON")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("transformer/config.json", '"hidden_size": 48', '"hidden_size": 32'),
        ("transformer/config.json", '"num_heads": 2', '"num_heads": 5'),
        ("transformer/config.json", '"depth": 1', '"depth": 2'),  # half of the weights are missing
        ("vae/config.json", '"latent_channels": 4', '"latent_channels": 6'),
        ("scheduler/scheduler_config.json", "squaredcos_cap_v2", "no such schedule"),
    ],
)
def test_a_part_that_does_not_fit_its_configuration(folder, file, old, new):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    refused(folder, f"is not a complete pipeline: .*{file.partition('/')[0]}")


def test_missing_weights_are_refused_however_they_are_loaded(folder):
    change(folder / "transformer" / "config.json", depth=2)
    with pytest.raises(UserError, match=r"transformer: blocks\.1\..* is missing from its weights"):
        CATPipeline.from_pretrained(folder, low_cpu_mem_usage=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": [1, 3, 7]}, "thresholds: expected two scores"),
        ({"resolution": "big"}, "resolution 'big': expected a number of pixels"),
        ({"labels": ["one"]}, "expected as many different labels, got 1"),
        ({"descriptions": [{"words": "sky"}] * 3}, "descriptions: expected caption"),
    ],
)
def test_invalid_settings(folder, settings, message):
    change(folder / "model_index.json", **settings)
    refused(folder, message)


def test_the_layout_of_an_earlier_version_is_refused_with_a_command(folder):
    (folder / "model_index.json").rename(folder / "pipeline.json")
    (folder / "vae").rename(folder / "tokenizer")
    (folder / "transformer").rename(folder / "generator")
    refused(
        folder,
        f"{folder} has the layout of an earlier version; remake it: cat-fast pipeline --tokenizer"
        f" {folder}/tokenizer --generator RUN/model --latents LATENTS --out {folder}",
    )


def test_a_transformer_of_another_tokenizer(folder):
    change(folder / "transformer" / "config.json", tokenizer_fingerprint="another")
    refused(folder, "trained on latents of tokenizer another")


def test_a_folder_that_cannot_be_written(pipeline, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        pipeline.save_pretrained(tmp_path / "file")


def test_an_interrupted_save_is_not_a_pipeline(pipeline, folder, monkeypatch):
    monkeypatch.setattr(type(pipeline.vae), "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.save_pretrained(folder)
    refused(folder, r"model_index\.json is missing")


def test_the_digest_changes_with_files_of_the_pipeline_only(folder):
    digest = pipeline_digest(folder)
    (folder / "notes.json").write_text("{}")
    assert pipeline_digest(folder) == digest
    seen = {digest}
    for file in ("model_index.json", "vae/config.json", "scheduler/scheduler_config.json"):
        (folder / file).write_text((folder / file).read_text() + "\n")
        seen.add(pipeline_digest(folder))
    assert len(seen) == 4


def test_options_that_are_not_understood_raise(folder):
    with pytest.raises(UserError, match=r"unexpected argument 'resolutions' \(did you mean 'resolution'\?\)"):
        CATPipeline.from_pretrained(folder, resolutions=64)
    assert CATPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True) is not None


def test_all_options_of_diffusers_are_known():
    source = inspect.getsource(DiffusionPipeline.from_pretrained.__func__)
    taken = set(re.findall(r'kwargs\.pop\("(\w+)"', source))
    assert len(taken) > 20
    assert taken <= set(PIPELINE_OPTIONS)
