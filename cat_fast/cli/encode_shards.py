"""`cat-fast encode-shards`: a set of any size becomes latents to train a generator on."""

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
    JsonOption,
    RatioOption,
    SizeOption,
    ThresholdsOption,
    parse_ratio,
)
from cat_fast.cli.codec_tables import print_json
from cat_fast.cli.labels import read_classes
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.inference.encoding.shard_plan import Tally

_TOLD = 10


def encode_shards(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="One of: an image index (JSON lines), a folder of images, webdataset archives (a quoted"
            " pattern), `photographs`.",
            show_default=False,
        ),
    ],
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of latents to write.")] = Path("latents"),
    ratio: RatioOption = "auto",
    size: SizeOption = 256,
    thresholds: ThresholdsOption = None,
    shard_format: Annotated[
        str, typer.Option("--format", metavar="safetensors|webdataset", help="Format of a shard.")
    ] = "safetensors",
    per_shard: Annotated[int, typer.Option(min=1, help="Most latents per shard.")] = 1024,
    classes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Names of the classes, one per line; class 0 first. Default: all that the images name,"
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
    workers: Annotated[int, typer.Option(min=1, help="Processes of this machine.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Number of this machine, from 0.")] = 0,
    world_size: Annotated[int, typer.Option(min=1, help="Number of machines that share the work.")] = 1,
    json_output: JsonOption = False,
) -> None:
    """Encode a set of any size as shards of latents, for `data.latents` of a generator's run.

    Ratios, scores, captions and classes come from the index or from the files next to the images
    (docs/data.md); in a folder the subfolders are the classes. Interrupted or killed, the same command
    resumes: complete shards are kept, the others written again.

    An image that cannot be read is reported and the others are written all the same (exit code 1).

    Examples:

        cat-fast encode-shards index.jsonl -c DIR -o latents --size 512 --workers 2

        cat-fast encode-shards "s3://bucket/shard-{000000..037999}.tar" -c DIR --rank 3 --world-size 16
    """
    fixed = parse_ratio(ratio)
    if len(sources) > 1:
        raise UserError(
            f"encode-shards takes one source, got {len(sources)}: an index, a folder, or a pattern in quotes"
        )
    if rank >= world_size:
        raise UserError(f"--rank {rank}: ranks of --world-size {world_size} are 0 to {world_size - 1}")
    names = read_classes(classes) if classes else None

    from cat_fast.complexity import RatioThresholds
    from cat_fast.inference.encoding.latent_shards import LatentCache
    from cat_fast.inference.encoding.shard_plan import CacheSettings, Tally, prepare, units_of
    from cat_fast.inference.encoding.shard_processes import run_units
    from cat_fast.models.device import find_device
    from cat_fast.models.load import load_tokenizer

    settings = CacheSettings(
        source=sources[0],
        out=out,
        size=size,
        ratio=fixed,
        thresholds=RatioThresholds.parse(thresholds) if thresholds is not None else None,
        per_shard=per_shard,
        batch_size=batch_size,
        format=shard_format,
        image=image,
    )
    find_device(device)  # what is wrong with it is known before processes are started
    tokenizer = load_tokenizer(checkpoint, "cpu" if workers > 1 else device)
    input_shards, names = prepare(settings, tokenizer, names)
    units = units_of(rank, world_size, workers, input_shards)
    tally, begun = Tally(), time.perf_counter()
    with console.progress("images") as bars:
        bar = _Bar(bars, len(units))
        if workers > 1:
            tally = run_units(settings, checkpoint, device, names, units, workers, bar.tell)
        else:
            cache = LatentCache(settings, tokenizer, names)
            for unit in units:
                tally.join(cache.run(unit, bar.tell))
    seconds = time.perf_counter() - begun
    summary = _summary(tally, seconds) | {
        "out": str(out),
        "tokenizer": tokenizer.fingerprint(),
        "size": size,
        "classes": len(names),
        "rank": rank,
        "world_size": world_size,
    }
    _report(summary, json_output)
    if not tally.latents and (tally.skipped or tally.unreadable):
        raise typer.Exit(2)
    if tally.skipped or tally.unreadable:
        raise typer.Exit(1)


class _Bar:
    """Shows images; until all input shards are opened, how many there are is reckoned from those that
    were."""

    def __init__(self, bars: Any, units: int) -> None:
        self.bars, self.units = bars, units
        self.opened = self.found = 0
        self.task = bars.add_task("encoding", total=None)

    def tell(self, kind: str, images: int) -> None:
        if kind == "found":
            self.opened += 1
            self.found += images
            units = max(self.units, self.opened)
            self.bars.update(self.task, total=round(self.found / self.opened * units))
        else:
            self.bars.advance(self.task, images)


def _summary(tally: "Tally", seconds: float) -> dict[str, Any]:
    ratios = sorted(tally.ratios)
    return {
        "shards": tally.shards,
        "latents": tally.latents,
        "encoded_now": tally.encoded,
        "ratios": {str(ratio): tally.ratios[ratio] for ratio in ratios},
        "mean_tokens": tally.tokens / tally.latents if tally.latents else None,
        "skipped": len(tally.skipped),
        "skipped_samples": tally.skipped,
        "unreadable_shards": tally.unreadable,
        "seconds": round(seconds, 2),
        "images_per_second": round(tally.encoded / seconds, 2),
    }


def _report(summary: dict[str, Any], json_output: bool) -> None:
    for line in summary["unreadable_shards"]:
        console.err.print(Text(f"cannot be opened: {line}"), soft_wrap=True)
    for sample in summary["skipped_samples"][:_TOLD]:
        console.err.print(Text(f"left out: {sample['key']}: {sample['why']}"), soft_wrap=True)
    if (more := summary["skipped"] - _TOLD) > 0:
        console.err.print(f"left out: {more} more (see --json)")
    if json_output:
        print_json(summary)
        return
    mix = ", ".join(f"{count} at {ratio}x" for ratio, count in summary["ratios"].items())
    mean = f"; mean {summary['mean_tokens']:.1f} tokens" if summary["latents"] else ""
    console.out.print(
        f"{summary['latents']} latents in {summary['shards']} shards, {summary['encoded_now']} of them"
        f" encoded now ({summary['images_per_second']:.3g} images/s)",
        soft_wrap=True,
    )
    console.out.print(f"{mix}{mean}" if mix else "no latents")
    console.out.print(Text(f"Train on them with data.latents={summary['out']}"), soft_wrap=True)
