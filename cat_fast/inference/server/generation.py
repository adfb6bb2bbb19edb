"""POST /v1/images/generations: from a body to images."""

import asyncio
import base64
import io
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from cat_fast.complexity import default_scorer, require_scores
from cat_fast.data.images.io import tensor_to_image
from cat_fast.errors import UserError
from cat_fast.generator.sampling import SampleRequest, guidance_scales
from cat_fast.inference.engine.admission import check_room
from cat_fast.inference.engine.handle import EngineOutput, Preview, RequestHandle
from cat_fast.inference.engine.request import EngineRequest
from cat_fast.inference.pipeline.cat_pipeline import MAX_SEED
from cat_fast.inference.server.errors import ApiError, as_api_error
from cat_fast.inference.server.schemas import GenerationBody
from cat_fast.inference.server.service import Service

_MAX_SIDE_FACTOR = 2
"""Largest side, as a multiple of the size of training."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Validated requests of one body, before they are queued."""

    requests: list[EngineRequest]
    width: int
    height: int
    prompt_tokens: int | None
    """Tokens of the prompt; None without a text encoder."""
    prompt_tokens_used: int | None
    """Tokens left after truncation to the encoder's limit."""


def plan(service: Service, body: GenerationBody) -> Planned:
    """Validate a body and plan its images; this takes no place in the queue.

    Raises:
        ApiError: 400 or 404, with the parameter at fault.
    """
    if body.model not in (None, service.settings.name):
        raise ApiError(
            404,
            f"model {body.model!r} is not served; expected {service.settings.name!r}",
            code="model_not_found",
            param="model",
        )
    try:
        service.engine.check_number(body.n)
    except UserError as error:
        raise ApiError(400, str(error), code="invalid_value", param="n") from error
    given = [name for name in ("tokens", "mean_tokens") if getattr(body, name) is not None]
    if body.ratio != "auto":
        given.insert(0, "ratio")
    if len(given) > 1:
        raise ApiError(400, f"expected {' or '.join(given)}, got both", code="invalid_value", param=given[1])
    size = _size(service, body)
    seed = secrets.randbelow(MAX_SEED - body.n) if body.seed is None else body.seed
    if seed + body.n - 1 > MAX_SEED:
        raise ApiError(
            400,
            f"seed {seed}: image i uses seed + i, which must fit 64 bits",
            code="invalid_value",
            param="seed",
        )
    ratio: Literal["auto"] | int = (
        body.ratio if body.tokens is None else _ratio_within(service, body.tokens, size)
    )
    description = service.description_of(body.prompt)
    (score,) = require_scores(default_scorer(), [description])
    try:
        samples = service.pipeline.plan(
            [body.prompt] * body.n,
            ratio=ratio,
            mean_tokens=body.mean_tokens,
            width=size[0],
            height=size[1],
            seed=seed,
            scores={description: score},
        )
    except UserError as error:
        param = "prompt" if "none of the" in str(error) else given[0] if given else "size"
        code = "unknown_class" if param == "prompt" else "invalid_value"
        raise ApiError(400, str(error), code=code, param=param) from error
    scheduler: Any = body.scheduler or service.default_scheduler
    guidance = service.pipeline.default_guidance if body.guidance_scale is None else body.guidance_scale
    scales = guidance_scales(guidance, [sample.ratio for sample in samples])
    steps = body.num_inference_steps or service.pipeline.default_steps
    common = EngineRequest(
        sample=samples[0],
        num_inference_steps=steps,
        guidance_scale=scales[0],
        scheduler=scheduler,
        priority=body.priority,
        deadline=body.deadline_seconds,
        complexity=score.expected,
        preview_every=_preview_every(body, steps),
    )
    try:
        service.engine.stages.check(common)
    except UserError as error:
        param = "scheduler" if str(error).startswith("scheduler") else "num_inference_steps"
        raise ApiError(400, str(error), code="invalid_value", param=param) from error
    requests = []
    for sample, scale in zip(samples, scales, strict=True):
        coarser = _coarser(service, sample) if body.allow_coarser else ()
        requests.append(
            replace(
                common,
                sample=sample,
                guidance_scale=scale,
                coarser=coarser,
                coarser_guidance=tuple(guidance_scales(guidance, [one.ratio for one in coarser])),
            )
        )
    try:
        check_room(
            [one.sample for one in requests], [one.passes for one in requests], service.settings.max_tokens
        )
    except UserError as error:
        raise ApiError(400, str(error), code="invalid_size", param="size") from error
    encoder, text = service.pipeline.text_encoder, samples[0].text
    return Planned(
        requests=requests,
        width=size[0],
        height=size[1],
        prompt_tokens=None if encoder is None else encoder.count_tokens([text], truncation=False)[0],
        prompt_tokens_used=None if encoder is None else encoder.count_tokens([text])[0],
    )


def submit(
    service: Service, planned: Planned, on_preview: Callable[[int, Preview], None] | None = None
) -> list[RequestHandle]:
    """Queue all images of a body, or none.

    Raises:
        ApiError: 422, 429 or 503.
    """
    previews = [on_preview and partial(on_preview, index) for index in range(len(planned.requests))]
    try:
        service.require_accepting()
        handles = service.engine.submit_all(planned.requests, on_previews=previews)
    except Exception as error:
        raise as_api_error(error) from error
    for handle in handles:
        handle.add_done_callback(service.ended)
    return handles


