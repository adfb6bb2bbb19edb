"""`cat-fast pipeline`: combine trained models into one folder for `cat-fast sample`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cat_fast import console
from cat_fast.cli.labels import parse_labels, read_classes
from cat_fast.errors import UserError


def pipeline(
    tokenizer: Annotated[
        Path,
        typer.Option(
            "--tokenizer",
            "-t",
            metavar="DIR|FILE",
            help="Trained tokenizer: model/ of its run, or another that `encode` takes.",
            show_default=False,
        ),
    ],
    generator: Annotated[
        Path,
        typer.Option(
            "--generator",
            "-g",
            metavar="DIR",
            help="Trained generator: model/ of its run, with its scheduler/.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Output folder; overwritten if it exists.",
            show_default=False,
        ),
    ],
    latents: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Latents that the generator was trained on; they record classes, resolution and thresholds.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Class names, one per line; class 0 first. Default: those of --latents.",
            show_default=False,
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side of the images in pixels. Default: that of --latents.", show_default=False
        ),
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Scores up to A get 32x, above B 8x, between them 16x. Default: those of --latents, or"
            " the published 4,7.",
            show_default=False,
        ),
    ] = None,
    text_classes: Annotated[
        list[str] | None,
        typer.Option(
            help="Classes that show text and get more tokens: names or numbers, separated by commas.",
            show_default=False,
        ),
    ] = None,
    face_classes: Annotated[
        list[str] | None, typer.Option(help="Classes that show faces, likewise.", show_default=False)
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Text encoder of a generator with text, `text_encoder` of its run: a name on the Hugging"
            " Face hub, or a folder.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|fp32|bf16|fp16",
            help="Number format of the generator's stored weights; auto keeps that of training. The tokenizer"
            " keeps its own, which identifies it.",
        ),
    ] = "auto",
) -> None:
    """Combine a trained tokenizer and a trained generator into a folder for `cat-fast sample`.

    The generator must have been trained on latents of this tokenizer, with one class per name. --latents
    gives the class names, resolution and thresholds; without it, give --labels and --resolution.

    The folder has diffusers' layout: model_index.json, vae/, transformer/, scheduler/.

    Examples:

        cat-fast pipeline -t runs/tokenizer/model -g runs/generator/model --latents latents --out pipeline

        cat-fast pipeline -t DIR -g DIR --labels names.txt --resolution 512 --text-classes "menu,comic book"
        --out pipeline

        cat-fast sample --pipeline pipeline --count 50000 --npz --out fid
    """
    if latents is None and labels is None:
        raise UserError(
            "--latents or --labels is missing: one of them has to name the classes of the generator"
        )
    if latents is None and resolution is None:
        raise UserError(
            "--resolution is missing: without --latents, give the side in pixels that it was trained at"
        )
    names = read_classes(labels) if labels else None

    from cat_fast.complexity import RatioThresholds
    from cat_fast.inference.pipeline.assembly import assemble, read_latent_facts
    from cat_fast.models.execution import find_dtype
    from cat_fast.models.load import load_tokenizer

    pair = RatioThresholds.parse(thresholds) if thresholds is not None else None
    facts = read_latent_facts(latents) if latents else None
    model = load_tokenizer(tokenizer, "cpu")
    if facts is not None:
        if facts.fingerprint != model.latents_fingerprint():
            raise UserError(
                f"{latents} holds latents of tokenizer {facts.fingerprint}, {tokenizer} is "
                f"{model.latents_fingerprint()}; give the tokenizer that encoded them"
            )
        names = names or facts.class_names
        resolution = resolution or facts.resolution
        pair = pair or facts.thresholds
    assert names is not None
    assert resolution is not None
    made = assemble(
        model,
        generator,
        names,
        resolution=resolution,
        thresholds=pair,
        text_classes=_names(text_classes, names, "--text-classes"),
        face_classes=_names(face_classes, names, "--face-classes"),
        text_encoder=text_encoder,
    )
    if dtype != "auto":
        made.transformer.to(find_dtype(dtype, made.device))
    made.save_pretrained(out)
    console.out.print(
        f"{len(names)} classes at {resolution} px, thresholds {made.thresholds}",
        soft_wrap=True,
    )
    console.out.print(Text(f"Draw with cat-fast sample --pipeline {out} --out DIR"), soft_wrap=True)


def _names(given: list[str] | None, known: list[str], option: str) -> list[str]:
    """Return the names of classes given by name or number."""
    labels = parse_labels(given, known, option) if given else []
    return [known[label] if isinstance(label, int) and label < len(known) else str(label) for label in labels]
