"""`cat-fast dual generate`: captions to images, through a language model over tokens."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import DeviceOption, DtypeOption, JsonOption, LinearBackendOption, report_errors
from cat_fast.cli.codec_tables import format_count
from cat_fast.cli.dual_codec import CheckpointOption, GuidanceOption, StepsOption, StrengthOption
from cat_fast.errors import UserError

_MAX_IN_SHEET = 100


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
    steps: StepsOption = 50,
    strength: StrengthOption = 1.0,
    guidance: GuidanceOption = 1.0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "fp32",
    linear_backend: LinearBackendOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Generate images from captions: a language model writes tokens, the tokenizer decodes them.

    Only tokens that keep the sequence valid are sampled, so that every sequence decodes. tokens.jsonl holds
    the sequences, sheet.png the first hundred images with their captions.

    --dtype is that of the diffusion model; tokens are sampled in fp32.

    After an interruption, the same command continues. The result is bit-identical to an uninterrupted run.
    A caption that cannot be drawn is reported and skipped (exit code 1).

    Example:

        cat-fast dual generate -m runs/nano_dual_language/model -c DIR -o images --prompt "red apple"
    """
    from cat_fast.dual_token.grid import parse_grid

    chosen = None if grids is None else [parse_grid(part, "--grids") for part in grids.split(",")]
    if not prompt and prompts is None:
        raise UserError("no captions: give --prompt or --prompts")

    from cat_fast.data.files import atomic_write
    from cat_fast.data.folder_settings import stored_settings
    from cat_fast.data.images.contact_sheet import Cell, contact_sheet
    from cat_fast.data.images.io import load_image
    from cat_fast.dual_token.decoding_run import DecodingRun, Rendering
    from cat_fast.dual_token.language.generate import PLAN, GenerationRun, SamplingSettings, read_captions
    from cat_fast.dual_token.language.model import DualLanguageModel
    from cat_fast.dual_token.rerender.rerender import RerenderSettings
    from cat_fast.dual_token.semantic.text_target import open_text_target
    from cat_fast.dual_token.tokenizer import DualTokenizer
    from cat_fast.kernels.linear.op import using
    from cat_fast.models.execution import find_dtype, find_linear_backend
    from cat_fast.models.load import load_model

    captions = [*(prompt or ()), *(read_captions(prompts) if prompts else ())]
    sampling = SamplingSettings(grids=chosen, temperature=temperature, top_k=top_k, seed=seed)
    settings = RerenderSettings(steps=steps, strength=strength, guidance_scale=guidance)
    tokenizer = DualTokenizer.from_pretrained(checkpoint, device)
    tokenizer.renderer_dtype = find_dtype(dtype, tokenizer.device)
    model = load_model(DualLanguageModel, "language model", language_model, device)
    target = open_text_target(text_encoder, max_states)
    rendering = None
    if tokenizer.renderer is not None and not guides:
        rendering = Rendering(settings=settings, seed=seed)
    recorded = stored_settings(out / PLAN).get("settings", {})
    with (
        using(find_linear_backend(linear_backend, recorded, tokenizer.device)),
        console.progress("images") as bar,
    ):
        writing = GenerationRun(model, tokenizer, target, captions, sampling, out)
        task = bar.add_task("writing tokens", total=len(captions), completed=writing.count_done())
        generated = writing.generate(lambda: bar.advance(task))
        records = [result.record for result in generated if result.record]
        decoding = DecodingRun(records, out, tokenizer, rendering=rendering)
        task = bar.add_task("decoding", total=len(records), completed=decoding.count_done())
        decoded = {one.key: one for one in decoding.decode(lambda count: bar.advance(task, count))}
    cells = [
        Cell(partial(load_image, file), [record.source])
        for record in records
        if (file := decoded[record.key].file)
    ][:_MAX_IN_SHEET]
    if cells:
        columns = min(8, len(cells))
        rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
        with atomic_write(out / "sheet.png") as part:
            contact_sheet(rows).save(part, format="PNG")
    found = []
    for result in generated:
        image = decoded[result.record.key] if result.record else None
        found.append(
            {
                "caption": result.caption,
                "file": str(image.file) if image and image.file else None,
                "tokens": len(result.record.tokens) if result.record else None,
                "error": image.error if image else result.error,
            }
        )
    count = sum(row["error"] is None for row in found)
    if json_output:
        console.print_json({"images": found})
    elif count:
        console.out.print(Text(f"{format_count(count)} in {out}"), soft_wrap=True)
    report_errors([str(row["error"]) for row in found if row["error"]], len(found), "written")
