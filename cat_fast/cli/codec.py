"""`cat-fast encode` and `cat-fast decode`: images to latents and back."""

import shlex
from collections import Counter
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
    format_count,
    print_encoded_summary,
    print_notice,
)
from cat_fast.errors import UserError

_MAX_LISTED = 10
"""Maximum number of names in a message."""

PhotosArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="PHOTO...", help="JPEG, PNG or WebP files, or folders of them.", show_default=False
    ),
]
CheckpointOption = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        "-c",
        metavar="DIR|FILE",
        help="Trained tokenizer: its folder, nano for the one that ships with the package, the folder of a"
        " diffusers AutoencoderKL, or an LDM checkpoint (.ckpt, .safetensors, .pt).",
        show_default=False,
    ),
]
RatioOption = Annotated[
    str,
    typer.Option(metavar="8|16|32|auto", help="Compression ratio; auto chooses one per image."),
]
SizeOption = Annotated[
    int, typer.Option(help="Side of the encoded square in pixels: a multiple of 64, such as 256 or 512.")
]
ThresholdsOption = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Scores up to A get 32x, above B 8x, between them 16x. Default: the published 4,7.",
        show_default=False,
    ),
]
JpegThresholdsOption = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="For images without a description: JPEG sizes in bytes, up to A 32x, above B 8x, instead of the"
        " score by their pixels. The published pair is 38761,65837.",
        show_default=False,
    ),
]
BatchSizeOption = Annotated[
    int, typer.Option(min=1, help="Images per forward pass; lower it if you run out of memory.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto uses a GPU if available.")]
DtypeOption = Annotated[
    str,
    typer.Option(
        metavar="auto|fp32|bf16|fp16",
        help="Number format of the models; auto is bf16 on GPUs that multiply in it, else fp32.",
    ),
]
TierOption = Annotated[
    str,
    typer.Option(
        metavar="exact|fast",
        help="fast compiles the decoder, which pays for many images; they agree with exact's to 60 dB or"
        " more. The tier in use is recorded with the results.",
    ),
]
FormatOption = Annotated[
    str,
    typer.Option("--format", metavar="png|jpg|webp", help="Image format; jpg and webp have quality 95."),
]
LinearBackendOption = Annotated[
    str,
    typer.Option(
        metavar="auto|mkl|onednn",
        help="Library of fp32 matrix products on CPUs, recorded with the results; auto takes the faster one.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")]


class EncodeCommand(TyperCommand):
    """The `encode` command; rejects `--shards`, the former spelling of `encode-shards`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--shards" in args:
            rest = shlex.join(arg for arg in args if arg != "--shards")
            raise UserError(f"encode --shards is now a command of its own: cat-fast encode-shards {rest}")
        return super().parse_args(ctx, args)


def encode(
    photos: PhotosArgument,
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Latent file to write (safetensors).")] = Path(
        "latents.safetensors"
    ),
    ratio: RatioOption = "auto",
    size: SizeOption = 256,
    caption: Annotated[str | None, typer.Option(help="Caption of all images.", show_default=False)] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Captions of individual images: one {"file": ..., "caption": ...} per line, optionally with'
            ' "has_text" and "has_faces" to override the flags. Paths are relative to this file.',
            show_default=False,
        ),
    ] = None,
    has_text: Annotated[
        bool | None,
        typer.Option(
            "--has-text/--no-text",
            help="The captioned images contain text or numbers, or do not. Default: inferred from each"
            " caption.",
            show_default=False,
        ),
    ] = None,
    has_faces: Annotated[
        bool | None,
        typer.Option(
            "--has-faces/--no-faces",
            help="The captioned images contain faces, or do not. Default: inferred from each caption.",
            show_default=False,
        ),
    ] = None,
    thresholds: ThresholdsOption = None,
    jpeg_thresholds: JpegThresholdsOption = None,
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Encode images to latents in one file: simple images at 32x, complex ones at 8x.

    With --ratio auto, the caption determines the ratio. It is taken from --captions, else --caption, else
    PHOTO.txt next to PHOTO.jpg. For an image without a caption the ratio follows from a score of its pixels,
    and the summary reports the number of such images.

    The centre square of each image is scaled to --size. EXIF rotation is applied, colours are converted to
    sRGB, and transparent areas become white.

    Images that cannot be read are reported and skipped (exit code 1).

    To encode a large set for training, use `cat-fast encode-shards`.

    Examples:

        cat-fast encode holiday/ -c DIR -o holiday.safetensors

        cat-fast encode page.png -c DIR --caption "a newspaper page" --has-text --size 512

        cat-fast encode *.jpg -c DIR --ratio 16 --json
    """
    fixed = parse_ratio(ratio)

    from cat_fast.data.images.io import distinct_files, find_images

    files = distinct_files(find_images(photos))  # report missing files before the slow import of torch

    from cat_fast.complexity import JpegThresholds, RatioThresholds
    from cat_fast.complexity.image_scorers.loading import by_pixels
    from cat_fast.complexity.ratios.policy import RatioPolicy
    from cat_fast.inference.encoding.codec import encode_files
    from cat_fast.inference.encoding.photo_descriptions import PhotoDescriptions, read_photo_captions
    from cat_fast.inference.encoding.requirements import require_served
    from cat_fast.models.device import find_device
    from cat_fast.models.execution import find_dtype
    from cat_fast.models.load import load_tokenizer

    rows = read_photo_captions(captions, has_text=has_text, has_faces=has_faces) if captions else None
    descriptions = PhotoDescriptions(caption=caption, rows=rows, has_text=has_text, has_faces=has_faces)
    pair = RatioThresholds.parse(thresholds) if thresholds is not None else None
    sizes = JpegThresholds.parse(jpeg_thresholds) if jpeg_thresholds is not None else None
    tokenizer = load_tokenizer(checkpoint, device, find_dtype(dtype, find_device(device)))
    require_served(fixed, tokenizer.config["ratios"])
    with console.progress("images") as bar:
        task = bar.add_task("encoding", total=len(files))
        results = encode_files(
            files,
            out,
            tokenizer=tokenizer,
            policy=RatioPolicy(("caption",), pair, fixed=fixed, **by_pixels(sizes)),
            descriptions=descriptions,
            size=size,
            batch_size=batch_size,
            on_done=lambda _: bar.advance(task),
        )
    encoded = [result for result in results if result.choice]
    choices = [result.choice for result in results if result.choice]
    print_notice(
        Counter(choice.origin for choice in choices), Counter(choice.ratio for choice in choices), size
    )
    unmatched = rows.unmatched(files) if rows else []
    if json_output:
        console.print_json(
            {
                "out": str(out) if encoded else None,
                "size": size,
                "images": list(map(as_row, results)),
                "unmatched_captions": unmatched,
            }
        )
    elif encoded:
        console.out.print(encoded_table(encoded))
        print_encoded_summary(encoded, size, out)
    if unmatched:
        names = ", ".join(unmatched[:_MAX_LISTED]) + (", ..." if len(unmatched) > _MAX_LISTED else "")
        line = f"{captions}: {len(unmatched)} of its rows match no image: {names}"
        console.err.print(Text(line), soft_wrap=True)
    report_errors([result.error for result in results if result.error], len(results), "written")


