"""Bounds by data sheets: formulas, counted steps, and the measured column, which no dry run fills."""

import json

import pytest
import torch
from torch import nn

from benchmarks import roofline
from benchmarks.bounds import data_sheets, kernels, steps
from benchmarks.bounds.kernels import PASSES, works
from benchmarks.bounds.trace import Trace, require_operators
from benchmarks.static.compiler import instruction_mix
from cat_fast import hardware
from cat_fast.kernels.scalar_attention.op import scalar_attention
from cat_fast.training.metrics.flops import DiTFlops

SHEETS, ASSUMED = data_sheets.read_sheets()
KERNELS = {(work.op, work.dtype, work.which): work for work in works()}


def test_data_sheets_have_sources_and_the_peaks_that_runs_report():
    assert set(SHEETS) == {"A100", "H100", "H200", "B200"}
    for sheet in SHEETS.values():
        gpu = hardware.GPUS[sheet.cuda_name]
        assert "https://" in sheet.source
        assert sheet.bytes_per_second == gpu.bytes_per_second
        assert sheet.matrix_flops("bfloat16") == 2 * sheet.matrix_flops("float32")
        assert sheet.matrix_flops("bfloat16") == gpu.tensor_flops_per_second


@pytest.mark.parametrize(
    ("gpu", "sheet"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        *((f"NVIDIA {name}", None) for name in ("A100-PCIE-40GB", "H100 NVL", "H100 PCIe", "GH200 480GB")),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_sheet_is_that_of_the_very_model(gpu, sheet):
    assert data_sheets.name_of(gpu, SHEETS) == sheet


def test_invalid_data_sheets_are_refused(tmp_path):
    content = json.loads(data_sheets.FILE.read_text())
    content["gpus"]["A100"]["memory_bytes"] = 0
    (tmp_path / "gpus.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"A100\.memory_bytes must be positive, got 0"):
        data_sheets.read_sheets(tmp_path / "gpus.json")


def test_time_is_that_of_the_scarcer_resource():
    sheet = SHEETS["H100"]
    assert sheet.seconds(0, 3350e9, "float32") == 1
    assert sheet.seconds(989e12, 1, "bfloat16") == 1
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
    # x, dy, y and dx, once each: 4 * 8 * 128 * 256 * 256 * 2 bytes
    assert KERNELS["group_norm_silu", "bfloat16", "forward_backward"].compulsory == 536_870_912
    passes = {op: [one.own for one in both] for op, both in kernels.COMPULSORY.items()}
    assert passes == {
        "group_norm_silu": [2, 4], "scalar_attention": [4, 8], "wide_attention": [4, 8],
        "varlen_attention": [4, 8], "adaln": [2, 4], "gate_residual_adaln": [4, 8], "pack": [2, 4],
    }  # fmt: skip
    # x read twice and y written: 3 * 8 * 128 * 256 * 256 * 2 bytes
    assert KERNELS["group_norm_silu", "bfloat16", "forward"].moved == 402_653_184
    varlen = KERNELS["varlen_attention", "bfloat16", "forward"]
    assert varlen.flops == 4 * 16 * 72 * 6_553_600
    assert varlen.executed == 4 * 16 * 96 * 6_553_600  # padded by FlashAttention
    # 7 tensors forward, 14 and 4 in fp32 backward
    scalar = {
        item: KERNELS["scalar_attention", name, "forward_backward"]
        for name, item in kernels.ITEM_BYTES.items()
    }
    assert {item: work.moved for item, work in scalar.items()} == {
        item: 8 * 4096 * 512 * (21 * item + 16) for item in (2, 4)
    }


def test_a_trace_counts_products_and_bytes_but_no_views():
    x = torch.empty(8, 4, device="meta", requires_grad=True)
    with Trace() as trace:
        (x.view(4, 8) @ torch.empty(8, 2, device="meta")).relu().sum().backward()
    assert sum(call.flops for call in trace.calls) == 2 * (2 * 4 * 8 * 2)
    first = trace.calls[0]
    assert (first.name, first.kind, first.moved) == ("mm", "matrix", 4 * (32 + 16 + 8))
    assert not {"view", "empty", "detach", "expand"} & {call.name for call in trace.calls}


def test_upsampling_merged_into_a_convolution_does_four_ninths_of_its_products():
    x = torch.empty(1, 8, 16, 16, device="meta", requires_grad=True)
    weight = torch.empty(4, 8, 3, 3, device="meta", requires_grad=True)
    with Trace() as trace:
        doubled = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest").to(torch.bfloat16)
        nn.functional.conv2d(doubled, weight.to(torch.bfloat16), padding=1).sum().backward()
        nn.functional.conv2d(x, weight, padding=1)
    merged, backward, plain = (call for call in trace.calls if call.kind == "convolution")
    assert (merged.flops, merged.dtype) == (2 * 32 * 32 * 4 * 8 * 9, "bfloat16")
    assert merged.required == merged.flops * 4 // 9
    assert backward.flops == 2 * merged.flops
    assert backward.required == backward.flops * 4 // 9
    assert plain.required == plain.flops
    assert plain.dtype == "float32"


def test_a_trace_of_references_is_refused(monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "reference")
    q = torch.empty(1, 4, 2)
    with Trace() as trace:
        scalar_attention(q, q, q)
    with pytest.raises(roofline.UserError, match="scalar_attention: the reference was traced"):
        require_operators(trace.calls, ["scalar_attention"])
    monkeypatch.delenv("CAT_FAST_BACKEND")
    with Trace() as trace:
        scalar_attention(q, q, q)
    require_operators(trace.calls, ["scalar_attention"])


def test_a_step_of_a_transformer_has_the_flops_of_training():
    small = {"hidden_size": 64, "num_heads": 2, "depth": 2}
    lengths = [64] * 3 + [256]
    step = steps.dit_step("small", "cat_xl", lengths, ranks=16, changes=small)
    config = steps.transformer("cat_xl", small).config
    exact = DiTFlops({key: value for key, value in config.items() if not key.startswith("_")})
    linear = sum(exact.sequence_flops(length)["linear"] for length in lengths)
    assert step.by_kind()["matrix"]["flops"] == pytest.approx(linear, rel=1e-3)
    attention = [call for call in step.calls if call.kind == "attention"]
    assert sum(call.required for call in attention) == 12 * 64 * 2 * sum(length**2 for length in lengths)
    assert sum(call.flops for call in attention) == 14 * 64 * 2 * sum(length**2 for length in lengths)
    assert len(attention) == 2 * 2
    gated = [call.moved for call in step.calls if call.name == "gate_residual_adaln"]
    assert gated == [(12 + 18) * 448 * 64] * 4  # the residual stream in fp32, branches in bf16
    assert step.tokens == 448
    assert step.compulsory < step.moved
    row = roofline.step_row(step, SHEETS, ASSUMED)
    assert all(row["bound_ms"][gpu] < row["predicted_ms"][gpu] for gpu in SHEETS)


def report():
    rows = [roofline.kernel_row(work, SHEETS, ASSUMED) for work in works()]
    return {"gpus": dict.fromkeys(SHEETS), "kernels": rows, "steps": {}}


def check(value, figure=(), **more):
    """Return a file in the form of `benchmarks.gpu_check`."""
    figure = {"value": value, "dtype": "bfloat16", "shape": "16384x1152", **dict(figure)}
    figures = {"adaln.forward.milliseconds": figure}
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
        (
            check(0.1, machine={"gpu": "NVIDIA GH200 480GB"}),
            r"no data sheet of NVIDIA GH200 480GB.*H200 \(H200\)",
        ),
        (check(None), "no figure has the sizes"),
        (check(0.1, {"shape": "8192x1152"}), "no figure has the sizes"),
        ({"figures": {}}, "expected the gpu_check.json"),
    ],
    ids=str,
)
def test_a_file_that_measures_nothing_is_refused(content, message):
    with pytest.raises(roofline.UserError, match=message):
        roofline.add_measured(report(), content, "check.json")


@pytest.mark.parametrize(("images", "filled"), [(100, True), (99, False)])
def test_a_step_of_the_check_gets_its_measured_time_if_its_sizes_agree(images, filled):
    row = {"bound_ms": {"H200": 50.0}, "images": 100, "parameters": {"transformer": 7}}
    made = report() | {"steps": {"cat_xl.check": row}}
    figure = {"value": 125.0, "images": images, "parameters": 7}
    content = check(0.1)
    content["blocks"]["steps"] = {"figures": {"cat_xl_compiled.milliseconds": figure}}
    roofline.add_measured(made, content, "check.json")
    assert row.get("of_bound") == ({"H200": pytest.approx(0.4)} if filled else None)


def test_compiled_kernels_are_listed_at_their_worst_case():
    row = {"name": "k", "architecture": 90, "case": "op.small", "registers": 32, "occupancy": 1.0}
    mix = {"float": 60, "matrix": 40, "special": 0}
    rows = [row | {"instructions": None}, row | {"case": "op.large", "registers": 64, "instructions": mix}]
    older = row | {"architecture": 80, "registers": 99, "instructions": None}
    other = row | {"name": "l", "instructions": None}
    found = roofline.compiled([*rows, other, older])
    lines = [*roofline.compiled_lines({"compiled": found})][2:]
    assert lines == [
        "| `op` `k` | A100 | op.small | 99 | 100% | not counted |",
        "| `op` `k` | H100, H200 | op.large | 64 | 100% | float 60%, matrix 40% |",
        "| `op` `l` | H100, H200 | op.small | 32 | 100% | not counted |",
    ]
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
        /*0080*/                   LDGDEPBAR ;
        /*0090*/                   ATOMS.ADD RZ, [R2], R4 ;
        /*00a0*/                   REDUX.SUM UR4, R4 ;
    """
    mix = instruction_mix(code)
    assert {kind: count for kind, count in mix.items() if count} == {
        "other": 1, "global": 2, "matrix": 1, "special": 1, "float": 1, "shared": 2, "barrier": 1,
        "shuffle": 1,
    }  # fmt: skip
