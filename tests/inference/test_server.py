"""The server as OpenAI's own client sees it, and as a plain HTTP client that makes mistakes sees it."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest
import torch
import uvicorn

from moe.data.tokenizer import train_bpe
from moe.inference.completions import Completions
from moe.inference.engine import Engine, Request
from moe.inference.sampling import Sampling
from moe.inference.server.app import Limits, build_app
from moe.inference.server.service import BusyError, FailedError, Service
from moe.model.transformer import Transformer

TOKENIZER = train_bpe(["the sea the sky the ship"] * 5, 280)
SEED = 7


@pytest.fixture(scope="module")
def model(plain: Transformer) -> Transformer:
    """Its vocabulary is that of the tokenizer."""
    return Transformer(replace(plain.config, vocab_size=TOKENIZER.size)).eval().double()


def service_of(model: Transformer, capacity: int = 8) -> Service:
    return Service(Completions(Engine(model, max_sequences=4, block_size=4), TOKENIZER), capacity)


@contextmanager
def serving(service: Service, limits: Limits | None = None) -> Iterator[str]:
    """The address of a server in a thread."""
    server = uvicorn.Server(uvicorn.Config(build_app(service, "toy", limits), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:  # which it tells nobody
        assert thread.is_alive(), "the server ended before it began"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(model: Transformer) -> Iterator[str]:
    with serving(service_of(model), Limits(bytes=10_000, prompts=3)) as address:
        yield address


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with client_of(address) as client:
        yield client


def expected(model: Transformer, prompt: str, n_tokens: int, sampling: Sampling, sample: int = 0) -> list[int]:
    """What the engine writes when nobody else is there."""
    engine, tokens = Engine(model), []
    request = Request(
        TOKENIZER.prompt_ids(prompt), n_tokens, sampling, seed=SEED << 20, n=sample + 1, stop=TOKENIZER.end_of_text
    )
    engine.submit(request)
    while engine.busy:
        tokens += [e.token for e in engine.step() if e.sample == sample and e.token is not None]
    return tokens


def refusal(client: openai.OpenAI, status: int, **body: Any) -> dict[str, Any]:
    """The error that a body gets."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{"model": "toy", "prompt": "the", **body})
    assert caught.value.status_code == status
    return caught.value.body


# ------------------------------------------------------------------------------------------------------ OpenAI's client


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "moe-lab"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; there is 'toy'"):
        client.models.retrieve("other")


def test_a_text_is_continued(client: openai.OpenAI, model: Transformer) -> None:
    answer = client.completions.create(model="toy", prompt="the sea", max_tokens=12, temperature=0)

    tokens = expected(model, "the sea", 12, Sampling(temperature=0.0))
    assert [choice.text for choice in answer.choices] == [TOKENIZER.decode(tokens)]
    assert answer.choices[0].finish_reason == "length"
    n_prompt = len(TOKENIZER.prompt_ids("the sea"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 12)
    assert answer.usage.total_tokens == n_prompt + 12


def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI, model: Transformer) -> None:
    stream = client.completions.create(
        model="toy",
        prompt="the sea",
        max_tokens=12,
        temperature=1.5,
        seed=SEED,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )

    chunks = list(stream)
    for sample in range(2):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == sample]
        tokens = expected(model, "the sea", 12, Sampling(temperature=1.5), sample)
        assert "".join(choice.text for choice in own) == TOKENIZER.decode(tokens)
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]
        assert len(own) == 12
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24


