"""The self-test finds the block that makes bits independent of neighbours, or that there is none."""

import pytest
import torch

from cat_fast.inference.engine import stages as module
from cat_fast.inference.engine.invariance import BLOCKS, self_test
from cat_fast.inference.engine.stages import Stages


def test_bits_are_independent_on_this_machine(pipeline):
    found = self_test(Stages(pipeline), 200, decode_batch=2)
    assert found.independent, found.reason
    assert found.rows in BLOCKS
    assert found.decode_batch in (1, 2)
    assert found.to_json()["dtype"] == "float32"


@pytest.mark.parametrize(("found", "rows"), [(1, 16), (8, 16), (32, 32), (64, 64), (None, 16)])
def test_steps_are_filled_up_to_the_block_of_this_machine(pipeline, monkeypatch, found, rows):
    monkeypatch.setattr(module, "row_invariant_block", lambda dtype: found)
    assert Stages(pipeline).rows == rows
    assert Stages(pipeline, rows=8).rows == 8


@pytest.mark.parametrize("max_tokens", [2, 8, 3000])
def test_the_largest_pack_of_the_test_fills_the_row_budget(pipeline, max_tokens):
    seen = []

    class Recording(Stages):
        def denoise_step(self, states):
            seen.append(sum(state.passes * state.request.num_tokens for state in states))
            return super().denoise_step(states)

    assert self_test(Recording(pipeline), max_tokens, decode_batch=1).independent
    assert 0.9 * max_tokens < max(seen) <= max_tokens
    assert min(seen) > 0


def test_packs_that_do_not_fit_into_memory_are_halved(pipeline):
    class Small(Stages):
        room = 400

        def denoise_step(self, states):
            if sum(state.passes * state.request.num_tokens for state in states) > self.room:
                raise torch.OutOfMemoryError("out of memory")
            return super().denoise_step(states)

    found = self_test(Small(pipeline), 1200, decode_batch=1)
    assert found.independent
    assert "tested up to 300 rows" in found.reason
    Small.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        self_test(Small(pipeline), 1200, decode_batch=1)


def test_only_shapes_that_were_tested_are_decoded_in_batches(pipeline):
    class Alike(Stages):
        def decode(self, latents, ratio):
            return [super(Alike, self).decode([latent], ratio)[0] for latent in latents]

    stages = Alike(pipeline)
    assert self_test(stages, 200, decode_batch=2).decode_batch == 2
    assert stages.decode_batch_of(16, torch.Size((4, 4, 4))) == 2
    assert stages.decode_batch_of(16, torch.Size((4, 4, 8))) == 1
    assert stages.decode_batch_of(8, torch.Size((4, 4, 4))) == 1
    sizes, decode = [], pipeline.vae.decode

    def recorded(z, ratio):
        sizes.append(len(z))
        return decode(z, ratio)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline.vae, "decode", recorded)
        for height in (4, 8):
            assert len(Stages.decode(stages, [torch.zeros(4, height, 4)] * 3, 16)) == 3
    assert sizes == [2, 1, 1, 1, 1]


class Sensitive(Stages):
    """A machine whose matrix products change below `limit` rows."""

    limit = 0

    def denoise_step(self, states):
        predictions = super().denoise_step(states)
        rows = sum(state.passes * state.request.num_tokens for state in states)
        filled = rows + -rows % self.rows
        return predictions if filled >= self.limit else [one + 1e-6 for one in predictions]

    def decode(self, latents, ratio):
        images = super().decode(latents, ratio)
        return images if self.decode_batch == 1 else [image + 1e-6 * len(latents) for image in images]


@pytest.mark.parametrize(("limit", "rows"), [(0, 16), (33, 64), (10**6, None)])
def test_blocks_are_tried_until_one_suffices(pipeline, limit, rows):
    stages = Sensitive(pipeline)
    stages.limit = limit
    found = self_test(stages, 200, decode_batch=2)
    if limit == 10**6:  # every pass is alike again
        assert found.independent
    else:
        assert (found.independent, found.rows, stages.rows) == (True, rows, rows)
    assert found.decode_batch == stages.decode_batch == 1


def test_dependence_is_stated(pipeline, monkeypatch):
    class Random(Stages):
        def denoise_step(self, states):
            return [torch.randn_like(one) for one in super().denoise_step(states)]

    found = self_test(Random(pipeline), 200, decode_batch=1)
    assert not found.independent
    assert "bits differ" in found.reason
