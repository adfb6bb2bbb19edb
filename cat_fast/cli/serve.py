"""`cat-fast serve`: a pipeline behind HTTP, with a page to try it."""

from pathlib import Path
from typing import Annotated

import typer

from cat_fast.cli.codec import DtypeOption, LinearBackendOption, TierOption
from cat_fast.cli.score_options import (
    CAPTIONERS_PANEL,
    CaptionerModelOption,
    CaptionerOption,
    CaptionerTemplateOption,
    CaptionerUrlOption,
    QuestionsOption,
)
from cat_fast.errors import UserError

_NEEDED = {
    "fastapi": "fastapi",
    "fastapi_offline": "fastapi-offline",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
}
"""Packages by the module that they install."""
_CAPTIONER_SECONDS = 20.0
"""For an answer of the captioner's endpoint: a client is waiting."""


def serve(
    pipeline: Annotated[
        str,
        typer.Option(
            "--pipeline", "-p", metavar="DIR|nano", help="Folder that `cat-fast pipeline` wrote, or nano."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free port.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with a bearer token that requests must carry.", show_default=False),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on other addresses than loopback without a token.")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens per step; lower it if you run out of memory.")
    ] = 4096,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Unfinished images; further requests are refused.")
    ] = 256,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="Limit per client; 0 for no limit.")] = 1200,
    coarser_after: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds of waiting per point of complexity after which images with allow_coarser get fewer"
            " tokens.",
            show_default=False,
        ),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, help="Time to finish images after SIGTERM.")
    ] = 60.0,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads. Default: as many as cores.", show_default=False),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes the first GPU, else the CPU.")
    ] = "auto",
    dtype: DtypeOption = "auto",
    linear_backend: LinearBackendOption = "auto",
    tier: TierOption = "exact",
    captioner: CaptionerOption = None,
    captioner_model: CaptionerModelOption = None,
    captioner_url: CaptionerUrlOption = None,
    captioner_template: CaptionerTemplateOption = None,
    captioner_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable with the key of the captioner's endpoint.",
            show_default=False,
            rich_help_panel=CAPTIONERS_PANEL,
        ),
    ] = None,
    questions: QuestionsOption = None,
) -> None:
    """Serve a pipeline over HTTP: OpenAI's images API, reconstructions, complexity, and a page at /.

    Requests share the steps of one engine, whatever their tokens, steps and guidance; their bits do not
    depend on each other. SIGTERM finishes the images in flight; a second one ends at once. Needs the extra
    `serve`. Uploaded images without a description are scored by their pixels; --captioner describes them
    first, and finds the flags that were not sent.

    Examples:

        cat-fast serve --pipeline nano

        cat-fast serve -p runs/demo/pipeline --host 0.0.0.0 --token-file token.txt --threads 8

        cat-fast serve -p nano --captioner vlm --captioner-model llava-hf/llava-1.5-7b-hf
    """
    from cat_fast.complexity.extras import import_extra  # imports numpy
    from cat_fast.complexity.image_scorers.loading import CaptionerOptions, load_captioner

    for module, package in _NEEDED.items():
        import_extra(module, package, "serve", "cat-fast serve")
    import torch

    from cat_fast.inference.pipeline.loading import load_pipeline
    from cat_fast.inference.server.run import bind
    from cat_fast.inference.server.run import serve as run
    from cat_fast.inference.server.service import Service
    from cat_fast.inference.server.settings import ServerSettings
    from cat_fast.kernels.linear.op import resolve, using
    from cat_fast.models.device import find_device
    from cat_fast.models.execution import find_dtype
    from cat_fast.processes.malloc import share_arenas

    settings = ServerSettings(
        name=Path(pipeline).resolve().name if Path(pipeline).is_dir() else pipeline,
        host=host,
        port=port,
        token=None if token_file is None else _read_token(token_file),
        insecure=insecure,
        max_tokens=max_tokens,
        max_queue=max_queue,
        requests_per_minute=requests_per_minute,
        coarser_after=coarser_after,
        drain_seconds=drain_seconds,
        decode_tier=tier,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    share_arenas()
    bound = bind(settings)  # a port in use is reported before the models are loaded
    if captioner_key_env is not None and captioner != "endpoint":
        raise UserError("--captioner-key-env: applies to --captioner endpoint")
    of_captioner = CaptionerOptions(
        model=captioner_model,
        base_url=captioner_url,
        questions=questions,
        template=captioner_template,
        device=None if device == "auto" else device,
        api_key_env=captioner_key_env,
        timeout=_CAPTIONER_SECONDS,
    )
    describes = load_captioner(captioner, of_captioner)
    target = find_device(device)
    with using(resolve(linear_backend)):
        loaded = load_pipeline(pipeline, target, find_dtype(dtype, target))
        code = run(Service(loaded, settings, describes), bound)
    if code:
        raise typer.Exit(code)


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {path}: cannot be read ({error})") from error
    if not token:
        raise UserError(f"--token-file {path}: the file is empty; write a token to it")
    return token