def test_log_probabilities_and_routing_of_each_token(client: openai.OpenAI, model: Transformer) -> None:
    answer = client.completions.create(
        model="toy", prompt="the sea", max_tokens=5, temperature=0, logprobs=3, extra_body={"routing": True}
    )

    [choice] = answer.choices
    tokens = expected(model, "the sea", 5, Sampling(temperature=0.0))
    ids = [*TOKENIZER.prompt_ids("the sea"), *tokens]
    with torch.no_grad():
        logits, routings = model(torch.tensor([ids]))
    places = range(len(ids) - 6, len(ids) - 1)
    for number, place in enumerate(places):
        values = logits[0, place].log_softmax(-1)
        assert choice.logprobs.tokens[number] == TOKENIZER.decode([tokens[number]])
        assert choice.logprobs.token_logprobs[number] == pytest.approx(float(values.max()), rel=1e-4)
        best = values.topk(3)
        names = [TOKENIZER.decode([token]) for token in best.indices.tolist()]
        shown = dict(zip(names, best.values.tolist(), strict=True))
        assert choice.logprobs.top_logprobs[number] == pytest.approx(shown, rel=1e-4)
        assert choice.model_extra["routing"][number] == [routing.selected[place].tolist() for routing in routings]
    assert choice.logprobs.text_offset[0] == len("the sea")


def test_several_prompts_are_answered_each_as_alone(client: openai.OpenAI) -> None:
    prompts = ["the sea", "a", "the sky and the ship"]

    together = client.completions.create(model="toy", prompt=prompts, max_tokens=8, temperature=0)

    for index, prompt in enumerate(prompts):
        alone = client.completions.create(model="toy", prompt=prompt, max_tokens=8, temperature=0)
        assert together.choices[index].text == alone.choices[0].text
        assert together.choices[index].index == index


def test_a_prompt_of_token_ids_is_taken_as_it_is(client: openai.OpenAI) -> None:
    by_text = client.completions.create(model="toy", prompt="the sea", max_tokens=8, temperature=0)

    for prompt in (TOKENIZER.prompt_ids("the sea"), [TOKENIZER.prompt_ids("the sea")]):
        by_ids = client.completions.create(model="toy", prompt=prompt, max_tokens=8, temperature=0)
        assert by_ids.choices[0].text == by_text.choices[0].text


def test_text_ends_before_a_stop_string(client: openai.OpenAI) -> None:
    free = client.completions.create(model="toy", prompt="the sea", max_tokens=12, temperature=0).choices[0].text
    stop = free[4:7]

    [choice] = client.completions.create(
        model="toy", prompt="the sea", max_tokens=12, temperature=0, stop=["never there", stop]
    ).choices

    assert (choice.text, choice.finish_reason) == (free[: free.index(stop)], "stop")


def test_a_client_may_go_in_the_middle_of_a_stream(client: openai.OpenAI, model: Transformer) -> None:
    with client.completions.create(model="toy", prompt="the", max_tokens=50, stream=True) as stream:
        next(iter(stream))

    answer = client.completions.create(model="toy", prompt="the sea", max_tokens=8, temperature=0)
    assert answer.choices[0].text == TOKENIZER.decode(expected(model, "the sea", 8, Sampling(temperature=0.0)))


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"model": "gpt-4"}, 404, "model", "there is no model 'gpt-4' here; there is 'toy'"),
        ({"temperature": -1}, 400, "temperature", "temperature is -1.0, and must be 0 (greedy) or"),
        ({"top_p": 0}, 400, "top_p", "top_p is 0.0, and must lie in (0, 1]"),
        ({"max_tokens": -1}, 400, "max_tokens", "max_tokens: Input should be greater than or equal to 0"),
        ({"max_tokens": 100}, 400, "prompt", "a prompt of 2 tokens and 100 new ones do not fit max_seq = 64"),
        ({"n": 5}, 400, "prompt", "5 continuations of 16 tokens were asked for, and must be from 1 to 4"),
        ({"prompt": []}, 400, "prompt", "prompt is an empty list"),
        ({"prompt": [[]]}, 400, "prompt", "every prompt needs at least one token"),
        ({"prompt": [1, 5000]}, 400, "prompt", f"prompt has the token 5000, and there are {TOKENIZER.size}"),
        ({"prompt": {"a": 1}}, 400, "prompt", "prompt: must be text, texts, token ids, or lists of token ids"),
        ({"prompt": ["a"] * 4}, 400, "prompt", "4 prompts at once, and 3 are the most"),
        ({"prompt": "a" * 20_000}, 413, None, "the body is longer than 10,000 bytes"),
        ({"stop": [""]}, 400, "stop", "stop: at most 16 texts, none of them empty"),
        ({"logprobs": 50}, 400, "logprobs", "logprobs: Input should be less than or equal to 20"),
        ({"echo": True}, 400, "echo", "echo: Input should be False"),
        ({"extra_body": {"beam_width": 3}}, 400, "beam_width", "beam_width is unknown here"),
    ],
    ids=str,
)
def test_a_mistake_is_one_clear_error(
    client: openai.OpenAI, body: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    error = refusal(client, status, **body)

    assert error["message"].startswith(message)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_chat_is_said_to_be_none(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="has no template of a chat: use /v1/completions"):
        client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "hello"}])


