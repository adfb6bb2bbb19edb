"""Triton launchers with the sizes to compile, one module per operator."""

from collections.abc import Mapping

from benchmarks.static.budgets import Case
from benchmarks.static.cases import (
    adaln,
    group_norm_silu,
    pack,
    scalar_attention,
    varlen_attention,
    wide_attention,
)

CASES: Mapping[str, Case] = {
    **group_norm_silu.CASES,
    **scalar_attention.CASES,
    **wide_attention.CASES,
    **varlen_attention.CASES,
    **adaln.CASES,
    **pack.CASES,
}
