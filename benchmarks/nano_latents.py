"""Limit of the nano tokenizer: its encoder, or the values of a latent and the decoder.

    python -m benchmarks.nano_latents --corpus corpus --json FILE

Reconstructs held-out photographs at 256 px from the encoder's latents, and from the latents that gradient
descent through the frozen decoder finds from there. If these are much better, the encoder is the limit.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.nano.emoji_data import of_source
from benchmarks.nano.intervals import mean_with_interval, paired_difference
from benchmarks.shared import machine
from benchmarks.shared.harness import rounded
from cat_fast.data.files import write_json
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop
from cat_fast.errors import UserError
from cat_fast.evaluation.metrics import psnr
from cat_fast.tokenizer import NestedAutoencoderKL

SIDE = 256
STEPS = (0, 15, 45)
"""Numbers of gradient steps at which images are reconstructed."""
RATE = 0.02


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Limit of the nano tokenizer on photographs.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of `cat-fast data corpus`")
    parser.add_argument("--model", default="nano", help="tokenizer: a name, or a folder")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    given = parser.parse_args()
    try:
        model = NestedAutoencoderKL.from_pretrained(given.model)
        records = of_source(given.corpus / "held_out.jsonl", "photographs")
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    model.eval().float().requires_grad_(False)
    images = [image_to_tensor(resize_center_crop(load_image(one.path), SIDE))[None] for one in records]
    found = {}
    for ratio in model.ratios:
        rows = [optimised_psnr(model, image, ratio) for image in images]
        by_steps = [list(values) for values in zip(*rows, strict=True)]
        found[f"{ratio}x"] = {
            str(steps): mean_with_interval(values)
            | ({"gain": paired_difference(values, by_steps[0])} if steps else {})
            for steps, values in zip(STEPS, by_steps, strict=True)
        }
        print(f"{ratio}x", {steps: round(one["mean"], 2) for steps, one in found[f"{ratio}x"].items()})
    if given.json:
        about = {"tokenizer": model.fingerprint(), "rate": RATE, "side": SIDE}
        write_json(given.json, rounded({"psnr by steps": found, **about, "machine": machine.describe()}))
    return 0


def optimised_psnr(model: NestedAutoencoderKL, image: torch.Tensor, ratio: int) -> list[float]:
    """Return the PSNR after each number of `STEPS` of Adam on the latent, from the posterior's mode.

    Args:
        model: in evaluation mode, frozen.
        image: (1, 3, H, W) in [-1, 1].
    """
    latent = model.encode(image, ratio).latent_dist.mode().clone().requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=RATE)
    found = []
    for step in range(max(STEPS) + 1):
        decoded = model.decode(latent, ratio).sample
        if step in STEPS:
            found.append(float(psnr(decoded.detach().clamp(-1, 1), image)))
        optimizer.zero_grad()
        (decoded - image).square().mean().backward()
        optimizer.step()
    return found


if __name__ == "__main__":
    sys.exit(main())
