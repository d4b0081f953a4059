"""The web application: OpenAI's routes over an ``Engine``. Everything slow happens on other threads than the loop's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adallava import __version__
from adallava.errors import AdaLlavaError, BudgetError, ConfigError
from adallava.serving.engine import Engine
from adallava.serving.images import ImagePolicy
from adallava.serving.jobs import Begun, Ended, Event, Failed, Job, OverloadedError, Said, StoppedError
from adallava.serving.metrics import Metrics
from adallava.serving.protocol import (
    AUTO,
    ChatReply,
    ChatRequest,
    Choice,
    ErrorReply,
    Health,
    ModelCard,
    ModelList,
    Reply,
    facts,
    new_id,
    now,
    usage,
)

log = logging.getLogger("adallava.serving")
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": about}
    for status, about in {
        400: "The request is wrong",
        401: "The key is wrong",
        404: "There is no such model or route",
        413: "The body is too large",
        422: "The budget cannot be met",
        429: "Too much is going on",
        500: "The server failed",
        503: "The server is stopping",
        504: "It took too long",
    }.items()
}
_WATCH_S = 0.2
_READERS = 4
_KNOWN = [Depends(HTTPBearer(auto_error=False))]
"""For the description: ``_Gate`` asks for the key, before a body is read."""


@dataclass(frozen=True)
class ServeSettings:
    """How a server behaves to the outside."""

    name: str
    """The model's, as requests must call it."""
    api_key: str | None = None
    images: ImagePolicy = field(default_factory=ImagePolicy)
    max_body_bytes: int = 32 * 2**20
    default_tokens: int = 128
    default_budget: str = "100%"
    """For requests that name none; "auto" leaves them to the governor."""

    def __post_init__(self) -> None:
        """Check the values; raise ``ConfigError``."""
        if self.max_body_bytes < 1 or self.default_tokens < 1:
            raise ConfigError("max_body_bytes and default_tokens must be 1 or more.")


@dataclass(eq=False)
class _Refusal(Exception):
    """An error on its way to the client."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


def create_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """The application; it starts the engine and stops it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(engine.stop)

    app = FastAPI(
        title="AdaLLaVA",
        version=__version__,
        description="A vision-language model that gives each request its budget.",
        lifespan=lifespan,
    )
    app.add_middleware(_Gate, most=settings.max_body_bytes, api_key=settings.api_key)
    metrics = Metrics(engine)
    app.state.engine = engine
    _handle_errors(app, metrics)
    card = ModelCard(id=settings.name, created=now(), budgets=[str(b) for b in engine.vlm.reachable_budgets()])

    @app.get("/healthz", responses={503: {"model": Health}})
    async def healthz() -> Response:
        load = engine.load
        body = Health(status="ok" if engine.alive else "stopping", waiting=load.waiting, decoding=load.decoding)
        return JSONResponse(body.model_dump(), 200 if engine.alive else 503)

    @app.get("/metrics", response_class=Response)
    async def told() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=_KNOWN, responses={401: _ERRORS[401]})
    def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}", dependencies=_KNOWN, responses={s: _ERRORS[s] for s in (400, 401, 404)})
    def model(name: str) -> ModelCard:
        _check_name(name, settings)
        return card

    _add_chat(app, engine, settings, metrics)
    return app


def _add_chat(app: FastAPI, engine: Engine, settings: ServeSettings, metrics: Metrics) -> None:
    # Pictures are decoded on so many threads at once: what is not decoded yet is small.
    reading = anyio.CapacityLimiter(_READERS)

    @app.post("/v1/chat/completions", dependencies=_KNOWN, responses=_ERRORS, response_model=ChatReply)
    async def chat(body: ChatRequest, request: Request) -> Any:
        arrived = time.perf_counter()
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        automatic = body.deadline_ms is None and (body.budget or settings.default_budget) == AUTO

        def accept() -> Job:
            _check_name(body.model, settings)
            body.check()
            sampling = body.sampling(min(settings.default_tokens, engine.limits.new_tokens))
            budget = body.wanted_budget(settings.default_budget)
            job = Job(body.prompt(settings.images), sampling, sink, budget, body.deadline_ms, arrived)
            engine.submit(job)
            return job

        try:
            job = await anyio.to_thread.run_sync(accept, limiter=reading)
            begun = await _first(events, request, job)
        except Exception as error:
            raise _refused(error, metrics) from error
        metrics.begun(begun, automatic)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            pieces = _stream(events, job, begun, settings.name, metrics, with_usage)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        try:
            ended = await _rest(events, request, job)
        except Exception as error:
            raise _refused(error, metrics) from error
        metrics.ended(ended)
        return ChatReply(
            id=new_id(),
            created=now(),
            model=settings.name,
            choices=[Choice(message=Reply(content=ended.text), finish_reason=_reason(ended))],
            usage=usage(begun, ended.new_tokens),
            adallava=facts(begun, ended),
        )


# -- one answer -------------------------------------------------------------------------------------------------------


async def _next(events: asyncio.Queue[Event], request: Request | None, job: Job) -> Event:
    """The next event; a client that goes away meanwhile cancels the job."""
    while True:
        try:
            return await asyncio.wait_for(events.get(), _WATCH_S)
        except TimeoutError:
            if request is not None and await request.is_disconnected():
                job.cancel()
        except asyncio.CancelledError:
            job.cancel()
            raise


