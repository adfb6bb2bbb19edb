"""`cat-fast encode-shards`: encode an image set into latent shards for training a generator."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import (
    BatchSizeOption,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    JpegThresholdsOption,
    JsonOption,
    RatioOption,
    SizeOption,
    ThresholdsOption,
    parse_ratio,
)
from cat_fast.cli.codec_tables import print_notice
from cat_fast.cli.labels import read_classes
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.data.streams.formats.base import ShardSet
    from cat_fast.inference.encoding.shard_plan import EncodeShardsSettings, EncodingSummary, WorkUnit
    from cat_fast.tokenizer import NestedAutoencoderKL

_MAX_LISTED = 10
"""Maximum number of skipped samples to list."""


def encode_shards(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="An image index (JSON lines), a folder of images, webdataset archives (a folder or a quoted"
            " pattern), or `photographs` for the packaged training images.",
            show_default=False,
        ),
    ],
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder of latents.")] = Path("latents"),
    ratio: RatioOption = "auto",
    size: SizeOption = 256,
    thresholds: ThresholdsOption = None,
    jpeg_thresholds: JpegThresholdsOption = None,
    shard_format: Annotated[
        str, typer.Option("--format", metavar="safetensors|webdataset", help="Format of the latent shards.")
    ] = "safetensors",
    per_shard: Annotated[int, typer.Option(min=1, help="Maximum number of latents per shard.")] = 1024,
    classes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Class names, one per line, class 0 first. Default: all class names found in the image set,"
            " sorted.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        str,
        typer.Option(
            metavar="EXTENSION",
            help="Image of a sample of an archive that contains several, such as input.jpg.",
            show_default=False,
        ),
    ] = "",
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Number of processes on this machine.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Index of this machine, from 0.")] = 0,
    world_size: Annotated[int, typer.Option(min=1, help="Number of machines that share the work.")] = 1,
    json_output: JsonOption = False,
) -> None:
    """Encode an image set of any size into latent shards, the input of generator training (`data.latents`).

    Ratios, scores, captions and classes are read from the index or from files next to the images; see
    docs/data.md. In a folder of images, subfolders are classes. To resume after an interruption, run the same
    command again: complete shards are kept, missing ones are written.

    Images that cannot be read are reported and skipped (exit code 1).

    Examples:

        cat-fast encode-shards index.jsonl -c DIR -o latents --size 512 --workers 2

        cat-fast encode-shards "s3://bucket/shard-{000000..037999}.tar" -c DIR --rank 3 --world-size 16
    """
    fixed = parse_ratio(ratio)
    if len(sources) > 1:
        raise UserError(
            f"expected one source, got {len(sources)}; pass an index, a folder, or a pattern in quotes"
        )
    if rank >= world_size:
        raise UserError(f"--rank {rank}: expected 0 to {world_size - 1} for --world-size {world_size}")
    names = read_classes(classes) if classes else None

    from cat_fast.complexity import JpegThresholds, RatioThresholds
    from cat_fast.inference.encoding.requirements import require_served
    from cat_fast.inference.encoding.shard_plan import (
        EncodeShardsSettings,
        count_labels,
        open_images,
        prepare_folder,
        recorded_dtype,
        summarize_finished,
        work_units,
    )
    from cat_fast.inference.encoding.tokenizer_identity import (
        TokenizerIdentity,
        record_identity,
        recorded_identity,
    )

    settings = EncodeShardsSettings(
        source=sources[0],
        out=out,
        size=size,
        ratio=fixed,
        thresholds=RatioThresholds.parse(thresholds) if thresholds is not None else None,
        jpeg_thresholds=JpegThresholds.parse(jpeg_thresholds) if jpeg_thresholds is not None else None,
        per_shard=per_shard,
        batch_size=batch_size,
        format=shard_format,
        image=image,
        dtype=(recorded_dtype(out) if dtype == "auto" else None) or _find_dtype(dtype, device),
    )
    tokenizer, identity = None, recorded_identity(out, checkpoint)
    if identity is None:
        tokenizer = _load_tokenizer(checkpoint, device, settings.dtype, workers)
        require_served(fixed, tokenizer.config["ratios"])
        identity = TokenizerIdentity.of(tokenizer)
    images = open_images(settings.source, image)
    names = prepare_folder(
        settings, images, identity, names, rank=rank, world_size=world_size, workers=workers
    )
    record_identity(out, checkpoint, identity)
    units = work_units(rank, world_size, workers, len(images.names))
    counts, units = summarize_finished(settings, units)
    noticed, started = False, time.perf_counter()
    if units:
        labelled = count_labels(settings, images)
        noticed = print_notice(labelled.origins, labelled.ratios, size)
        tokenizer = tokenizer or _load_tokenizer(checkpoint, device, settings.dtype, workers)
        started = time.perf_counter()
        counts.merge(_encode(settings, images, tokenizer, checkpoint, device, names, units, workers))
    seconds = time.perf_counter() - started
    summary = _summary(counts, seconds) | {
        "out": str(out),
        "tokenizer": identity.fingerprint,
        "size": size,
        "classes": len(names),
        "rank": rank,
        "world_size": world_size,
    }
    _report(summary, json_output)
    if not noticed:  # labels may be known only once the images are read
        print_notice(counts.origins, counts.ratios, size)
    if not counts.latents and (counts.skipped or counts.unreadable):
        raise typer.Exit(2)
    if counts.skipped or counts.unreadable:
        raise typer.Exit(1)


def _find_dtype(dtype: str, device: str) -> str:
    """Return the dtype that an option selects on a device."""
    from cat_fast.models.device import find_device
    from cat_fast.models.execution import find_dtype, option_of

    return option_of(find_dtype(dtype, find_device(device)))


def _load_tokenizer(checkpoint: Path, device: str, dtype: str, workers: int) -> "NestedAutoencoderKL":
    """Load the tokenizer; processes load their own, so that it stays on the CPU in this one."""
    from cat_fast.models.device import find_device
    from cat_fast.models.execution import find_dtype
    from cat_fast.models.load import load_tokenizer

    own = "cpu" if workers > 1 else device
    return load_tokenizer(checkpoint, own, find_dtype(dtype, find_device(own)))


def _encode(
    settings: "EncodeShardsSettings",
    images: "ShardSet",
    tokenizer: "NestedAutoencoderKL",
    checkpoint: Path,
    device: str,
    names: list[str],
    units: "list[WorkUnit]",
    workers: int,
) -> "EncodingSummary":
    """Write the missing shards of work units."""
    from cat_fast.inference.encoding.latent_shards import ShardEncoder
    from cat_fast.inference.encoding.shard_plan import EncodingSummary
    from cat_fast.inference.encoding.shard_processes import encode_in_processes

    with console.progress("images") as bars:
        bar = _Bar(bars, len(units))
        if workers > 1:
            return encode_in_processes(settings, checkpoint, device, names, units, workers, bar.update)
        counts, encoder = EncodingSummary(), ShardEncoder(settings, images, tokenizer, names)
        for unit in units:
            counts.merge(encoder.run(unit, bar.update))
        return counts


class _Bar:
    """Progress bar over images; the total is extrapolated until all input shards are opened."""

    def __init__(self, bars: Any, units: int) -> None:
        self.bars, self.units = bars, units
        self.opened = self.found = 0
        self.task = bars.add_task("encoding", total=None)

    def update(self, kind: str, images: int) -> None:
        if kind == "found":
            self.opened += 1
            self.found += images
            units = max(self.units, self.opened)
            self.bars.update(self.task, total=round(self.found / self.opened * units))
        else:
            self.bars.advance(self.task, images)


def _summary(counts: "EncodingSummary", seconds: float) -> dict[str, Any]:
    from cat_fast.data.ratio_origin import origins_to_json

    ratios = sorted(counts.ratios)
    return {
        "shards": counts.shards,
        "latents": counts.latents,
        "encoded_now": counts.encoded,
        "ratios": {str(ratio): counts.ratios[ratio] for ratio in ratios},
        "mean_tokens": counts.tokens / counts.latents if counts.latents else None,
        "origins": origins_to_json(counts.origins),
        "skipped": len(counts.skipped),
        "skipped_samples": counts.skipped,
        "unreadable_shards": counts.unreadable,
        "seconds": round(seconds, 2),
        "images_per_second": round(counts.encoded / seconds, 2),
    }


def _report(summary: dict[str, Any], json_output: bool) -> None:
    for line in summary["unreadable_shards"]:
        console.err.print(Text(f"cannot be opened: {line}"), soft_wrap=True)
    for sample in summary["skipped_samples"][:_MAX_LISTED]:
        console.err.print(Text(f"skipped: {sample['key']}: {sample['why']}"), soft_wrap=True)
    if (more := summary["skipped"] - _MAX_LISTED) > 0:
        console.err.print(f"skipped: {more} more (use --json to list them)")
    if json_output:
        console.print_json(summary)
        return
    mix = ", ".join(f"{count} at {ratio}x" for ratio, count in summary["ratios"].items())
    mean = f"; mean {summary['mean_tokens']:.1f} tokens" if summary["latents"] else ""
    console.out.print(
        f"{summary['latents']} latents in {summary['shards']} shards, {summary['encoded_now']}"
        f" newly encoded ({summary['images_per_second']:.3g} images/s)",
        soft_wrap=True,
    )
    console.out.print(f"{mix}{mean}" if mix else "no latents")
    if mix:
        console.out.print(Text(f"To train on them, set data.latents={summary['out']}"), soft_wrap=True)
