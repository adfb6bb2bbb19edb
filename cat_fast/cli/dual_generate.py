"""`cat-fast dual generate`: captions to images, through a language model over tokens."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import DeviceOption, JsonOption
from cat_fast.cli.codec_tables import format_count
from cat_fast.cli.dual_codec import CheckpointOption
from cat_fast.errors import UserError


def generate(
    language_model: Annotated[
        Path,
        typer.Option(
            "--language-model", "-m", metavar="DIR", help="Trained language model.", show_default=False
        ),
    ],
    checkpoint: CheckpointOption,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for tokens.jsonl and the images.", show_default=False),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Caption; may be repeated.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Captions, one per line, or .jsonl with a caption each.", show_default=False
        ),
    ] = None,
    grids: Annotated[
        str | None,
        typer.Option(
            metavar="SIDE|HxW,...", help="Guide sizes to choose from. Default: all.", show_default=False
        ),
    ] = None,
    text_encoder: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="Encoder of the captions, that of the training.")
    ] = "nano",
    max_states: Annotated[
        int, typer.Option(min=1, help="Maximum number of text states, that of the training.")
    ] = 24,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of the distribution of tokens; 0 takes the most probable.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Number of most probable tokens to sample from; 0 takes all.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; the next has the next.")] = 0,
    guides: Annotated[bool, typer.Option("--guides", help="Write the guides only.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of inversion and of denoising.")] = 50,
    strength: Annotated[float, typer.Option(help="0 to 1: how far to invert.")] = 1.0,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 disables it.")] = 1.0,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Generate images from captions: a language model writes tokens, the tokenizer decodes them.

    Only tokens that keep the sequence valid are sampled, so that every sequence decodes. tokens.jsonl holds
    the sequences, sheet.png all images with their captions.

    Example:

        cat-fast dual generate -m runs/nano_dual_language/model -c DIR -o images --prompt "red apple"
    """
    from cat_fast.dual_token.grid import parse_grid

    chosen = None if grids is None else [parse_grid(part, "--grids") for part in grids.split(",")]
    if not prompt and prompts is None:
        raise UserError("no captions: give --prompt or --prompts")

    from cat_fast.data.files import atomic_write, require_writable
    from cat_fast.data.images.contact_sheet import Cell, contact_sheet
    from cat_fast.data.images.io import load_image
    from cat_fast.dual_token.codec import decode_guides, decode_images
    from cat_fast.dual_token.language.generate import check_fit, generate_records, read_captions
    from cat_fast.dual_token.language.model import DualLanguageModel
    from cat_fast.dual_token.rerender.rerender import RerenderSettings
    from cat_fast.dual_token.semantic.text_target import open_text_target
    from cat_fast.dual_token.token_file import write_tokens
    from cat_fast.dual_token.tokenizer import DualTokenizer
    from cat_fast.models.load import load_model

    captions = [*(prompt or ()), *(read_captions(prompts) if prompts else ())]
    settings = RerenderSettings(steps=steps, strength=strength, guidance_scale=guidance)
    tokenizer = DualTokenizer.from_pretrained(checkpoint, device)
    model = load_model(DualLanguageModel, "language model", language_model, device)
    target = open_text_target(text_encoder, max_states)
    check_fit(model, tokenizer, target)
    require_writable(out / "tokens.jsonl")
    with console.progress("images") as bar:
        task = bar.add_task("writing tokens", total=len(captions))
        records = []
        for record in generate_records(
            model,
            tokenizer,
            target,
            captions,
            seed=seed,
            grids=chosen,
            temperature=temperature,
            top_k=top_k,
        ):
            records.append(record)
            bar.advance(task)
        write_tokens(out / "tokens.jsonl", records, tokenizer.vocabulary)
        task = bar.add_task("decoding", total=len(records))
        if guides or tokenizer.renderer is None:
            files = decode_guides(records, out, tokenizer, on_done=lambda _: bar.advance(task))
        else:
            files = decode_images(
                records, out, tokenizer, settings=settings, seed=seed, on_done=lambda _: bar.advance(task)
            )
    cells = [
        Cell(partial(load_image, file), [record.source]) for file, record in zip(files, records, strict=True)
    ]
    columns = min(8, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    with atomic_write(out / "sheet.png") as part:
        contact_sheet(rows, title=f"{len(cells)} images").save(part, format="PNG")
    if json_output:
        console.print_json(
            {
                "images": [
                    {"caption": record.source, "file": str(file), "tokens": len(record.tokens)}
                    for file, record in zip(files, records, strict=True)
                ]
            }
        )
    else:
        console.out.print(Text(f"{format_count(len(files))} in {out}"), soft_wrap=True)
