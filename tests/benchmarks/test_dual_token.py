"""The figures of the dual-token tokenizer: retrieval, crops, and runs that are missing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import dual_token


def test_retrieval_of_perfect_and_of_random_similarities():
    right = dual_token.retrieved(np.eye(150), 100, 10)
    assert right["at_1"] == {"value": 1.0, "interval": [1.0, 1.0]}
    noise = np.random.default_rng(1).normal(size=(300, 300))
    found = dual_token.retrieved(noise, 100, 200)
    assert found["at_1"]["value"] == pytest.approx(0.01, abs=0.005)
    assert found["at_5"]["value"] == pytest.approx(0.05, abs=0.015)


def test_a_model_without_distinctions_retrieves_nothing():
    found = dual_token.retrieved(np.ones((9, 9)), 9, 1)
    assert found["at_1"]["value"] == found["at_5"]["value"] == 0.0


def test_mean_states_are_those_of_texts_of_the_same_length():
    texts = [torch.full((2, 1), 1.0), torch.full((2, 1), 3.0), torch.tensor([[0.0], [0.0], [6.0]])]
    found = dual_token.mean_states(texts, [2, 3, 1], 3)
    assert found.shape == (3, 3, 1)
    assert found[0, :2].flatten().tolist() == [2.0, 2.0]
    assert found[1].flatten().tolist() == [0.0, 0.0, 6.0]
    assert found[2, 0].item() == pytest.approx(2.0)  # no such text: the mean of all states


def test_two_crops_per_image(tmp_path):
    rows = []
    for number in range(2):
        Image.new("RGB", (300, 200), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"path": f"{number}.png", "caption": "red"}))
    (tmp_path / "held_out.jsonl").write_text("\n".join(rows))
    crops = list(dual_token._crops(tmp_path / "held_out.jsonl"))
    assert [tuple(crop.shape) for crop in crops] == [(3, 128, 128)] * 4


def test_a_missing_model_is_one_line_and_other_parts_are_kept(tmp_path, capsys):
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"guide": {"crops": 3}}))
    arguments = ["--runs", str(tmp_path), "--json", str(file)]
    assert dual_token.main([*arguments, "--only", "language"]) == 2
    assert "run `cat-fast dual train nano_language`" in capsys.readouterr().err.replace("\n", " ")
    assert dual_token.main([*arguments, "--only", "training"]) == 0
    found = json.loads(file.read_text())
    assert found["guide"] == {"crops": 3}
    assert found["training"] == {}
    assert found["about"]["benchmark"] == "dual_token"


def test_minutes_of_an_unknown_stage_are_refused(tmp_path, capsys):
    for given in ("decoder=3", "guide=x", "guide"):
        assert dual_token.main(["--json", str(tmp_path / "f.json"), "--cpu-minutes", given]) == 2
        assert "expected STAGE=MINUTES" in capsys.readouterr().err
