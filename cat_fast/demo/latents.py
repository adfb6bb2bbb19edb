"""Latents of random crops of the training photographs, for the generator to learn from."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cat_fast.data.images.crops import CropDataset, load_shrunk
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.latents.dataset import LatentShardWriter
from cat_fast.data.photographs import CATEGORIES
from cat_fast.inference.encoding.ratio_batches import encode_batch
from cat_fast.tokenizer import NestedAutoencoderKL

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
    """Write `crops` latents a picture at its chosen ratio, and half as many at each of the others.

    The others let a forty-picture generator draw every class at every token count. Crops depend on the
    picture and the crop's number alone, and latents that are there already are not made again.
    """
    tokenizer.eval()
    pictures = CropDataset(
        [load_shrunk(r.path, 2 * resolution) for r in records],
        resolution,
        MIN_CROP,
        mirrored=[not r.has_text for r in records],
    )
    with LatentShardWriter(
        folder, tokenizer.fingerprint(), resolution=resolution, class_names=CATEGORIES, latents_per_shard=256
    ) as writer:
        for number, record in enumerate(records):
            for ratio in tokenizer.ratios:
                count = crops if ratio == record.ratio else crops // 2
                names = {i: f"{record.key}-{ratio}x-{i}" for i in range(count)}
                todo = {i: name for i, name in names.items() if name not in writer}
                if not todo:
                    continue
                batch = [pictures.crop(number, np.random.default_rng([number, ratio, i])) for i in todo]
                latents = encode_batch(tokenizer, batch, ratio)
                for name, latent in zip(todo.values(), latents, strict=True):
                    label = CATEGORIES.index(record.category)
                    writer.add(name, latent, label=label, ratio=ratio, caption=record.caption)
            on_done()
