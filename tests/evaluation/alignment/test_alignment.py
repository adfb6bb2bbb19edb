"""Alignment scorers: PickScore with a tiny CLIP, and the errors of missing weights and packages."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from cat_fast.errors import UserError
from cat_fast.evaluation.alignment.run import Captioned, measure
from cat_fast.evaluation.alignment.scorers import open_scorer
from tests.cli.conftest import assert_one_line_error, cat_fast, parse_json  # noqa: F401 # a fixture


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folder of a CLIP with random weights and its processor."""
    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "r", "e", "re", "d</w>", "red</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8, unk_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**sizes, **text}, vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def test_pickscore_is_scaled_cosine_similarity(clip):
    scorer = open_scorer(f"pickscore={clip}", "cpu")
    images = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    found = scorer.score(images, ["a red", "red"])
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    for image, caption, score in zip(images, ["a red", "red"], found, strict=True):
        inputs = processor(text=[caption], images=[image], return_tensors="pt", padding=True)
        with torch.no_grad():
            expected = model(**inputs).logits_per_image.item()
        assert score == pytest.approx(expected, rel=1e-4)


def test_missing_weights_and_packages_stop_clearly(tmp_path):
    for spec, words in (
        ("clipscore=x", "expected NAME=WEIGHTS with a name of pickscore, hpsv2, imagereward"),
        ("pickscore", "expected NAME=WEIGHTS"),
        (f"pickscore={tmp_path}", "expected the folder of yuvalkirstain/PickScore_v1"),
        (f"hpsv2={tmp_path / 'x.pt'}", "no such file"),
        (f"imagereward={tmp_path}", "ImageReward.pt is missing"),
    ):
        with pytest.raises(UserError, match=words):
            open_scorer(spec, "cpu")
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(UserError, match="pip install hpsv2"):
        open_scorer(f"hpsv2={tmp_path / 'x.pt'}", "cpu")


def test_two_scorers_of_one_name_are_refused(clip, tmp_path):
    """Their scores would be averaged."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    scorers = [open_scorer(f"pickscore={clip}", "cpu") for _ in range(2)]
    with pytest.raises(UserError, match="PickScore is given twice"):
        measure([Captioned(tmp_path / "a.png", "red")], scorers)


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins of the authors' packages, with their signatures; return the weights that were loaded."""
    loaded = []

    def score(img_path, prompt, cp=None, hps_version="v2.0"):
        loaded.append(cp)
        return [0.25 if prompt == "red" else 0.5 for _ in img_path]

    class Model:
        def score(self, prompt, image):
            assert isinstance(image, Image.Image)
            return -1.5 if prompt == "red" else 2.0

    def load(name="ImageReward-v1.0", device="cpu", download_root=None, med_config=None):
        if not Path(name).read_bytes():
            raise EOFError("Ran out of input")
        loaded.append((name, device, med_config))
        return Model()

    img_score, reward = ModuleType("hpsv2.img_score"), ModuleType("ImageReward")
    img_score.score, reward.load = score, load
    for name, module in (
        ("hpsv2", ModuleType("hpsv2")),
        ("hpsv2.img_score", img_score),
        ("ImageReward", reward),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return loaded


def test_packages_of_the_authors_score_each_image_with_its_caption(packages, tmp_path):
    for name in ("hps.pt", "ImageReward.pt", "med_config.json"):
        (tmp_path / name).write_bytes(b"weights")
    images = [Image.new("RGB", (4, 4))] * 2
    scorer = open_scorer(f"hpsv2={tmp_path / 'hps.pt'}", "cpu")
    assert scorer.score(images, ["red", "a red"]) == [0.25, 0.5]
    assert packages == [str(tmp_path / "hps.pt")] * 2
    assert sys.modules["hpsv2.img_score"].device == "cpu"
    scorer = open_scorer(f"imagereward={tmp_path}", "cpu")
    assert scorer.score(images, ["red", "a red"]) == [-1.5, 2.0]
    assert packages[-1] == (str(tmp_path / "ImageReward.pt"), "cpu", str(tmp_path / "med_config.json"))
    (tmp_path / "ImageReward.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be loaded \(Ran out of input\)"):
        open_scorer(f"imagereward={tmp_path}", "cpu")


def test_command(cat_fast, clip, tmp_path):  # noqa: F811
    for name in ("a", "b"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a red")
    result = cat_fast("eval", "alignment", tmp_path, "--scorer", f"pickscore={clip}", "--json")
    found = parse_json(result)
    assert found["images"] == 2
    assert len(set(found["scores"]["PickScore"])) == 1
    assert "PickScore" in cat_fast("eval", "alignment", tmp_path, "--scorer", f"pickscore={clip}").stdout
    (tmp_path / "c.png").write_bytes(b"no image")
    (tmp_path / "c.txt").write_text("red")
    result = cat_fast("eval", "alignment", tmp_path, "--scorer", f"pickscore={clip}", "--json")
    assert result.exit_code == 1
    found = parse_json(result)
    assert found["images"] == 2
    assert list(found["left_out"]) == [str(tmp_path / "c.png")]
    assert "1 of 3 images failed; the others were scored" in result.stderr
    alone = cat_fast("eval", "alignment", tmp_path / "c.png", "--scorer", f"pickscore={clip}")
    assert_one_line_error(alone, "no image can be read")
    (tmp_path / "b.txt").unlink()
    result = cat_fast("eval", "alignment", tmp_path, "--scorer", f"pickscore={clip}")
    assert_one_line_error(result, "b.png: has no caption")
