"""`cat-fast encode --shards`: a set of any size becomes latents to train a generator on."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec_tables import print_json
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.inference.encoding.shard_plan import Tally

_TOLD = 10


def encode_shards(
    source: str,
    out: Path,
    *,
    checkpoint: Path,
    ratio: int | None,
    size: int,
    thresholds: str | None,
    shard_format: str,
    per_shard: int,
    classes: Path | None,
    batch_size: int,
    device: str,
    workers: int,
    rank: int,
    world_size: int,
    json_output: bool,
) -> None:
    """What `cat_fast.cli.codec.encode` does with --shards; the arguments are its options."""
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
        source=source,
        out=out,
        size=size,
        ratio=ratio,
        thresholds=RatioThresholds.parse(thresholds) if thresholds is not None else None,
        per_shard=per_shard,
        batch_size=batch_size,
        format=shard_format,
    )
    find_device(device)  # what is wrong with it is known before processes are started
    tokenizer = load_tokenizer(checkpoint, "cpu" if workers > 1 else device)
    input_shards, names = prepare(settings, tokenizer, names)
    units = units_of(rank, world_size, workers, input_shards)
    tally, begun = Tally(), time.perf_counter()
    with console.progress("pictures") as bars:
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
    """Shows pictures; until all input shards are opened, how many there are is reckoned from those that
    were."""

    def __init__(self, bars: Any, units: int) -> None:
        self.bars, self.units = bars, units
        self.opened = self.found = 0
        self.task = bars.add_task("encoding", total=None)

    def tell(self, kind: str, pictures: int) -> None:
        if kind == "found":
            self.opened += 1
            self.found += pictures
            units = max(self.units, self.opened)
            self.bars.update(self.task, total=round(self.found / self.opened * units))
        else:
            self.bars.advance(self.task, pictures)


def read_classes(path: Path) -> list[str]:
    """Names of classes, one a line; UserError where there are none, or one comes twice."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected a name of a class on each line"
        ) from error
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: expected names of classes, one a line and each once")
    return names


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
        f" encoded now ({summary['images_per_second']:.3g} pictures/s)",
        soft_wrap=True,
    )
    console.out.print(f"{mix}{mean}" if mix else "no latents")
    console.out.print(Text(f"Train on them with data.latents={summary['out']}"), soft_wrap=True)
