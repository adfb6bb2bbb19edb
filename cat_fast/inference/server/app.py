"""Routes of the server."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi_offline import FastAPIOffline

from cat_fast import __version__
from cat_fast.complexity import Description
from cat_fast.complexity.image_score import GivenLabels
from cat_fast.inference.server import errors, generation, images
from cat_fast.inference.server.errors import ApiError
from cat_fast.inference.server.limits import Limits
from cat_fast.inference.server.metrics import ServerMetrics
from cat_fast.inference.server.schemas import ComplexityBody, GenerationBody
from cat_fast.inference.server.service import Service
from cat_fast.inference.server.settings import GENERATIONS, MAX_PROMPT_CHARACTERS, RECONSTRUCTIONS

_STEPS_PER_SECOND = 10
_UPLOAD_FIELDS = ("image", "description", "has_text", "has_faces")
_ERROR: dict[str, Any] = {"description": "Refused; the body is {error: {message, type, param, code}}"}
_REFUSALS: dict[int | str, dict[str, Any]] = dict.fromkeys(
    (400, 401, 404, 413, 415, 422, 429, 500, 503), _ERROR
)


def create_app(service: Service) -> FastAPI:
    """Return the application of a service, which another thread makes ready (`Service.prepare`)."""
    app = FastAPIOffline(  # Swagger UI from the package, not from the network
        redoc_url=None,
        static_url="/docs/static",
        title="cat-fast",
        version=__version__,
        description="Images with as many tokens as their content needs.",
    )
    measured = ServerMetrics(service)
    service.on_image = measured.observe_image
    app.add_middleware(
        Limits, settings=service.settings, observe=measured.observe_http, refused=service.refused
    )
    errors.install(app)
    page = files("cat_fast.inference.server").joinpath("templates/page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        policy = "default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "Not ready"}})
    async def readiness() -> JSONResponse:
        return JSONResponse(service.readiness(), 200 if service.ready else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        text = await asyncio.to_thread(measured.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses=_REFUSALS)
    async def models() -> dict[str, Any]:
        entry = {"id": service.settings.name, "object": "model", "owned_by": "cat-fast"}
        return {"object": "list", "data": [entry | {"details": service.describe()}]}

    @app.post(GENERATIONS, responses=_REFUSALS)
    async def generations(request: Request, body: GenerationBody) -> Response:
        service.require_accepting()
        request.state.user = body.user
        planned = await asyncio.to_thread(generation.plan, service, body)
        accept = partial(setattr, request.state, errors.ACCEPTED, True)
        if body.stream:
            stream = generation.events(service, planned, accept)
            first = await anext(stream)  # refusals must precede the reply's status
            return StreamingResponse(_chain(first, stream), media_type="text/event-stream")
        handles = await asyncio.to_thread(generation.submit, service, planned)
        accept()
        reply = asyncio.ensure_future(generation.reply(planned, handles))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({reply, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                raise ApiError(499, "the client closed the connection", code="client_closed")
            return JSONResponse(reply.result())
        finally:
            gone.cancel()
            reply.cancel()

    @app.post(RECONSTRUCTIONS, responses=_REFUSALS)
    async def reconstructions(
        request: Request,
        image: Annotated[UploadFile, File(description="JPEG, PNG or WebP, at most 40 megapixels")],
        description: Annotated[str | None, Form(max_length=MAX_PROMPT_CHARACTERS)] = None,
        has_text: Annotated[bool | None, Form()] = None,
        has_faces: Annotated[bool | None, Form()] = None,
    ) -> JSONResponse:
        def work(data: bytes) -> dict[str, Any]:
            read = images.read_image(data)
            caption = description.strip() if description else ""
            given = GivenLabels(caption=caption, has_text=has_text, has_faces=has_faces)
            return images.reconstruct(service, read, given)

        for name in await request.form():
            if name not in _UPLOAD_FIELDS:
                raise errors.unknown_parameter(name)
        with service.reconstruction():
            return JSONResponse(await asyncio.to_thread(_translated, partial(work, await image.read())))

    @app.post("/v1/complexity", responses=_REFUSALS)
    async def complexity(body: ComplexityBody) -> JSONResponse:
        service.require_not_draining()

        def work() -> dict[str, Any]:
            return images.complexity(service, Description(body.description, body.has_text, body.has_faces))

        return JSONResponse(await asyncio.to_thread(_translated, work))

    @app.get("/v1/engine/steps", include_in_schema=False)
    async def steps(request: Request) -> StreamingResponse:
        return StreamingResponse(_steps(service, request), media_type="text/event-stream")

    return app


def _translated(work: Any) -> Any:
    try:
        return work()
    except ValueError as error:  # UserError too
        raise errors.as_api_error(error) from error


async def _disconnected(request: Request) -> None:
    """Return once the client is gone; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chain(first: str, others: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for one in others:
        yield one


async def _steps(service: Service, request: Request) -> AsyncIterator[str]:
    """Yield the newest step of the engine, at most ten per second, until the client or the server ends.

    A step is repeated once the engine is idle.
    """
    last = None
    while not service.draining and not await request.is_disconnected():
        report, running = service.engine.last_step, service.engine.unfinished > 0
        if report is not None and (report.number, running) != last:
            last = report.number, running
            shown = {
                "number": report.number,
                "running": running,
                "rows": report.rows,
                "max_rows": report.max_rows,
                "seconds": report.seconds,
                "waiting": service.engine.waiting,
                "unfinished": service.engine.unfinished,
                "requests": [vars(one) for one in report.requests],
            }
            yield f"event: step\ndata: {json.dumps(shown)}\n\n"
        await asyncio.sleep(1 / _STEPS_PER_SECOND)
