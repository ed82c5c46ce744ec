"""The routes of the server: completions, models, health and metrics, as an ASGI application."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from moe.inference.server.metrics import Metrics
from moe.inference.server.service import BusyError, FailedError, Service
from moe.inference.server.wire import BadRequestError, Reply, as_event, understand


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    bytes: int = 1 << 20
    """of its body"""
    seconds: float = 300.0
    """until its last token"""
    prompts: int = 64
    """in one body"""


def build_app(service: Service, name: str, limits: Limits | None = None) -> Starlette:
    """The application that serves the model of ``service`` under ``name``; it starts and stops the service."""
    server = _Server(service, name, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    return Starlette(
        routes=[
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/models", server.models),
            Route("/v1/models/{name}", server.model),
            Route("/health", lambda _: Response("ok\n", media_type="text/plain")),
            Route("/metrics", server.metrics_text),
        ],
        exception_handlers={BadRequestError: _refuse, HTTPException: _refuse_http},
        lifespan=lifespan,
    )


class _Server:
    def __init__(self, service: Service, name: str, limits: Limits) -> None:
        self._service, self._name, self._limits = service, name, limits
        self._metrics = Metrics(service)
        self._started = int(time.time())

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        try:
            response = await self._complete(request)
        except BadRequestError as refusal:
            self._metrics.requests.labels(refusal.status).inc()
            raise
        self._metrics.requests.labels(200).inc()
        return response

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``: there is nothing to chat with."""
        raise BadRequestError(
            "this model continues text, and has no template of a chat: use /v1/completions", status=404
        )

    async def models(self, _: Request) -> Response:
        """``GET /v1/models``."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/NAME``."""
        name = request.path_params["name"]
        if name != self._name:
            raise BadRequestError(f"there is no model {name!r} here; there is {self._name!r}", "model", status=404)
        return JSONResponse(self._card())

    async def metrics_text(self, _: Request) -> Response:
        """``GET /metrics``."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _card(self) -> dict[str, object]:
        longest = self._service.completions.engine.model.config.max_seq
        return {
            "id": self._name,
            "object": "model",
            "created": self._started,
            "owned_by": "moe-lab",
            "max_model_len": longest,
        }

    async def _complete(self, request: Request) -> Response:
        tokenizer = self._service.completions.tokenizer
        asked = understand(await self._body(request), tokenizer, self._name, self._limits.prompts)
        reply = Reply(asked, tokenizer)
        chunks = self._chunks(reply)
        # The first chunk shows whether there will be others, while the status can still say that there will not.
        first = await anext(chunks, None)
        if asked.body.stream:
            return StreamingResponse(self._events(reply, first, chunks), media_type="text/event-stream")
        try:
            await self._unless_disconnected(request, chunks)
        finally:
            await chunks.aclose()
        return JSONResponse(reply.whole())

    async def _chunks(self, reply: Reply) -> AsyncGenerator[dict[str, object], None]:
        """What a stream sends, as it comes; raises BadRequestError for all that can go wrong."""
        began, told = time.monotonic(), False
        pieces = self._service.complete(reply.asked.requests, reply.asked.stop, self._limits.seconds)
        try:
            async for place, piece in pieces:
                if not told:
                    self._metrics.first_token.observe(time.monotonic() - began)
                    told = True
                yield reply.add(place, piece)
        except ValueError as error:
            raise BadRequestError(str(error), "prompt") from None
        except BusyError as error:
            raise BadRequestError(f"{error}; try again later", status=429) from None
        except TimeoutError:
            raise BadRequestError(f"the answer took longer than {self._limits.seconds:g} s", status=504) from None
        except FailedError as error:
            raise BadRequestError(f"the answer failed: {error}", status=500) from None
        finally:
            await pieces.aclose()
        self._metrics.duration.observe(time.monotonic() - began)

    async def _events(
        self, reply: Reply, first: dict[str, object] | None, chunks: AsyncGenerator[dict[str, object], None]
    ) -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield as_event(first)
            async for chunk in chunks:
                yield as_event(chunk)
            options = reply.asked.body.stream_options
            if options is not None and options.include_usage:
                yield as_event(reply.usage_chunk())
            yield as_event("[DONE]")
        except BadRequestError as refusal:  # too late for a status
            yield as_event(refusal.body)
        finally:
            await chunks.aclose()

    async def _body(self, request: Request) -> bytes:
        """The body, as far as it is allowed to go."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._limits.bytes:
                raise BadRequestError(f"the body is longer than {self._limits.bytes:,} bytes", status=413)
        return bytes(body)

    async def _unless_disconnected(self, request: Request, chunks: AsyncGenerator[dict[str, object], None]) -> None:
        """Run through the chunks, and stop where nobody waits for them any more."""

        async def run() -> None:
            async for _ in chunks:
                pass

        running = asyncio.ensure_future(run())
        gone = asyncio.ensure_future(request.receive())
        await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not running.done():
            running.cancel()
            await asyncio.wait({running})
            raise HTTPException(499, "the client has gone")
        running.result()


async def _refuse(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, BadRequestError)
    headers = {"Retry-After": "1"} if refusal.status == 429 else None
    return JSONResponse(refusal.body, refusal.status, headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """No such path or method, as OpenAI's clients read it."""
    assert isinstance(error, HTTPException)
    refusal = BadRequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    return JSONResponse(refusal.body, error.status_code, error.headers)
