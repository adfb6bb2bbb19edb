"""Bounds by data sheets: formulas, counted steps, and the measured column, which no dry run fills."""

import json

import pytest
import torch

from benchmarks import roofline
from benchmarks.bounds import data_sheets, steps
from benchmarks.bounds.kernels import PASSES, works
from benchmarks.bounds.trace import Trace
from benchmarks.static.compiler import instruction_mix
from cat_fast import hardware
from cat_fast.training.metrics.flops import DiTFlops

SHEETS, ASSUMED = data_sheets.read_sheets()
KERNELS = {(work.op, work.dtype, work.which): work for work in works()}


def test_data_sheets_have_sources_and_are_not_below_the_peaks_that_runs_report():
    assert set(SHEETS) == {"A100", "H100", "H200", "B200"}
    names = {"A100": "A100-SXM4-80GB", "H100": "H100 80GB HBM3", "H200": "H200"}
    for name, known in names.items():
        sheet, gpu = SHEETS[name], hardware.GPUS[known]
        assert "https://" in sheet.source
        assert sheet.bytes_per_second == gpu.bytes_per_second
        assert sheet.bfloat16_flops == pytest.approx(gpu.tensor_flops_per_second, rel=1e-3)
        assert sheet.float32_flops == gpu.float32_flops_per_second


