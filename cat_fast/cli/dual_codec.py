"""`cat-fast dual encode` and `cat-fast dual decode`: images to codes and back."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import (
    DeviceOption,
    DtypeOption,
    FormatOption,
    JsonOption,
    LinearBackendOption,
    PhotosArgument,
    report_errors,
)
from cat_fast.cli.codec_tables import MAX_TABLE_ROWS, add_overflow_row, file_table, format_count

CheckpointOption = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        "-c",
        metavar="DIR",
        help="Folder of a dual-token tokenizer, or of a trained guide, such as runs/nano_dual_guide/model.",
        show_default=False,
    ),
]
StepsOption = Annotated[int, typer.Option(min=1, help="Steps of inversion and of denoising.")]
StrengthOption = Annotated[
    float, typer.Option(help="0 to 1: how far to invert; lower values stay closer to the guide.")
]
GuidanceOption = Annotated[float, typer.Option(help="Classifier-free guidance; 1 disables it.")]
FixedPointOption = Annotated[
    int, typer.Option(min=0, help="Fixed-point iterations per inversion step, for an exact inversion.")
]


def encode(
    photos: PhotosArgument,
    checkpoint: CheckpointOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Token file to write (JSON lines).")] = Path(
        "tokens.jsonl"
    ),
    grid: Annotated[
        str,
        typer.Option(
            metavar="SIDE|HxW|auto",
            help="Guide in tokens: 2, 4, 8 or 16 per side for 4, 16, 64 or 256 tokens, or HEIGHTxWIDTH; auto"
            " chooses one of the four per image, from its description.",
        ),
    ] = "8",
    caption: Annotated[
        str | None, typer.Option(help="Caption of all images, for --grid auto.", show_default=False)
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Captions of individual images: one {"file": ..., "caption": ...} per line.',
            show_default=False,
        ),
    ] = None,
    grid_thresholds: Annotated[
        str,
        typer.Option(
            metavar="A,B,C",
            help="For --grid auto: scores up to A get 4 tokens, up to B 16, up to C 64, above 256.",
        ),
    ] = "2,4,7",
    device: DeviceOption = "auto",
    linear_backend: LinearBackendOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Encode images to discrete tokens in one file, a line per image.

    The guide is a grid of codes; it decodes to a small image of 8 pixels per token and side. Each line has
    the codes, and `ids`, the flat sequence with special tokens for a language model.

    The complete image is resized to the grid, whatever its aspect ratio: choose a grid of a similar one, or
    stretch the decoded image back. With --grid auto, the complexity score of an image's description chooses
    4, 16, 64 or 256 tokens; it is taken from --captions, else --caption, else PHOTO.txt next to PHOTO.jpg.

    EXIF rotation is applied, colours are converted to sRGB, and transparent areas become white. Images that
    cannot be read, or that are smaller than the guide, are reported and skipped (exit code 1). After an
    interruption, the same command encodes the missing images only.

    Examples:

        cat-fast dual encode holiday/ -c DIR -o holiday.jsonl

        cat-fast dual encode wide.jpg -c DIR --grid 6x10 --json
    """
    from cat_fast.dual_token.grid import parse_grid
    from cat_fast.errors import UserError

    size = None if grid == "auto" else parse_grid(grid)
    if size is not None and (caption is not None or captions is not None):
        raise UserError("--caption and --captions: for --grid auto only; leave them out")

    from cat_fast.data.images.io import distinct_files, find_images

    files = distinct_files(find_images(photos))  # report missing files before the slow import of torch

    from cat_fast.dual_token.encoding_run import encode_files, interrupted_execution
    from cat_fast.dual_token.tokenizer import DualTokenizer
    from cat_fast.kernels.linear.op import using
    from cat_fast.models.execution import find_linear_backend

    if size is not None:
        grids: list[Any] = [size] * len(files)
    else:
        from cat_fast.dual_token.adaptive import GridThresholds, grids_of_images
        from cat_fast.inference.encoding.photo_descriptions import PhotoDescriptions, read_photo_captions

        thresholds = GridThresholds.parse(grid_thresholds)
        rows_of_file = read_photo_captions(captions) if captions else None
        described = PhotoDescriptions(caption=caption, rows=rows_of_file)
        grids = grids_of_images(described, files, thresholds)
    tokenizer = DualTokenizer.from_pretrained(checkpoint, device)
    backend = find_linear_backend(linear_backend, interrupted_execution(out), tokenizer.device)
    with using(backend), console.progress("images") as bar:
        task = bar.add_task("encoding", total=len(files))
        results = encode_files(files, out, tokenizer, grids, on_done=lambda _: bar.advance(task))
    encoded = [result.record for result in results if result.record]
    if json_output:
        rows: list[dict[str, Any]] = [
            {
                "file": str(result.file),
                "key": result.record.key if result.record else None,
                "tokens": len(result.record.tokens) if result.record else None,
                "grid": list(result.record.tokens.grid) if result.record else None,
                "error": result.error,
            }
            for result in results
        ]
        console.print_json({"out": str(out) if encoded else None, "images": rows})
    elif encoded:
        table = file_table("image", "grid", "tokens", "bits")
        for record in encoded[:MAX_TABLE_ROWS]:
            (height, width), (rows_, columns) = record.size, record.tokens.grid
            cells = [record.source, f"{width} x {height} px", f"{rows_} x {columns}"]
            cells += [str(len(record.tokens)), f"{tokenizer.vocabulary.bits(record.tokens):.0f}"]
            table.add_row(*map(Text, cells))
        add_overflow_row(table, len(encoded))
        console.out.print(table)
        line = f"{format_count(len(encoded))} encoded; tokens written to {out}"
        console.out.print(Text(line), soft_wrap=True)
    report_errors([result.error for result in results if result.error], len(results), "written")


