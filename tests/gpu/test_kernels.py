"""Operators at a GPU's sizes, on other streams and devices, repeated, and without synchronization."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close

from benchmarks.gpu.compilations import count_compilations
from benchmarks.gpu.operators import SIZES, Call, adaln_call, mixes, varlen_attention_call
from tests.gpu.conftest import no_synchronization

OPERATORS = tuple(SIZES["chip"])
HALF = torch.bfloat16


def call_on(device: torch.device, op: str, size: str, dtype: torch.dtype = HALF) -> Call:
    """Make a call; toy tensors on a CPU, in fp32."""
    if device.type == "cpu":
        return SIZES["toy"][op](device, torch.float32)
    return SIZES[size][op](device, dtype)


@pytest.mark.parametrize("op", OPERATORS)
def test_tensors_of_more_than_2_31_elements(device, op):
    """The last sample or sequence has the results that it has alone: no offset overflows."""
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 100 * 2**30:
        pytest.skip("needs 100 GiB of memory")
    call = call_on(device, op, "huge")
    alone = call.last()
    results, expected = call.forward_backward(), alone.forward_backward()
    for got, want in zip(
        results[:1] + results[len(call.grads) :][:1], (expected[0], expected[len(call.grads)]), strict=True
    ):
        tail = got[-want.shape[0] :] if op != "pack" or got.ndim == 2 else got
        assert_close(tail, want, rtol=0, atol=2e-2 * want.abs().max().item())
    del results, expected, call, alone
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("size", ["odd", "chip"])
@pytest.mark.parametrize("op", OPERATORS)
def test_repeated_calls_are_equal_to_the_bit(device, deterministic, op, size):
    call = call_on(device, op, size)
    first = call.forward_backward()
    for _ in range(3):
        assert all(map(torch.equal, call.forward_backward(), first))


@pytest.mark.parametrize("make", [varlen_attention_call, adaln_call], ids=["varlen_attention", "adaln"])
@pytest.mark.parametrize("count", [257, 1000])
def test_more_than_256_sequences(device, make, count):
    """Triton programs find their sequence by scanning 256 offsets at a time."""
    lengths = [1 + number % 5 for number in range(count)]
    sizes = {"heads": 1, "dim": 32} if make is varlen_attention_call else {"features": 16, "gated": False}
    call = make(lengths, **sizes, device=device, dtype=torch.float32)
    alone = call.last()
    got, want = call.forward_backward(), alone.forward_backward()
    for ours, theirs in ((got[0], want[0]), (got[1], want[1])):
        assert_close(ours[-lengths[-1] :], theirs, rtol=0, atol=1e-4 * theirs.abs().max().item() + 1e-6)


@pytest.mark.parametrize("op", OPERATORS)
def test_another_stream_gives_the_same(device, deterministic, op):
    """Kernels run on the current stream; on the default stream they would read inputs before they exist."""
    call = call_on(device, op, "chip")
    expected = call.forward_backward()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream) if stream else nullcontext():
        doubled = call.forward_backward()
    if stream is not None:
        stream.synchronize()
    assert all(map(torch.equal, doubled, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPERATORS)
def test_a_second_gpu_gives_the_same(deterministic, op):
    """The current device is the first one; every kernel must run where its tensors are."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    results = [SIZES["odd"][op](torch.device("cuda", index), HALF).forward_backward() for index in (0, 1)]
    assert all(torch.equal(first, second.to(first.device)) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("op", OPERATORS)
def test_operators_do_not_wait_for_the_device(device, op):
    if device.type == "cpu":
        pytest.skip("nothing to wait for on a CPU")
    call = call_on(device, op, "odd")
    call.forward_backward()  # compiles
    with no_synchronization(device):
        call.forward_backward()


def test_mixes_of_lengths_compile_nothing_new(device, triton_on_cpu):
    """50 random batches use the kernels that the first three have compiled."""
    real = device.type == "cuda"
    lengths = mixes(50, longest=1024) if real else [[1, 2], [3], [4, 4, 2], [1, 1, 1]]
    heads, dim, features = (16, 72, 1152) if real else (1, 32, 16)
    dtype = HALF if real else torch.float32
    counts = []
    with count_compilations() as compilations:
        for mix in lengths:
            varlen_attention_call(mix, heads, dim, device, dtype).forward_backward()
            adaln_call(mix, features, device, dtype, gated=True).forward_backward()
            counts.append(compilations())
    assert counts[-1] == counts[2]
