"""Regional compilation: blocks share their code, and batches of any mix need no recompilation."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.gpu.operators import mixes
from benchmarks.gpu.workloads import packed_batch
from cat_fast.generator import PackedText
from tests.generator.conftest import TEXT_DIM

ALL = {"text_dim": TEXT_DIM, "rope": True, "qk_norm": True, "swiglu": True}


@pytest.mark.parametrize("options", [{}, ALL], ids=["published", "all"])
def test_50_random_mixes_compile_each_kind_of_block_once(make_dit, options):
    """The first block has no pending branch, all others do: two graphs for any depth."""
    torch._dynamo.reset()
    model, eager = make_dit(depth=4, num_heads=1, **options), make_dit(depth=4, num_heads=1, **options)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(backend=counter, dynamic=True, fullgraph=True)
    drawn = torch.Generator().manual_seed(0)
    for lengths in ([2, 3, 4], *(mix for mix in mixes(50, longest=24) if len(mix) > 1)):
        batch = packed_batch(model, [max(length, 2) for length in lengths], torch.device("cpu"))
        batch = batch.replace(timestep=torch.zeros(len(lengths), dtype=torch.int64))
        text = None
        if model.config.text_dim:
            words = [torch.randn(2 + length % 5, TEXT_DIM, generator=drawn) for length in lengths]
            text = PackedText.of(words)
        got = model(batch, text=text).sample
        assert torch.equal(got, eager(batch, text=text).sample)
    assert counter.frame_count == 2
    torch._dynamo.reset()
