"""Published tables: arithmetic that they must satisfy, our rows next to them, and the four formats."""

import csv
import io
import json
import math
import shlex
import xml.etree.ElementTree as ET

import pytest
import typer

from cat_fast.cli.main import app
from cat_fast.complexity import average_latent_side
from cat_fast.errors import UserError
from cat_fast.evaluation.published.formats import FORMATS, format_table
from cat_fast.evaluation.published.tables import find_table, published, read_run, with_runs


def test_every_row_has_a_value_per_column():
    for table in published().values():
        assert all((table.title, table.source, table.columns)), table.name
        assert table.command.startswith("cat-fast "), table.name
        for row in table.rows:
            assert len(row.values) == len(table.columns), (table.name, row.name)


def test_commands_exist_with_their_options():
    for table in published().values():
        command, words = typer.main.get_command(app), shlex.split(table.command)[1:]
        while words and words[0] in getattr(command, "commands", ()):
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, table.name


def cells(name):
    table = find_table(name)
    return {row.name: dict(zip(table.columns, row.values, strict=True)) for row in table.rows}


def test_average_sides_are_the_root_mean_square_of_the_mixes():
    """Within the rounding of the shares to a percent."""
    for row in cells("ratios").values():
        for dataset in ("COCO", "ImageNet", "CelebA", "ChartQA"):
            mix = {ratio: row[f"{dataset} {ratio}x %"] / 100 for ratio in (8, 16, 32)}
            side = average_latent_side(mix, 512)
            assert side == pytest.approx(row[f"{dataset} latent side"], rel=0.02)
            assert row[f"{dataset} rate"] == pytest.approx(512 / row[f"{dataset} latent side"], rel=2e-3)


def test_figures_that_occur_twice_agree():
    main = cells("reconstruction")
    for dataset in ("COCO", "ImageNet", "CelebA", "ChartQA"):
        key = f"{dataset} rFID"
        assert main["CAT"][key] == cells("equalized")["adaptive"][key] == cells("ldm")["CAT"][key]
        assert (
            main["CAT"][key]
            == cells("latent-channels")["CAT c = 16"][key]
            == cells("thresholds")["(4, 7)"][key]
        )
        assert main["fixed 16x"][key] == cells("latent-channels")["fixed 16x c = 16"][key]
    assert cells("generation")["CAT c = 8"]["FID"] == cells("forced-tokens")["adaptive"]["FID"]


def test_claimed_gains_follow_from_the_tables():
    gains, main = cells("gains"), cells("reconstruction")
    for dataset in ("CelebA", "ChartQA"):
        change = 100 * (main["CAT"][f"{dataset} rFID"] / main["fixed 16x"][f"{dataset} rFID"] - 1)
        assert change == pytest.approx(gains[f"rFID, {dataset}"]["change %"], abs=0.6)


def test_known_conflicts_are_recorded():
    text = " ".join(conflict for table in published().values() for conflict in table.conflicts)
    for part in ("0.37 here and 0.53", "5.89", "172,000 H100-hours", "reverses"):
        assert part in text


def reconstruction_result(tmp_path, metric="rFID"):
    column = {
        "rule": "adaptive",
        "metrics": {
            metric: {"value": 0.5, "interval": [0.4, 0.6]},
            "lpips_vgg": {"value": 0.125, "interval": None},
            "PSNR": {"value": 31.5, "interval": [31, 32]},
            "CER": None,
        },
        "distribution": {"8": 0.25, "32": 0.75},
        "rms_side": 35.0,
        "average_rate": 14.6,
        "flops": 2e12,
    }
    result = {
        "evaluation": "reconstruction",
        "data": {"path": "x/coco/val"},
        "columns": {"ours adaptive": column, "ours budget=64": {**column, "rule": "budget=64"}},
    }
    (tmp_path / "reconstruction.json").write_text(json.dumps(result))
    return tmp_path


def ours(table):
    (row,) = (row for row in table.rows if not row.is_published)
    return dict(zip(table.columns, row.values, strict=True))


def test_our_figures_are_entered_under_published_columns(tmp_path):
    runs = read_run(f"COCO={reconstruction_result(tmp_path)}")
    found = ours(with_runs(find_table("reconstruction"), runs))
    assert (found["COCO rFID"], found["COCO LPIPS"], found["COCO PSNR"]) == (0.5, 0.125, 31.5)
    assert found["ImageNet rFID"] is None
    assert ours(with_runs(find_table("ratios"), runs))["COCO 32x %"] == 75
    assert ours(with_runs(find_table("sizes"), runs))["COCO GMAC"] == 1000
    assert not with_runs(find_table("generation"), runs).has_ours


def test_stand_ins_and_other_data_have_columns_of_their_own(tmp_path):
    (run,) = read_run(str(reconstruction_result(tmp_path, "proxy-rFID-vgg16")))
    assert run.dataset == "coco"
    table = with_runs(find_table("reconstruction"), [run])
    assert ours(table)["coco proxy-rFID-vgg16"] == 0.5
    assert ours(table)["COCO rFID"] is None
    assert table.rows[0].values[-1] is None, "published rows have no figure in our column"


