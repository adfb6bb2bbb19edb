"""`cat-fast encode` and `cat-fast decode`: photographs to latents and back."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperCommand

from cat_fast import console
from cat_fast.cli.codec_tables import (
    as_row,
    decoded_table,
    encoded_table,
    images,
    print_encoded_summary,
    print_json,
)
from cat_fast.errors import UserError

CheckpointOption = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        "-c",
        metavar="DIR",
        help="Folder of a trained tokenizer; `cat-fast demo` leaves one in runs/demo/pipeline/vae.",
        show_default=False,
    ),
]
RatioOption = Annotated[str, typer.Option(metavar="8|16|32|auto", help="Compression ratio of every image.")]
SizeOption = Annotated[
    int, typer.Option(help="Side in pixels to scale to, a multiple of 64, such as 256 or 512.")
]
ThresholdsOption = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Scores up to A get 32x, above B 8x, between them 16x. Default: the pair fitted to the scorer.",
        show_default=False,
    ),
]
BatchSizeOption = Annotated[
    int, typer.Option(min=1, help="Images a forward pass; lower it when memory runs out.")
]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")]


class EncodeCommand(TyperCommand):
    """Refuses `--shards`, the former spelling of `encode-shards`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--shards" in args:
            rest = shlex.join(arg for arg in args if arg != "--shards")
            raise UserError(f"encode --shards is now a command of its own: cat-fast encode-shards {rest}")
        return super().parse_args(ctx, args)


def encode(
    photos: Annotated[
        list[str],
        typer.Argument(
            metavar="PHOTO...",
            help="JPEG, PNG or WebP files, or folders.",
            show_default=False,
        ),
    ],
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="File of latents to write.")] = Path(
        "latents.safetensors"
    ),
    ratio: RatioOption = "auto",
    size: SizeOption = 256,
    caption: Annotated[
        str | None, typer.Option(help="What is in the images, for all of them.", show_default=False)
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='What is in each: a line each of {"file": ..., "caption": ...}, with "has_text" and'
            ' "has_faces" where they differ from the flags.',
            show_default=False,
        ),
    ] = None,
    has_text: Annotated[bool, typer.Option("--has-text", help="The captioned images show text.")] = False,
    has_faces: Annotated[bool, typer.Option("--has-faces", help="The captioned images show faces.")] = False,
    thresholds: ThresholdsOption = None,
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Encode photographs as latents: simple images at 32x, busy ones at 8x.

    With --ratio auto a caption decides: from --captions, else --caption, else PHOTO.txt beside PHOTO.jpg. An
    image without one is judged by its size as a JPEG, and the output says so.

    The short side is scaled to --size and the long one cropped about the middle, after EXIF rotation; colour
    profiles become sRGB, transparency white.

    An image that cannot be read is reported and the others are written all the same (exit code 1).

    `cat-fast encode-shards` makes latents to train a generator on.

    Examples:

        cat-fast encode holiday/ -c DIR -o holiday.safetensors

        cat-fast encode page.png -c DIR --caption "a newspaper page" --has-text --size 512

        cat-fast encode *.jpg -c DIR --ratio 16 --json
    """
    fixed = parse_ratio(ratio)

    from cat_fast.data.images.io import find_images

    files = find_images(photos)  # what is wrong with them is known before torch is there

    from cat_fast.complexity import RatioThresholds
    from cat_fast.complexity.ratio_policy import RatioPolicy
    from cat_fast.inference.encoding.codec import encode_files, require_served
    from cat_fast.inference.encoding.photo_descriptions import PhotoDescriptions, read_photo_captions
    from cat_fast.models.load import load_tokenizer

    rows = read_photo_captions(captions, has_text=has_text, has_faces=has_faces) if captions else {}
    said = PhotoDescriptions(caption=caption, rows=rows, has_text=has_text, has_faces=has_faces)
    borders = RatioThresholds.parse(thresholds) if thresholds is not None else None
    tokenizer = load_tokenizer(checkpoint, device)
    require_served(fixed, tokenizer.config["ratios"])
    with console.progress("images") as bar:
        task = bar.add_task("encoding", total=len(files))
        results = encode_files(
            files,
            out,
            tokenizer=tokenizer,
            policy=RatioPolicy(("caption",), borders, fixed=fixed),
            descriptions=said,
            size=size,
            batch_size=batch_size,
            on_done=lambda _: bar.advance(task),
        )
    encoded = [result for result in results if result.choice]
    if json_output:
        print_json({"out": str(out) if encoded else None, "size": size, "images": list(map(as_row, results))})
    elif encoded:
        console.out.print(encoded_table(encoded))
        print_encoded_summary(encoded, size, out)
    _end([result.error for result in results if result.error], len(results), "written")


def decode(
    latents: Annotated[Path, typer.Argument(help="File that `cat-fast encode` wrote.", show_default=False)],
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the images.", show_default=False)],
    image_format: Annotated[
        str, typer.Option("--format", metavar="png|jpg|webp", help="Image format.")
    ] = "png",
    force: Annotated[bool, typer.Option("--force", help="Decode latents of another tokenizer too.")] = False,
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Decode latents to images, one file each, named after the photograph.

    The checkpoint must be the one that encoded them: the file of latents knows its fingerprint.

    Examples:

        cat-fast decode holiday.safetensors -c DIR -o holiday-decoded

        cat-fast decode holiday.safetensors -c DIR -o out --format webp
    """
    from cat_fast.inference.encoding.codec import decode_file
    from cat_fast.inference.encoding.latent_file import LatentFile
    from cat_fast.models.load import load_tokenizer

    count = len(LatentFile.open(latents).records)
    tokenizer = load_tokenizer(checkpoint, device)
    with console.progress("images") as bar:
        task = bar.add_task("decoding", total=count)
        results = decode_file(
            latents,
            out,
            tokenizer=tokenizer,
            image_format=image_format,
            force=force,
            batch_size=batch_size,
            on_done=lambda _: bar.advance(task),
        )
    decoded = [result for result in results if result.file]
    if json_output:
        print_json({"out": str(out), "images": list(map(as_row, results))})
    elif decoded:
        console.out.print(decoded_table(decoded))
        console.out.print(Text(f"{images(len(decoded))} in {out}"), soft_wrap=True)
    _end([result.error for result in results if result.error], len(results), "decoded")


def parse_ratio(text: str) -> int | None:
    """8, 16 or 32; None for "auto"."""
    if text == "auto":
        return None
    if text in ("8", "16", "32"):
        return int(text)
    raise UserError(f"--ratio {text}: expected 8, 16, 32 or auto")


def _end(errors: list[str], count: int, done: str) -> None:
    """Reports what failed; exit code 1 where something else succeeded, 2 where nothing did."""
    for error in errors:
        console.print_error(error)
    if not errors:
        return
    if len(errors) < count:
        console.err.print(f"{len(errors)} of {images(count)} failed; the others are {done}")
        raise typer.Exit(1)
    raise typer.Exit(2)
