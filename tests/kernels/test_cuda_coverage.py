"""Compiled CUDA kernels serve GPUs that they were built for; others use the next backend of the table."""

import pytest
import torch

from cat_fast.kernels import backends, cuda_coverage, library

A100, RTX_3090, H100, B200, RTX_5090, T4 = (8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (7, 5)


@pytest.mark.parametrize(
    ("architectures", "covered", "others"),
    [
        ("8.0;9.0+PTX", [A100, RTX_3090, H100, B200, RTX_5090], [T4]),
        ("8.0;9.0a", [A100, RTX_3090, H100], [T4, B200, RTX_5090]),
        ("8.6 9.0", [RTX_3090, H100], [A100, B200]),
        ("7.5;8.0+PTX", [T4, A100, H100, B200], [(7, 0)]),
        ("10.0f", [B200, (10, 3)], [H100, RTX_5090]),
        ("", [], [A100]),
    ],
)
def test_cubins_run_within_a_major_version_and_ptx_on_newer_gpus(architectures, covered, others):
    assert all(cuda_coverage.covers(architectures, gpu) for gpu in covered)
    assert not any(cuda_coverage.covers(architectures, gpu) for gpu in others)


@pytest.fixture
def gpus(monkeypatch):
    """Simulate two GPUs with Triton and the compiled kernels, an H100 and a T4."""
    monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
    monkeypatch.setattr(backends.Backend, "unavailable_reason", lambda self: None)
    monkeypatch.setattr(cuda_coverage, "capability_of", [H100, T4].__getitem__)
    monkeypatch.setattr(library, "cuda_architectures", lambda: "8.0;9.0+PTX")


def test_the_device_of_the_tensor_decides(gpus, monkeypatch):
    def chosen(index, op="group_norm_silu"):
        return backends._choose(op, torch.device("cuda", index), torch.bfloat16, True, ())

    assert [chosen(0), chosen(1)] == ["cuda", "triton"]
    assert [chosen(0, "scalar_attention"), chosen(1, "scalar_attention")] == ["cuda", "triton"]
    monkeypatch.setenv("CAT_FAST_BACKEND", "cuda")
    with pytest.raises(
        backends.UserError, match=r"8\.0;9\.0\+PTX, not for this GPU's compute capability 7\.5"
    ):
        chosen(1)


@pytest.mark.parametrize(
    ("found", "refused"), [([T4], True), ([B200], False), ([T4, H100], False), ([], False)]
)
def test_a_library_for_none_of_the_gpus_is_refused_at_load(found, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(cuda_coverage, "capability_of", found.__getitem__)
    monkeypatch.setattr(library, "cuda_architectures", lambda: "8.0;9.0+PTX")
    monkeypatch.setattr(torch.ops.cat_fast, "cuda_architectures", None, raising=False)
    reason = library._check_architectures()
    assert (reason is not None) == refused
    assert not refused or "compute capability 7.5" in reason