def test_the_command_is_shown_until_a_published_column_is_filled(tmp_path):
    folder, missing = (
        reconstruction_result(tmp_path),
        "Our figures on the published data need weights or data: ",
    )
    for name, expected in (("corpus", True), ("ImageNet", False)):
        table = with_runs(find_table("reconstruction"), read_run(f"{name}={folder}"))
        assert (missing + "`cat-fast eval recon" in format_table(table, "markdown")) == expected


def test_tables_take_the_rules_that_they_compare(tmp_path):
    runs = read_run(f"COCO={reconstruction_result(tmp_path)}")
    rows = [row.name for row in with_runs(find_table("others"), runs).rows if not row.is_published]
    assert rows == ["this project, ours adaptive", "this project, ours budget=64"]
    assert not with_runs(find_table("gains"), runs).has_ours


def test_correlations_of_a_study(tmp_path):
    study = {"settings": {"images": "coco/val"}, "metrics": {"JPEG bytes": {"pearson": {"value": 0.25}}}}
    (tmp_path / "study.json").write_text(json.dumps(study))
    runs = read_run(str(tmp_path))
    assert ours(with_runs(find_table("complexity"), runs))["coco Pearson r"] == 0.25
    assert not with_runs(find_table("scorers"), runs).has_ours


def test_generation_and_classification_results(tmp_path):
    metrics = {"FID": 5.0, "IS-std": 1, "KID": 2}
    generation = {"evaluation": "generation", "reference": {"path": "r.npz"}, "metrics": metrics}
    (tmp_path / "generation.json").write_text(json.dumps(generation))
    classification = {
        "evaluation": "classification",
        "task": "linear",
        "rows": [
            {"name": "ours 8x", "head": "flattened", "accuracy": {"value": 0.5}},
            {"name": "ours 8x", "head": "pooled", "accuracy": {"value": 0.25}},
        ],
    }
    (tmp_path / "classification.json").write_text(json.dumps(classification))
    runs = read_run(f"SVHN={tmp_path}")
    assert ours(with_runs(find_table("generation"), runs))["FID"] == 5.0
    assert ours(with_runs(find_table("coco"), runs))["SVHN FID"] == 5.0
    table = with_runs(find_table("classification"), runs)
    column = table.columns.index("SVHN linear %")
    found = {row.name: row.values[column] for row in table.rows if not row.is_published}
    assert found == {"this project, ours 8x": 50, "this project, ours 8x, pooled head": 25}


def test_dual_token_results(tmp_path):
    figure = {"value": 0.5, "interval": [0.4, 0.6]}
    methods = {
        "guide 8": {"tokens": 64, "images": 3, "ssim": figure, "psnr": {**figure, "value": 20.0}},
        "jpeg 8": {"tokens": None, "images": 0, "ssim": None, "psnr": None},
    }
    result = {"evaluation": "dual", "data": {"path": "corpus/held_out.jsonl"}, "methods": methods}
    (tmp_path / "dual.json").write_text(json.dumps(result))
    (run,) = read_run(str(tmp_path))
    table = with_runs(find_table("dual-reconstruction"), [run])
    found = ours(table)
    assert (found["held_out SSIM"], found["held_out PSNR"], found["tokens"]) == (0.5, 20.0, 64)
    assert found["SSIM"] is None, "the published images are unknown"
    assert not with_runs(find_table("dual-study"), [run]).has_ours


def test_unknown_tables_and_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="table 'rfid': expected one of reconstruction"):
        find_table("rfid")
    with pytest.raises(UserError, match="contains no result"):
        read_run(str(tmp_path))
    (tmp_path / "generation.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_run(str(tmp_path))
    with pytest.raises(UserError, match="--format xml"):
        format_table(find_table("ldm"), "xml")


def test_formats_hold_every_figure(tmp_path):
    table = with_runs(find_table("ldm"), read_run(f"COCO={reconstruction_result(tmp_path)}"))
    text = {kind: format_table(table, kind) for kind in FORMATS}
    rows = list(csv.reader(io.StringIO(text["csv"])))
    assert rows[0] == ["table", "row", "published", *table.columns]
    assert rows[-1][:4] == ["ldm", "this project, ours adaptive", "no", "0.5"]
    page = ET.fromstring(text["html"].replace("<!doctype html>", "").replace('<meta charset="utf-8">', ""))
    assert len(page.findall(".//tr")) == len(table.rows) + 1
    assert text["latex"].count(r"\\") == len(table.rows) + 1
    assert r"0.53, its" not in text["csv"]
    assert "Conflict: LDM's ImageNet rFID" in text["markdown"]
    assert "Our row needs" not in text["markdown"]
    assert "Our row needs weights or data: `cat-fast eval reconstruction" in format_table(
        find_table("ldm"), "markdown"
    )
    assert all(math.isfinite(float(cell)) for row in rows[1:] for cell in row[3:] if cell)
