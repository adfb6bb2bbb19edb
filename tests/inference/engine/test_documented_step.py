"""The numbers of the step in docs/inference.md are those of `pack_step`."""

import re
from pathlib import Path

from cat_fast.generator import SampleRequest
from cat_fast.generator.sampling import pack_step
from cat_fast.generator.step_pack import Filling
from cat_fast.inference.engine import EngineRequest
from cat_fast.inference.engine.stages import Stages

DOCUMENT = Path(__file__).parents[3] / "docs/inference.md"
SIDES = {8: 16, 16: 8, 32: 4}
IMAGES = ((8, 4.0), (16, 1.5), (32, 1.0), (16, 1.0))
"""Ratio and guidance of images 7, 9, 4 and 12."""


def numbers(pattern, text):
    """Return the numbers of the only match of a pattern."""
    (found,) = re.findall(pattern, text, re.M)
    return [int(number) for number in re.findall(r"\d+", found)]


def test_the_documented_step_is_packed_as_it_is_drawn(pipeline):
    text = DOCUMENT.read_text(encoding="utf-8").split("## One step")[1].split("## Python")[0]
    stages = Stages(pipeline)
    states = [
        stages.prepare(
            EngineRequest(
                sample=SampleRequest(label=1, ratio=ratio, grid=(SIDES[ratio],) * 2, seed=0),
                guidance_scale=guidance,
                scheduler="ddim",
            )
        )
        for ratio, guidance in IMAGES
    ]
    packed = pack_step(pipeline.transformer, states, Filling(16)).packed
    bounds, (filled,) = packed.cu_seqlens.tolist(), numbers(r"^filling .* sequences to (\d+);", text)
    drawn = numbers(r"^tokens  (.*?)│ 0, 0", text)
    documented = numbers(r"^cu_seqlens  (.*?), …", text)
    assert drawn == packed.cu_seqlens.diff().tolist()[: len(drawn)]
    assert documented == bounds[: len(documented)]
    assert documented[len(drawn) :] == [packed.num_tokens] * 2
    assert len(bounds) == filled + 1
    assert numbers(r"max_seqlen  (\d+)", text) == [packed.max_seqlen]
    assert numbers(r"(\d+) null sequences", text) == [filled - len(drawn)]