def decode(
    tokens: Annotated[
        Path, typer.Argument(help="Token file written by `cat-fast dual encode`.", show_default=False)
    ],
    checkpoint: CheckpointOption,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Output folder for the images.", show_default=False)
    ],
    guides: Annotated[
        bool,
        typer.Option("--guides", help="Write the guides, without the diffusion model."),
    ] = False,
    renderer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR",
            help="Diffusion model: nano, a pipeline of `cat-fast pipeline`, or a Stable Diffusion folder."
            " Default: that of the tokenizer; without one, guides are written.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIDE|HxW",
            help="Size of the images in pixels, whatever the number of tokens. Default: that of the model.",
            show_default=False,
        ),
    ] = None,
    steps: StepsOption = 50,
    strength: StrengthOption = 1.0,
    guidance: GuidanceOption = 1.0,
    mode: Annotated[
        str,
        typer.Option(
            metavar="full|semantic|unconditioned|guide",
            help="full, or an ablation: codes alone, no condition, or the enlarged guide.",
        ),
    ] = "full",
    equations: Annotated[
        str,
        typer.Option(metavar="ddim|paper", help="DDIM, or the equations 9 and 10 of the paper as printed."),
    ] = "ddim",
    fixed_point: FixedPointOption = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of modes that draw noise.")] = 0,
    image_format: FormatOption = "png",
    force: Annotated[
        bool, typer.Option("--force", help="Decode even if another tokenizer encoded the images.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "fp32",
    linear_backend: LinearBackendOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Decode tokens to images, one file per image, named after the original.

    The guide is enlarged, inverted to noise without a condition, and denoised under the condition that the
    semantic codes stand for. With --guides, or for a tokenizer without a diffusion model, the images are the
    guides themselves, at 8 pixels per token and side.

    All lines are checked first: if one has codes outside the vocabulary, a wrong length, or a sequence that
    is cut, nothing is decoded. A line may also come from a language model: `{"ids": [...]}`.

    --dtype is that of the diffusion model; the guide is decoded in fp32.

    After an interruption, the same command decodes the missing images only. The result is bit-identical to an
    uninterrupted run. An image that the diffusion model cannot draw is reported and skipped (exit code 1).

    Examples:

        cat-fast dual decode holiday.jsonl -c DIR -o images --size 256

        cat-fast dual decode holiday.jsonl -c DIR -o guides --guides
    """
    from cat_fast.data.folder_settings import stored_settings
    from cat_fast.dual_token.decoding_run import PLAN, DecodingRun, Rendering
    from cat_fast.dual_token.grid import parse_sides
    from cat_fast.dual_token.rerender.rerender import RerenderSettings
    from cat_fast.dual_token.token_file import read_tokens
    from cat_fast.dual_token.tokenizer import DualTokenizer, Renderer
    from cat_fast.errors import UserError
    from cat_fast.kernels.linear.op import using
    from cat_fast.models.execution import find_dtype, find_linear_backend

    pixels = None if size is None else parse_sides(size, "--size", "pixels", "256", "192x256")
    settings = RerenderSettings(
        steps=steps,
        strength=strength,
        guidance_scale=guidance,
        fixed_point=fixed_point,
        equations=equations,
        mode=mode,
    )
    tokenizer = DualTokenizer.from_pretrained(checkpoint, device)
    tokenizer.renderer_dtype = find_dtype(dtype, tokenizer.device)
    if renderer is not None:
        tokenizer.renderer = Renderer(model=renderer)
    records = read_tokens(tokens, tokenizer.vocabulary, None if force else tokenizer.fingerprint())
    rendering = None
    if tokenizer.renderer is not None and not guides:
        rendering = Rendering(size=pixels, settings=settings, seed=seed)
    elif pixels is not None:
        raise UserError(
            f"--size {size}: guides have {tokenizer.guide.scale} pixels per token and side; leave it out, or"
            " name a diffusion model with --renderer"
        )
    recorded = stored_settings(out / PLAN).get("settings", {})
    with (
        using(find_linear_backend(linear_backend, recorded, tokenizer.device)),
        console.progress("images") as bar,
    ):
        run = DecodingRun(records, out, tokenizer, image_format, rendering)
        task = bar.add_task("decoding", total=len(records), completed=run.count_done())
        results = run.decode(lambda count: bar.advance(task, count))
    decoded = [result for result in results if result.file]
    if json_output:
        rows = [
            {
                "key": result.key,
                "file": str(result.file) if result.file else None,
                "grid": list(record.tokens.grid),
                "error": result.error,
            }
            for record, result in zip(records, results, strict=True)
        ]
        console.print_json({"out": str(out), "images": rows})
    elif decoded:
        console.out.print(Text(f"{format_count(len(decoded))} in {out}"), soft_wrap=True)
    report_errors([result.error for result in results if result.error], len(results), "decoded")