async def _first(events: asyncio.Queue[Event], request: Request, job: Job) -> Begun:
    event = await _next(events, request, job)
    if isinstance(event, Failed):
        raise event.error
    assert isinstance(event, Begun), "a job begins before it says anything"
    return event


async def _rest(events: asyncio.Queue[Event], request: Request, job: Job) -> Ended:
    while True:
        event = await _next(events, request, job)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Ended):
            return event


async def _stream(
    events: asyncio.Queue[Event], job: Job, begun: Begun, name: str, metrics: Metrics, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: the answer in pieces; the last piece says why it ended, what ran, and how long it took."""
    frame = {"id": new_id(), "object": "chat.completion.chunk", "created": now(), "model": name}

    def chunk(delta: dict[str, str], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps({**frame, 'choices': [choice], **more})}\n\n"

    over = False
    try:
        yield chunk({"role": "assistant", "content": ""}, adallava=facts(begun, None).model_dump())
        while not over:
            event = await _next(events, None, job)
            if isinstance(event, Said):
                yield chunk({"content": event.text})
            elif isinstance(event, Ended):
                over = True
                metrics.ended(event)
                yield chunk({}, event.reason, adallava=facts(begun, event).model_dump())
                if with_usage:
                    told = usage(begun, event.new_tokens).model_dump()
                    yield f"data: {json.dumps({**frame, 'choices': [], 'usage': told})}\n\n"
            elif isinstance(event, Failed):
                over = True
                refusal = _refused(event.error, metrics)
                yield f"data: {json.dumps(_body(refusal))}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        if not over:
            job.cancel()
            metrics.failed("cancelled")


# -- errors -----------------------------------------------------------------------------------------------------------


def _check_name(name: str, settings: ServeSettings) -> None:
    if name != settings.name:
        message = f"there is no model {name[:100]!r} here; there is {settings.name!r}."
        raise _Refusal(404, message, code="model_not_found")


def _refused(error: Exception, metrics: Metrics) -> _Refusal:
    """What a client is told of an error, counted."""
    refusal = _refusal(error)
    outcome = {422: "infeasible", 429: "refused", 499: "cancelled", 503: "refused", 504: "late"}
    metrics.failed(outcome.get(refusal.status, "failed" if refusal.status >= 500 else "invalid"))
    return refusal


def _refusal(error: Exception) -> _Refusal:
    match error:
        case _Refusal():
            return error
        case OverloadedError():
            wait = {"Retry-After": str(max(1, round(error.retry_after_s + 0.5)))}
            return _Refusal(429, str(error), "overloaded_error", "overloaded", wait)
        case StoppedError():
            return _Refusal(503, str(error), "server_error", "stopping", {"Retry-After": "5"})
        case BudgetError():
            infeasible = "infeasible" in str(error) or "minimum" in str(error)
            return _Refusal(422 if infeasible else 400, str(error), code="infeasible_budget" if infeasible else None)
        case AdaLlavaError():
            return _Refusal(400, str(error))
        case TimeoutError():
            return _Refusal(504, str(error), "server_error", "timeout")
        case InterruptedError():
            return _Refusal(499, "the client went away.", "server_error", "cancelled")
        case _:
            log.exception("a request failed", exc_info=error)
            return _Refusal(500, f"the server failed: {type(error).__name__}.", "server_error", "failed")


def _body(refusal: _Refusal) -> dict[str, Any]:
    told = {"message": refusal.message, "type": refusal.kind, "param": None, "code": refusal.code}
    return {"error": told}


def _handle_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(_Refusal)
    async def refused(_: Request, error: _Refusal) -> JSONResponse:
        return JSONResponse(_body(error), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        metrics.failed("invalid")
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][1:])) or "the body"
        return JSONResponse(_body(_Refusal(400, f"{place}: {first['msg']}"[:500])), 400)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        refusal = _Refusal(error.status_code, str(error.detail))
        return JSONResponse(_body(refusal), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_body(_refusal(error)), 500)


class _Gate:
    """Refuses a request without the key, and a body of more than ``most`` bytes, said or sent, before it is held."""

    def __init__(self, app: ASGIApp, most: int, api_key: str | None) -> None:
        self.app, self.most = app, most
        self.key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        right = scheme.lower() == b"bearer" and secrets.compare_digest(given.strip(), self.key or b"")
        if self.key is not None and scope["path"].startswith("/v1") and not right:
            refusal = _Refusal(401, "the API key is missing or wrong.", "authentication_error", "invalid_api_key")
            await JSONResponse(_body(refusal), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        said = headers.get(b"content-length", b"0")
        seen, over = 0, said.isdigit() and int(said) > self.most

        async def counted() -> Message:
            nonlocal seen, over
            message = await receive()
            seen += len(message.get("body", b""))
            over = over or seen > self.most
            return {"type": "http.disconnect"} if over else message

        async def unless_over(message: Message) -> None:
            if not over:
                await send(message)

        if not over:
            await self.app(scope, counted, unless_over)
        if over:
            refusal = _Refusal(413, f"the body has more than the {self.most:,} bytes allowed.", code="too_large")
            await JSONResponse(_body(refusal), 413, {"Connection": "close"})(scope, receive, send)


def _reason(ended: Ended) -> Any:
    return ended.reason
