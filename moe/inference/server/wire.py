"""What goes over the wire: OpenAI's completions, with what a mixture can say beside them.

Beyond that API are ``top_k``, ``min_p`` and ``repetition_penalty``, and ``routing: true``, which returns the experts
that each token was predicted by. What the API has and this server has not is refused, unless it would do nothing.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe.data.tokenizer import Tokenizer
from moe.inference.completions import Piece
from moe.inference.engine import Request
from moe.inference.sampling import Sampling

MOST_LOGPROBS = 20
MOST_STOPS = 16


class BadRequestError(Exception):
    """A request that cannot be answered: the reason, the field, and the HTTP status."""

    def __init__(self, reason: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(reason)
        self.reason, self.param, self.status = reason, param, status

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.reason, "type": kind, "param": self.param, "code": None}}


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionBody(BaseModel):
    """The body of ``POST /v1/completions``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: int | None = Field(16, ge=0)
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    n: int | None = Field(1, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, lt=2**32)
    user: str | None = None
    # Beyond OpenAI's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    routing: bool = False
    # Of OpenAI's, what is accepted only where it changes nothing.
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: None = None
    suffix: None = None


@dataclass(frozen=True)
class Asked:
    """A body, understood."""

    body: CompletionBody
    requests: list[Request]
    stop: tuple[str, ...]
    prompt_texts: list[str]

    @property
    def n_prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(len(request.prompt) for request in self.requests)


def understand(raw: bytes, tokenizer: Tokenizer, model: str, most_prompts: int) -> Asked:
    """What a body asks for; raises BadRequestError that names the field."""
    try:
        body = CompletionBody.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        # Of a choice among types, pydantic's name of the type is no field.
        param = ".".join(str(part) for part in first["loc"][:1]) or None
        if first["type"] == "extra_forbidden":
            raise BadRequestError(f"{param} is unknown here", param) from None
        reason = "must be text, texts, token ids, or lists of token ids" if param == "prompt" else first["msg"]
        raise BadRequestError(
            f"{param}: {reason}" if param else f"the body is no JSON object: {reason}", param
        ) from None
    if body.model != model:
        raise BadRequestError(f"there is no model {body.model!r} here; there is {model!r}", "model", status=404)
    prompts, texts = _prompts(body, tokenizer)
    if len(prompts) > most_prompts:
        raise BadRequestError(f"{len(prompts)} prompts at once, and {most_prompts} are the most", "prompt")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stop) > MOST_STOPS or any(not text for text in stop):
        raise BadRequestError(f"stop: at most {MOST_STOPS} texts, none of them empty", "stop")
    try:
        sampling = Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
        )
    except ValueError as error:
        raise BadRequestError(str(error), str(error).partition(" ")[0]) from None
    seed = secrets.randbits(32) if body.seed is None else body.seed
    requests = [
        Request(
            prompt,
            16 if body.max_tokens is None else body.max_tokens,
            sampling,
            seed=(seed << 20) + row,
            n=body.n or 1,
            stop=tokenizer.end_of_text,
            alternatives=body.logprobs or 0,
            with_experts=body.routing,
        )
        for row, prompt in enumerate(prompts)
    ]
    return Asked(body, requests, stop, texts)


def _prompts(body: CompletionBody, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str]]:
    """The ids of each prompt, and its text. Ids are taken as they are; before text stands an end of text."""
    prompt: Any = body.prompt
    if prompt == []:
        raise BadRequestError("prompt is an empty list", "prompt")
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    ids = [tokenizer.prompt_ids(one) if isinstance(one, str) else list(one) for one in prompt]
    foreign = next((token for own in ids for token in own if not 0 <= token < tokenizer.size), None)
    if foreign is not None:
        raise BadRequestError(f"prompt has the token {foreign}, and there are {tokenizer.size}", "prompt")
    return ids, [one if isinstance(one, str) else tokenizer.decode(one) for one in prompt]


@dataclass
class Answer:
    """One choice, as far as it has come."""

    offset: int
    """characters before the next token, the prompt's included"""
    text: str = ""
    n_tokens: int = 0
    finish: str | None = None
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    routing: list[Any] = field(default_factory=list)


class Reply:
    """The choices of one request, whole or piece by piece."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer) -> None:
        self.asked, self._tokenizer = asked, tokenizer
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self.answers = [Answer(len(text)) for text in asked.prompt_texts for _ in range(asked.requests[0].n)]

    def add(self, place: int, piece: Piece) -> dict[str, Any]:
        """Put a piece of prompt ``place`` to its choice; returns the chunk that a stream sends for it."""
        index = place * self.asked.requests[0].n + piece.event.sample
        answer, body = self.answers[index], self.asked.body
        chunk = Answer(answer.offset)
        chunk.text, chunk.finish = piece.text, piece.finish
        if piece.event.token is not None:
            answer.n_tokens += 1
            if body.logprobs is not None:
                chunk.logprobs = self._logprobs(piece, answer.offset)
            answer.offset += len(self._tokenizer.decode([piece.event.token]))
            if body.routing:
                chunk.routing = [[list(layer) for layer in piece.event.experts]]
        answer.text += chunk.text
        answer.finish = chunk.finish
        for key, values in chunk.logprobs.items():
            answer.logprobs.setdefault(key, []).extend(values)
        answer.routing += chunk.routing
        return self._frame([self._choice(index, chunk)])

    def whole(self) -> dict[str, Any]:
        """All choices, when they are finished."""
        choices = [self._choice(index, answer) for index, answer in enumerate(self.answers)]
        return self._frame(choices) | {"usage": self.usage}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream that asked for it."""
        return self._frame([]) | {"usage": self.usage}

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        read, written = self.asked.n_prompt_tokens, sum(answer.n_tokens for answer in self.answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _frame(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self.asked.body.model,
            "choices": list(choices),
        }

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": answer.text, "finish_reason": answer.finish}
        choice["logprobs"] = answer.logprobs or None
        if self.asked.body.routing:
            choice["routing"] = answer.routing
        return choice

    def _logprobs(self, piece: Piece, offset: int) -> dict[str, list[Any]]:
        event = piece.event
        assert event.token is not None
        own = self._tokenizer.decode([event.token])
        best = {self._tokenizer.decode([token]): value for token, value in event.alternatives}
        return {
            "tokens": [own],
            "token_logprobs": [event.log_probability],
            "top_logprobs": [best],
            "text_offset": [offset],
        }


def as_event(value: object) -> bytes:
    """One server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