def test_another_path_and_no_json(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: Not Found"):
        client.embeddings.create(model="toy", input="the", encoding_format="float")
    with pytest.raises(openai.BadRequestError, match="the body is no JSON object"):
        client.post("/completions", body=["no object"], cast_to=object)


# ------------------------------------------------------------------------------------------------------ bounds and ends


def test_metrics_are_counted(client: openai.OpenAI, address: str) -> None:
    def value(name: str) -> float:
        lines = client.get(f"{address}/metrics", cast_to=str).splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    before = value("moe_new_tokens_total")
    client.completions.create(model="toy", prompt="the", max_tokens=9, temperature=0)

    assert value("moe_new_tokens_total") == before + 9
    assert value("moe_open_prompts") == value("moe_running_texts") == value("moe_waiting_texts") == 0
    assert value("moe_free_blocks") == value("moe_blocks")
    assert value('moe_requests_total{status="200"}') > 0
    assert value("moe_request_seconds_count") > 0
    assert client.get(f"{address}/health", cast_to=str) == "ok\n"


def test_an_answer_that_takes_too_long_is_broken_off(model: Transformer) -> None:
    with serving(service_of(model), Limits(seconds=0.0)) as address, client_of(address) as client:
        assert refusal(client, 504)["message"] == "the answer took longer than 0 s"


def test_more_than_the_queue_holds_is_refused(model: Transformer) -> None:
    with serving(service_of(model, capacity=1)) as address, client_of(address) as client:
        error = refusal(client, 429, prompt=["a", "b"])
        assert error["message"] == "0 prompts are being answered or wait, of at most 1; try again later"
        assert client.completions.create(model="toy", prompt="a", max_tokens=2).choices


def test_places_are_free_again_after_an_answer_that_was_given_up(model: Transformer) -> None:
    async def ask() -> None:
        service = service_of(model, capacity=1)
        service.start()
        request = Request([1, 2], 40)
        pieces = service.complete([request], (), 60)
        await anext(pieces)
        with pytest.raises(BusyError, match="1 prompts are being answered or wait, of at most 1"):
            await anext(service.complete([request], (), 60))
        await pieces.aclose()
        assert service.n_open == 0
        assert len([piece async for piece in service.complete([request], (), 60)]) == 40
        service.stop()
        engine = service.completions.engine
        assert not engine.busy and engine.cache.groups[0].pool.n_free == engine.cache.groups[0].pool.n_blocks

    asyncio.run(ask())


def test_whoever_waits_hears_of_a_failure_and_of_the_end(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        service = service_of(model)
        service.start()
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "step", lambda _: json.loads("{"))
            with pytest.raises(FailedError, match="Expecting property name"):
                await anext(service.complete([Request([1], 3)], (), 60))
        pieces = service.complete([Request([1], 60)], (), 60)
        await anext(pieces)
        await asyncio.to_thread(service.stop)
        with pytest.raises(FailedError, match="the server is stopping"):
            while True:
                await anext(pieces)

    asyncio.run(ask())
