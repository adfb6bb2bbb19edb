"""Latents of random crops of the training photographs, the training data of the DiT."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cat_fast.data.images.index import ImageRecord
from cat_fast.data.images.io import image_to_tensor, load_image
from cat_fast.data.images.random_crop import random_crop, shrink
from cat_fast.data.latents.dataset import LatentShardWriter
from cat_fast.data.photographs import CATEGORIES
from cat_fast.data.ratio_origin import RatioOrigin
from cat_fast.inference.encoding.ratio_batches import encode_batch
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.pipeline_config import latent_scale

MIN_CROP = 0.6


def encode_crops(
    tokenizer: NestedAutoencoderKL,
    records: Sequence[ImageRecord],
    folder: Path,
    *,
    resolution: int,
    crops: int,
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Write `crops` latents per image at its chosen ratio, and half as many at each other ratio.

    With the other ratios, a DiT trained on forty images can sample every class at every token count. Crops
    depend only on the image, ratio and crop number. Existing latents are kept.
    """
    tokenizer.eval()
    with LatentShardWriter(
        folder,
        tokenizer.latents_fingerprint(),
        resolution=resolution,
        class_names=CATEGORIES,
        scale=latent_scale(tokenizer),
        latents_per_shard=256,
    ) as writer:
        for number, record in enumerate(records):
            todo = {
                ratio: [i for i in range(count) if _name(record, ratio, i) not in writer]
                for ratio in tokenizer.ratios
                for count in [crops if ratio == record.ratio else crops // 2]
            }
            if any(todo.values()):
                image = shrink(load_image(record.path), 2 * resolution)
            for ratio, numbers in todo.items():
                if not numbers:
                    continue
                rngs = [np.random.default_rng([number, ratio, i]) for i in numbers]
                batch = [
                    image_to_tensor(random_crop(image, rng, resolution, MIN_CROP, not record.has_text))
                    for rng in rngs
                ]
                latents = encode_batch(tokenizer, batch, ratio)
                for i, latent in zip(numbers, latents, strict=True):
                    label, name = CATEGORIES.index(record.category), _name(record, ratio, i)
                    own = RatioOrigin(source="ratio", scored_by=record.scored_by)
                    origin = own if ratio == record.ratio else RatioOrigin(source="fixed")
                    writer.add(name, latent, label=label, ratio=ratio, caption=record.caption, origin=origin)
            on_done()


def _name(record: ImageRecord, ratio: int, number: int) -> str:
    return f"{record.key}-{ratio}x-{number}"
