"""Tables and summaries printed by commands that encode and decode images."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from cat_fast import console

if TYPE_CHECKING:
    from cat_fast.data.ratio_origin import RatioOrigin
    from cat_fast.inference.encoding.codec import DecodedLatent, EncodedPhoto

_BY_IMAGE = {"pixels": "pixels", "jpeg size": "JPEG size"}
"""Sources of ratios of images without a description, by their names."""
MAX_TABLE_ROWS = 50
"""Maximum number of images listed in a table; --json lists all."""


def encoded_table(encoded: "list[EncodedPhoto]") -> Table:
    table = file_table("ratio", "tokens", "score")
    table.add_column("why")
    for photo in encoded[:MAX_TABLE_ROWS]:
        assert photo.choice is not None
        score = "" if photo.choice.score is None else str(photo.choice.score)
        why = shorten(photo.choice.why, 60, placeholder=" ...")
        cells = [photo.file.name, f"{photo.choice.ratio}x", str(photo.tokens), score, why]
        table.add_row(*map(Text, cells))  # Text, so that brackets in a name are not parsed as markup
    add_overflow_row(table, len(encoded))
    return table


def print_encoded_summary(encoded: "list[EncodedPhoto]", size: int, out: Path) -> None:
    from cat_fast.complexity import tokens_per_image

    choices = [photo.choice for photo in encoded if photo.choice]
    counts = Counter(choice.ratio for choice in choices)
    mix = ", ".join(f"{counts[ratio]} at {ratio}x" for ratio in sorted(counts))
    mean = sum(photo.tokens or 0 for photo in encoded) / len(encoded)
    fixed = tokens_per_image(16, size)
    console.out.print(
        f"{format_count(len(encoded))}: {mix}; mean {mean:.1f} tokens against {fixed} at a fixed 16x"
        f" ({mean / fixed - 1:+.1%})"
    )
    if by_image := Counter(choice.source for choice in choices if choice.source in _BY_IMAGE):
        (source, count), *_ = by_image.most_common()
        console.out.print(
            f"{count} without a caption: ratio from the {_BY_IMAGE[source]}, a weaker signal;"
            " provide captions with --caption, --captions or PHOTO.txt"
        )
    console.out.print(Text(f"Latents written to {out}"), soft_wrap=True)


def print_notice(origins: "Mapping[RatioOrigin, int]", ratios: Mapping[int, int], size: int) -> bool:
    """Print the notice of `spending_notice` on stderr, if there is one; return whether there is."""
    from cat_fast.complexity.ratios.spending import spending_notice

    notice = spending_notice(origins, ratios, size)
    if notice:
        console.err.print(Text(notice), soft_wrap=True)
    return notice is not None


def decoded_table(decoded: "list[DecodedLatent]") -> Table:
    table = file_table("ratio", "size")
    for latent in decoded[:MAX_TABLE_ROWS]:
        assert latent.file is not None
        cells = [latent.file.name, f"{latent.ratio}x", f"{latent.size} px"]
        table.add_row(*map(Text, cells))
    add_overflow_row(table, len(decoded))
    return table


def file_table(*columns: str) -> Table:
    """Return a table with a column of file names and columns of figures."""
    table = Table()
    table.add_column("file", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def add_overflow_row(table: Table, count: int) -> None:
    """Add the number of images beyond `MAX_TABLE_ROWS`, if there are any."""
    if count > MAX_TABLE_ROWS:
        table.add_row(Text(f"and {count - MAX_TABLE_ROWS} more (see --json)", style="dim"))


def as_row(result: "EncodedPhoto | DecodedLatent") -> dict[str, Any]:
    fields = asdict(result)
    choice = fields.pop("choice", None) or {}
    return fields | choice | {"file": str(result.file) if result.file else None}


def format_count(count: int) -> str:
    """Format a number of images, such as "1 image" or "3 images"."""
    return f"{count} image{'s' * (count != 1)}"
