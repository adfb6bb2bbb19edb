"""Dtype of inference: bf16 on GPUs that multiply in it, TF32 for fp32; recorded with the outputs."""

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.models.execution import describe_execution, find_dtype
from cat_fast.models.load import load_tokenizer


@pytest.fixture(autouse=True)
def default_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("capability", "name", "dtype", "precision"),
    [
        ((9, 0), "auto", torch.bfloat16, "highest"),
        ((7, 5), "auto", torch.float32, "high"),
        ((9, 0), "fp32", torch.float32, "high"),
        ((8, 0), "fp16", torch.float16, "highest"),
        (None, "auto", torch.float32, "highest"),
        (None, "bf16", torch.bfloat16, "highest"),
    ],
)
def test_gpus_use_their_tensor_cores(monkeypatch, capability, name, dtype, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cpu" if capability is None else "cuda")
    assert find_dtype(name, device) == dtype
    assert torch.get_float32_matmul_precision() == precision


def test_unknown_dtypes_are_errors():
    with pytest.raises(UserError, match="--dtype int8: expected auto, fp32, bf16, fp16"):
        find_dtype("int8", torch.device("cpu"))


def test_the_record_names_what_determines_bits():
    record = describe_execution(torch.device("cpu"), torch.bfloat16)
    assert (record["device"], record["dtype"], record["tf32"]) == ("cpu", "bfloat16", False)
    assert record["torch"] == torch.__version__
    assert record["backends"].keys() >= {"group_norm_silu", "varlen_attention"}


def test_a_cast_tokenizer_keeps_its_fingerprint():
    fingerprint = load_tokenizer("nano", "cpu").fingerprint()
    half = load_tokenizer("nano", "cpu", torch.bfloat16)
    assert (half.dtype, half.fingerprint()) == (torch.bfloat16, fingerprint)
