"""`cat-fast eval generation` and `eval reference` on real images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from typer.testing import CliRunner

from cat_fast.cli.main import app
from cat_fast.data.images.io import image_to_bytes
from cat_fast.data.photographs import photographs
from cat_fast.evaluation.features.loading import load_network
from cat_fast.evaluation.images.sets import Crop, square


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twenty photographs as reference, and as samples twelve of them, blurred."""
    root = tmp_path_factory.mktemp("images")
    for name in ("samples", "reference"):
        (root / name).mkdir()
    for number, photograph in enumerate(photographs("train")[:20]):
        with Image.open(photograph.path) as image:
            small = square(image.convert("RGB"), Crop(64))
        small.save(root / "reference" / f"{number:02d}.png")
        if number < 12:
            small.resize((24, 24)).resize((64, 64)).save(root / "samples" / f"{number:02d}.png")
    return root


def proxy_run(folders, out, *arguments):
    return run(
        "generation", "--samples", folders / "samples", "--reference", folders / "reference", "--features",
        "proxy", "--out", out, *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    found = proxy_run(folders, out, "--allow-few-samples", "--json")
    assert found.exit_code == 0, found.output
    return json.loads((out / "generation.json").read_text()), out, json.loads(found.stdout)


def test_figures_equal_torch_fidelity_on_the_same_features(result, folders):
    network = load_network("proxy").network
    features = [
        network(torch.stack([image_to_bytes(Image.open(path)) for path in sorted(folder.iterdir())]))
        for folder in (folders / "samples", folders / "reference")
    ]  # fmt: skip
    statistics = [fid_features_to_statistics(x["pool"].double()) for x in features]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert result[0]["metrics"]["proxy-FID-vgg16"] == pytest.approx(expected, rel=1e-3)


def test_every_figure_of_the_proxy_is_named_so(result):
    written, _, printed = result
    assert printed == written
    assert set(written["metrics"]) == {
        f"proxy-{name}-vgg16" for name in ("FID", "precision", "recall", "KID", "KID-interval")
    }


def test_the_result_records_what_figures_depend_on(result):
    written = result[0]
    assert written["samples"]["count"] == written["samples"]["used"] == 12
    assert written["samples"]["crop"] == "none"
    assert written["samples"]["rounding"] == "unknown"
    assert written["samples"]["formats"] == {"png": 12}
    assert len(written["networks"]["proxy"]["sha256"]) == 64
    assert written["protocol"]["k"] == 3
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "12 samples instead of 50000" in written["deviations"]


def test_the_same_command_resumes_and_writes_the_same(result, folders):
    before, out, _ = result
    for part in out.rglob("000000.npz"):
        part.unlink()
        break
    assert proxy_run(folders, out, "--allow-few-samples").exit_code == 0
    again = json.loads((out / "generation.json").read_text())
    assert {**again, "timing": None} == {**before, "timing": None}


def test_too_few_images_and_left_out_images(folders, tmp_path):
    found = proxy_run(folders, tmp_path / "few")
    assert found.exit_code == 2
    assert "12 images for 512 features" in found.stderr
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in (folders / "samples").iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    (bad / "zz.png").write_bytes(b"not an image")
    found = run(
        "generation", "--samples", bad, "--reference", folders / "reference", "--features", "proxy", "--out",
        tmp_path / "out", "--metrics", "kid",
    )  # fmt: skip
    assert found.exit_code == 1
    assert "left out: zz.png" in found.stderr
    written = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert written["samples"]["used"] == 12
    assert [entry["name"] for entry in written["samples"]["skipped"]] == ["zz.png"]


def test_reference_file_gives_the_figures_of_its_folder(result, folders, tmp_path):
    """The statistics of a written file are used as they are: equal to the folder's in every figure."""
    path = tmp_path / "reference.npz"
    found = run("reference", folders / "reference", "--features", "proxy", "--out", path)
    assert found.exit_code == 0, found.output
    with np.load(path) as arrays:
        assert set(arrays) == {"mu", "sigma", "arr_0", "record"}
        assert arrays["arr_0"].shape == (20, 64, 64, 3)
        assert arrays["sigma"].dtype == np.float64
    found = run(
        "generation", "--samples", folders / "samples", "--reference", path, "--features", "proxy", "--out",
        tmp_path / "out", "--allow-few-samples",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    written = json.loads((tmp_path / "out" / "generation.json").read_text())
    for name, value in result[0]["metrics"].items():
        assert written["metrics"][name] == pytest.approx(value, rel=1e-9)


def test_statistics_of_another_network_stop_before_any_work(folders, tmp_path):
    path = tmp_path / "inception.npz"
    np.savez(path, mu=np.zeros(16), sigma=np.eye(16), arr_0=np.zeros((20, 64, 64, 3), np.uint8))
    found = run(
        "generation", "--samples", folders / "samples", "--reference", path, "--features", "proxy", "--out",
        tmp_path / "o", "--allow-few-samples",
    )  # fmt: skip
    assert found.exit_code == 2
    assert "mu and sigma have 16 features, proxy has 512" in " ".join(found.stderr.split())
    assert not (tmp_path / "o" / "features").exists()


def test_missing_weights_stop_before_any_work(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = run(
        "generation", "--samples", folders / "samples", "--reference", folders / "reference", "--out",
        tmp_path / "o",
    )  # fmt: skip
    assert found.exit_code == 2
    assert "pt_inception-2015-12-05-6726825d.pth" in found.stderr
    assert not (tmp_path / "o" / "features").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --samples or --pipeline, got neither"),
        (("--samples", "x", "--coco", "captions.json"), "--coco draws captions"),
        (("--samples", "x", "--count", "5000"), "--count: applies to samples drawn from --pipeline"),
        (("--samples", "x", "--mean-tokens", "99"), "--mean-tokens: applies to samples drawn from"),
        (("--pipeline", "x", "--rounding", "adm"), "--rounding: applies to --samples"),
        (("--samples", "x", "--crop-mode", "adm"), "--crop-mode adm: applies to --crop SIZE"),
        (("--samples", "x", "--weights", "inception"), "expected NETWORK=PATH"),
        (("--samples", "x", "--features", "clip"), "expected published or proxy"),
        (("--pipeline", "x", "--ratio", "12"), "--ratio 12: expected 8, 16, 32 or auto"),
        (("--samples", "x", "--crop", "8", "--crop-mode", "top"), "expected center or adm"),
        (("--samples", "x", "--rank", "2", "--world-size", "2"), "ranks of --world-size 2 are 0 to 1"),
    ],
)
def test_arguments_are_checked(arguments, message, tmp_path):
    found = run("generation", "--reference", tmp_path, "--out", tmp_path / "o", *arguments)
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())