def test_invalid_data_sheets_are_refused(tmp_path):
    content = json.loads(data_sheets.FILE.read_text())
    content["gpus"]["A100"]["bytes_per_second"] = 0
    (tmp_path / "gpus.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"A100\.bytes_per_second must be positive, got 0"):
        data_sheets.read_sheets(tmp_path / "gpus.json")


def test_time_is_that_of_the_scarcer_resource():
    sheet = SHEETS["H100"]
    assert sheet.seconds(0, 3350e9, "float32") == 1
    assert sheet.seconds(989.5e12, 1, "bfloat16") == 1
    assert sheet.seconds(494.5e12, 1, "float32") == 1  # TF32
    assert sheet.seconds(0, 3350e9, "bfloat16", memory_share=0.5) == 2
    assert sheet.ridge("bfloat16") == pytest.approx(295, abs=1)


def test_no_kernel_is_bound_by_more_than_ours_moves_or_multiplies():
    for work in KERNELS.values():
        assert 0 < work.compulsory <= work.moved
        assert work.flops <= work.executed
        for sheet in SHEETS.values():
            bound = sheet.seconds(work.flops, work.compulsory, work.dtype)
            assert bound <= sheet.seconds(work.executed, work.moved, work.dtype)
    assert {work.op for work in works()} == {
        "group_norm_silu", "scalar_attention", "wide_attention", "varlen_attention", "adaln",
        "gate_residual_adaln", "pack",
    }  # fmt: skip
    # x read twice and y written: 3 * 8 * 128 * 256 * 256 * 2 bytes
    assert KERNELS["group_norm_silu", "bfloat16", "forward"].moved == 402_653_184
    assert KERNELS["varlen_attention", "bfloat16", "forward"].flops == 4 * 16 * 72 * 6_553_600


def test_a_trace_counts_products_and_bytes_but_no_views():
    x = torch.empty(8, 4, device="meta", requires_grad=True)
    with Trace() as trace:
        (x.view(4, 8) @ torch.empty(8, 2, device="meta")).relu().sum().backward()
    assert sum(call.flops for call in trace.calls) == 2 * (2 * 4 * 8 * 2)
    first = trace.calls[0]
    assert (first.name, first.kind, first.moved) == ("mm", "matrix", 4 * (32 + 16 + 8))
    assert not {"view", "empty", "detach", "expand"} & {call.name for call in trace.calls}


def test_a_step_of_a_transformer_has_the_flops_of_training():
    small = {"hidden_size": 64, "num_heads": 2, "depth": 2}
    lengths = [64] * 3 + [256]
    step = steps.dit_step("small", "cat_xl", lengths, ranks=16, changes=small)
    config = steps.transformer("cat_xl", small).config
    exact = DiTFlops({key: value for key, value in config.items() if not key.startswith("_")})
    linear = sum(exact.sequence_flops(length)["linear"] for length in lengths)
    assert step.by_kind()["matrix"]["flops"] == pytest.approx(linear, rel=1e-3)
    attention = step.by_kind()["attention"]
    assert attention["flops"] == 12 * 64 * 2 * sum(length**2 for length in lengths)
    assert attention["calls"] == 2 * 2
    assert step.tokens == 448
    assert step.compulsory < step.moved
    row = roofline.step_row(step, SHEETS, ASSUMED)
    assert all(row["bound_ms"][gpu] < row["predicted_ms"][gpu] for gpu in SHEETS)


def report():
    rows = [roofline.kernel_row(work, SHEETS, ASSUMED) for work in works()]
    return {"gpus": dict.fromkeys(SHEETS), "kernels": rows, "steps": {}}


def check(value, **more):
    """Return a file in the form of `benchmarks.gpu_check`."""
    figures = {"adaln.forward.milliseconds": {"value": value, "dtype": "bfloat16"}}
    return {"machine": {"gpu": "NVIDIA H200"}, "blocks": {"kernels": {"figures": figures}}, **more}


def test_a_check_on_a_gpu_fills_the_measured_column_of_its_rows_only():
    made = report()
    assert not any("measured" in line for line in roofline.lines(made))
    roofline.add_measured(made, check(0.1), "check.json")
    (filled,) = [row for row in made["kernels"] if "measured_ms" in row]
    assert (filled["op"], filled["pass"]) == ("adaln", PASSES[0])
    bound = 2 * 16_384 * 1152 * 2 / 4800e9 * 1e3
    assert filled["of_bound"]["H200"] == pytest.approx(bound / 0.1)
    assert "measured, ms" in next(iter(roofline.lines(made)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (check(0.1, dry=True), "a dry run are not measurements"),
        (check(0.1, machine={"gpu": "RTX 4090"}), "no data sheet of RTX 4090"),
        (check(None), "no figure belongs to"),
    ],
    ids=str,
)
def test_a_file_that_measures_nothing_is_refused(content, message):
    with pytest.raises(roofline.UserError, match=message):
        roofline.add_measured(report(), content, "check.json")


def test_a_step_of_the_check_gets_its_measured_time():
    made = report() | {"steps": {"cat_xl.check": {"bound_ms": {"H200": 50.0}}}}
    steps_block = {"figures": {"cat_xl_compiled.milliseconds": {"value": 125.0}}}
    content = {"machine": {"gpu": "NVIDIA H200"}, "blocks": {"steps": steps_block}}
    roofline.add_measured(made, content, "check.json")
    assert made["steps"]["cat_xl.check"]["of_bound"] == {"H200": pytest.approx(0.4)}


def test_compiled_kernels_are_listed_at_their_worst_case():
    row = {"name": "k", "architecture": 90, "case": "op.small", "registers": 32, "occupancy": 1.0}
    mix = {"float": 60, "matrix": 40, "special": 0}
    rows = [row | {"instructions": None}, row | {"case": "op.large", "registers": 64, "instructions": mix}]
    text = "\n".join(roofline.compiled_lines({"compiled": {"op": [*rows, row | {"architecture": 80}]}}))
    assert "| `op` `k` | op.large | 64 | 100% | float 60%, matrix 40% |" in text
    assert roofline.instruction_shares(None) == "not counted"


def test_instructions_are_counted_by_class():
    code = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/              @P0 LDG.E.128 R4, [R2.64] ;
        /*0020*/             @!P1 STG.E.128 [R2.64], R4 ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   MUFU.EX2 R9, R9 ;
        /*0050*/                   FFMA R9, R9, R9, R9 ;
        /*0060*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0070*/                   NOP ;
    """
    mix = instruction_mix(code)
    assert {kind: count for kind, count in mix.items() if count} == {
        "other": 1, "global": 2, "matrix": 1, "special": 1, "float": 1, "shared": 1,
    }  # fmt: skip