def decode(
    latents: Annotated[
        Path, typer.Argument(help="Latent file written by `cat-fast encode`.", show_default=False)
    ],
    checkpoint: CheckpointOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Output folder for the images.", show_default=False)
    ],
    image_format: FormatOption = "png",
    force: Annotated[
        bool, typer.Option("--force", help="Decode even if another tokenizer encoded the latents.")
    ] = False,
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    tier: TierOption = "exact",
    json_output: JsonOption = False,
) -> None:
    """Decode latents to images, one file per image, named after the original.

    The checkpoint must be the one that encoded the latents; the latent file stores its fingerprint.

    Examples:

        cat-fast decode holiday.safetensors -c DIR -o holiday-decoded

        cat-fast decode holiday.safetensors -c DIR -o out --format webp
    """
    from cat_fast.inference.encoding.codec import decode_file
    from cat_fast.inference.encoding.latent_file import LatentFile
    from cat_fast.models.decode_tier import check_tier, use_decode_tier
    from cat_fast.models.device import find_device
    from cat_fast.models.execution import find_dtype
    from cat_fast.models.load import load_tokenizer

    check_tier(tier)
    records = LatentFile.open(latents).records
    tokenizer = load_tokenizer(checkpoint, device, find_dtype(dtype, find_device(device)))
    use_decode_tier(tokenizer, tier, max((record.size for record in records.values()), default=None))
    with console.progress("images") as bar:
        task = bar.add_task("decoding", total=len(records))
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
        console.print_json({"out": str(out), "images": list(map(as_row, results))})
    elif decoded:
        console.out.print(decoded_table(decoded))
        console.out.print(Text(f"{format_count(len(decoded))} in {out}"), soft_wrap=True)
    report_errors([result.error for result in results if result.error], len(results), "decoded")


def parse_ratio(text: str) -> int | None:
    """Parse a ratio option: 8, 16 or 32, or None for "auto"."""
    if text == "auto":
        return None
    if text in ("8", "16", "32"):
        return int(text)
    raise UserError(f"--ratio {text}: expected 8, 16, 32 or auto")


def report_errors(errors: list[str], count: int, done: str) -> None:
    """Print errors and exit: with code 1 if other images succeeded, 2 if none did."""
    for error in errors:
        console.print_error(error)
    if not errors:
        return
    if len(errors) < count:
        console.err.print(f"{len(errors)} of {format_count(count)} failed; the others were {done}")
        raise typer.Exit(1)
    raise typer.Exit(2)