async def reply(planned: Planned, handles: list[RequestHandle]) -> dict[str, Any]:
    """Wait for all images and return the body of the reply; cancel the others if one fails."""
    try:
        outputs = await asyncio.gather(*(handle.wait() for handle in handles))
    except asyncio.CancelledError:
        raise
    except Exception as error:
        raise _lost(error, handles) from error
    finally:
        for handle in handles:
            handle.cancel()
    encoded = await asyncio.gather(*(asyncio.to_thread(encode, output) for output in outputs))
    return {
        "created": int(time.time()),
        "data": [{"b64_json": image} for image in encoded],
        "output_format": "png",
        "size": f"{planned.width}x{planned.height}",
        "metrics": metrics(planned, handles),
    }


async def events(service: Service, planned: Planned, accept: Callable[[], None]) -> AsyncIterator[str]:
    """Yield server-sent events: previews, images, and an error if one occurs.

    Args:
        service: the service that draws.
        planned: images to draw.
        accept: called once the images are queued.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]]()

    def on_preview(index: int, preview: Preview) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, ("preview", (index, preview)))

    handles = await asyncio.to_thread(submit, service, planned, on_preview)
    accept()
    waiting = [asyncio.ensure_future(_finished(i, handle, queue)) for i, handle in enumerate(handles)]
    try:
        for index, handle in enumerate(handles):
            record = handle.record
            yield event("image_generation.queued", {"image_index": index, "id": handle.id, **asdict(record)})
        left = len(handles)
        while left:
            kind, value = await queue.get()
            if kind == "preview":
                index, preview = value
                image = await asyncio.to_thread(encode_tensor, preview.image)
                yield event(
                    "image_generation.partial_image",
                    {"image_index": index, "partial_image_index": preview.step, "b64_json": image},
                )
            elif kind == "error":
                yield event("error", _lost(value, handles).to_json())
                return
            else:
                index, output = value
                image = await asyncio.to_thread(encode, output)
                done = {"image_index": index, "b64_json": image, "metrics": asdict(output.record)}
                yield event("image_generation.completed", done)
                left -= 1
        yield event("image_generation.metrics", metrics(planned, handles))
    finally:
        for handle in handles:
            handle.cancel()
        for one in waiting:
            one.cancel()


async def _finished(index: int, handle: RequestHandle, queue: "asyncio.Queue[tuple[str, Any]]") -> None:
    try:
        queue.put_nowait(("image", (index, await handle.wait())))
    except Exception as error:
        queue.put_nowait(("error", error))


def event(kind: str, data: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | data)}\n\n"


def encode(output: EngineOutput) -> str:
    """Return the image as base64 of a PNG file."""
    assert output.image is not None
    return encode_tensor(output.image)


def encode_tensor(image: torch.Tensor) -> str:
    """Return an image (3, H, W) in [-1, 1] as base64 of a PNG file."""
    file = io.BytesIO()
    tensor_to_image(image).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def metrics(planned: Planned, handles: list[RequestHandle]) -> dict[str, Any]:
    """Return the accounting of a reply."""
    truncated = planned.prompt_tokens != planned.prompt_tokens_used
    return {
        "tokens": sum(handle.record.tokens for handle in handles),
        "flops": sum(handle.record.flops for handle in handles),
        "prompt_tokens": planned.prompt_tokens,
        "prompt_tokens_used": planned.prompt_tokens_used,
        "prompt_truncated": truncated,
        "images": [
            asdict(handle.record)
            | {"seed": handle.request.sample.seed, "complexity": handle.request.complexity}
            for handle in handles
        ],
    }


def _lost(error: BaseException, handles: list[RequestHandle]) -> ApiError:
    """Return the refusal of an accepted request, with what was lost."""
    found = as_api_error(error if isinstance(error, Exception) else RuntimeError(str(error)))
    if found.status == 503:
        done = ", ".join(f"{handle.record.steps_done} of {handle.record.steps}" for handle in handles)
        found.message = f"the server shut down too early; images were lost after {done} steps"
        found.details["lost"] = [asdict(handle.record) for handle in handles if handle.status != "finished"]
    return found


def _size(service: Service, body: GenerationBody) -> tuple[int, int]:
    """Return width and height in pixels."""
    resolution = service.pipeline.resolution
    size = body.width_and_height() or (resolution, resolution)
    config = service.pipeline.transformer.config
    unit, limit = max(config.ratios) * config.patch_size, _MAX_SIDE_FACTOR * resolution
    for side in size:
        if side % unit or side > limit:
            raise ApiError(
                400,
                f"size {body.size}: expected sides that are multiples of {unit} px and at most {limit} px",
                code="invalid_size",
                param="size",
            )
    return size


def _ratio_within(service: Service, tokens: int, size: tuple[int, int]) -> int:
    """Return the finest ratio that costs at most this many tokens."""
    ratios = sorted(service.pipeline.transformer.config.ratios)
    for ratio in ratios:
        if service.tokens_of(ratio, size) <= tokens:
            return ratio
    least = service.tokens_of(ratios[-1], size)
    raise ApiError(
        400, f"tokens {tokens}: expected at least {least}, the cost at {ratios[-1]}x", code="invalid_value",
        param="tokens",
    )  # fmt: skip


def _coarser(service: Service, sample: SampleRequest) -> tuple[SampleRequest, ...]:
    """Return the same image at coarser ratios, finest first."""
    found = []
    for ratio in sorted(service.pipeline.transformer.config.ratios):
        if ratio > sample.ratio:
            factor = ratio // sample.ratio
            grid = (sample.grid[0] // factor, sample.grid[1] // factor)
            found.append(replace(sample, ratio=ratio, grid=grid))
    return tuple(found)


def _preview_every(body: GenerationBody, steps: int) -> int:
    """Return the number of steps between previews, with which there are at most `partial_images` of them."""
    if not body.stream or body.partial_images == 0:
        return 0
    return math.ceil(steps / (body.partial_images + 1))
