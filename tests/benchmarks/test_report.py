"""The report of a folder: tables of measured, counted and bound figures, as HTML and Markdown, and plots."""

import json

from benchmarks import report, roofline
from benchmarks.bounds.data_sheets import read_sheets
from benchmarks.bounds.kernels import works


def spread(value):
    return {"median": value, "low": 0.9 * value, "high": 1.1 * value}


def test_a_report_shows_every_result_and_says_what_is_not_measured(tmp_path, capsys):
    about = {"benchmark": "kernels", "date": "2026-11-29", "cpu": {"processor": "AMD EPYC", "threads": 2}}
    right = {
        "right": True,
        "seconds": {"ours": spread(0.001)},
        "ratios": {"eager": spread(2.0)},
        "rates": {"tokens": 5.0},
        "peak_bytes": {"ours": 2**20},
    }
    kernels = {"about": about, "cases": {"a.forward": right, "<b>": {"right": False, "seconds": {}}}}
    row = {"claim": "mean tokens", "unit": "tokens", "published": 216, "counted": 215.68, "measured": None}
    claims = {"about": {"benchmark": "claims"}, "claims": {"tokens": [row | {"explanation": "why"}]}}
    sheets, assumed = read_sheets()
    rows = [roofline.kernel_row(work, sheets, assumed) for work in works()[:2]]
    bounds = {
        "about": {"benchmark": "roofline"},
        "gpus": dict.fromkeys(sheets),
        "kernels": rows,
        "steps": {},
        "compiled": [],
    }
    for name, content in (("kernels", kernels), ("claims", claims), ("roofline", bounds)):
        (tmp_path / f"{name}_amd-epyc-2t_2026-11-29.json").write_text(json.dumps(content))
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert "| a.forward | 1 | 2 x eager | 5 tokens/s | 1 |" in text
    assert "| mean tokens | tokens | 216 | 215.68 |  | why |" in text
    assert "nothing here was measured but" in text
    assert "Measured on amd-epyc-2t, 2026-11-29" in page
    assert "&lt;b&gt;<td>WRONG" in page
    assert (tmp_path / "out/kernels.png").stat().st_size > 5000
    assert "kernels.png" in capsys.readouterr().out
    assert report.main([str(tmp_path / "none")]) == 2
