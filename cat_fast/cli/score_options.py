"""Options of `cat-fast score` that choose and configure scorer and captioner."""

from pathlib import Path
from typing import Annotated

import typer

_SCORERS, CAPTIONERS_PANEL = "Scorer", "Captioner of images"

ScorerOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Captions: accurate (default) and fast are distilled models on the CPU, without a download; llm"
        " is a language model by transformers, endpoint one behind an OpenAI-compatible URL, gguf one in"
        " llama.cpp; length is the number of words. Images: image_student (default without"
        " captions) scores pixels, jpeg the size as a JPEG; unified describes and scores with the captioner's"
        " model in one call.",
        show_default=False,
        rich_help_panel=_SCORERS,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Language model: a name or folder (llm), the name at the endpoint, or a GGUF file (gguf).",
        show_default=False,
        rich_help_panel=_SCORERS,
    ),
]
BaseUrlOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="URL of the endpoint, or of a llama.cpp server, such as http://localhost:8000/v1.",
        show_default=False,
        rich_help_panel=_SCORERS,
    ),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Environment variable with the key of the endpoint. The key is neither stored nor printed.",
        show_default=False,
        rich_help_panel=_SCORERS,
    ),
]
PromptFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Prompt of the language model instead of the rubric.",
        show_default=False,
        rich_help_panel=_SCORERS,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="Device of llm and vlm: cpu, cuda, cuda:1, ...; auto uses a GPU if available.",
        rich_help_panel=_SCORERS,
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Captions per forward pass (llm), or concurrent requests (endpoint, gguf).",
        show_default=False,
        rich_help_panel=_SCORERS,
    ),
]
EscalateOption = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="Have the language model score only captions of which the distilled scorer is less sure than"
        " this probability, such as 0.6.",
        show_default=False,
        rich_help_panel=_SCORERS,
    ),
]
EscalateToOption = Annotated[
    str | None,
    typer.Option(
        metavar="llm|endpoint|gguf",
        help="Language model for --escalate, described by --model and the other options. Default: llm.",
        show_default=False,
        rich_help_panel=_SCORERS,
    ),
]
JpegThresholdsOption = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="With --scorer jpeg: sizes up to A bytes get 32x, above B 8x. Default: the published"
        " 38761,65837.",
        show_default=False,
        rich_help_panel=_SCORERS,
    ),
]
CaptionerOption = Annotated[
    str | None,
    typer.Option(
        metavar="detectors|vlm|endpoint",
        help="Describe images before they are scored. detectors finds text and faces, for images that have"
        " captions or classes; vlm is a vision-language model by transformers, endpoint one behind an"
        " OpenAI-compatible URL: both also write captions where there are none.",
        show_default=False,
        rich_help_panel=CAPTIONERS_PANEL,
    ),
]
CaptionerModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Vision-language model: a name or folder (vlm), or the name at the endpoint.",
        show_default=False,
        rich_help_panel=CAPTIONERS_PANEL,
    ),
]
CaptionerUrlOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="URL of the endpoint, such as http://localhost:8000/v1.",
        show_default=False,
        rich_help_panel=CAPTIONERS_PANEL,
    ),
]
CaptionerTemplateOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Prompt of a model without a chat template (vlm), such as `USER: <image> {prompt} ASSISTANT:`.",
        show_default=False,
        rich_help_panel=CAPTIONERS_PANEL,
    ),
]
CaptionerBatchSizeOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images per forward pass (vlm), or concurrent requests (endpoint).",
        show_default=False,
        rich_help_panel=CAPTIONERS_PANEL,
    ),
]
QuestionsOption = Annotated[
    str | None,
    typer.Option(
        metavar="short|long|FILE",
        help="Caption in one sentence (default) or in detail, or a JSON file of prompts and questions.",
        show_default=False,
        rich_help_panel=CAPTIONERS_PANEL,
    ),
]
