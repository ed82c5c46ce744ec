"""Continuous batching: whoever else is there, each request is answered as it is alone, by the plain forward."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig, RouterConfig
from moe.inference.engine import Engine, Event, Request
from moe.inference.sampling import Sampling
from moe.model.transformer import Transformer

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5, 9, 11], [7], [1, 2, 3, 4, 5, 6, 7, 8], [63, 0]]
PlainGreedy = Callable[[Transformer, Sequence[int], int], list[int]]


def run(engine: Engine) -> dict[tuple[int, int], list[Event]]:
    """The events of each (request, continuation), until nothing is left to do."""
    events = defaultdict(list)
    while engine.busy:
        for event in engine.step():
            events[event.request, event.sample].append(event)
    return events


def tokens_of(events: Sequence[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """The first continuation of each."""
    numbers = [engine.submit(request) for request in requests]
    events = run(engine)
    return [tokens_of(events[number, 0]) for number in numbers]


@pytest.mark.parametrize("chunk", [3, 512])
def test_it_writes_what_the_plain_forward_writes(attending: Transformer, plain_greedy: PlainGreedy, chunk: int) -> None:
    engine = Engine(attending, max_sequences=3, block_size=4, chunk=chunk)

    written = answers(engine, [Request(prompt, 12, GREEDY) for prompt in PROMPTS])

    assert written == [plain_greedy(attending, prompt, 12) for prompt in PROMPTS]


def test_requests_join_while_others_are_written(attending: Transformer, plain_greedy: PlainGreedy) -> None:
    engine = Engine(attending, max_sequences=3, block_size=4)
    events: dict[int, list[Event]] = defaultdict(list)
    for prompt in PROMPTS:
        engine.submit(Request(prompt, 12, GREEDY))
        for event in [*engine.step(), *engine.step()]:
            events[event.request].append(event)
    for (number, _), rest in run(engine).items():
        events[number] += rest

    assert [tokens_of(events[number]) for number in range(4)] == [
        plain_greedy(attending, prompt, 12) for prompt in PROMPTS
    ]
    assert engine.cache.groups[0].pool.n_free == engine.cache.groups[0].pool.n_blocks


def test_a_request_that_does_not_fit_waits_and_one_that_outgrows_the_rest_gives_way(
    attending: Transformer, plain_greedy: PlainGreedy
) -> None:
    """Two texts of 3 + 20 tokens in 32 places: begun together, they cannot both be written. But where every layer has a
    window of 5, none holds more than three blocks of 4."""
    engine = Engine(attending, n_tokens=32, max_sequences=4, block_size=4)

    written = answers(engine, [Request([5, 9, 11 + row], 20, GREEDY) for row in range(4)])

    assert written == [plain_greedy(attending, [5, 9, 11 + row], 20) for row in range(4)]
    sees_everything = any(group.window is None for group in engine.cache.groups)
    assert (engine.statistics.preemptions > 0) == sees_everything
    assert all(group.pool.n_free == group.pool.n_blocks for group in engine.cache.groups)


def test_a_preempted_sequence_draws_on_where_it_was(plain: Transformer) -> None:
    requests = [Request([5, 9, row], 20, Sampling(temperature=2.0), seed=row) for row in range(4)]

    narrow = Engine(plain, n_tokens=32, max_sequences=4, block_size=4)
    assert answers(narrow, requests) == answers(Engine(plain), requests)
    assert narrow.statistics.preemptions > 0


def test_continuations_read_their_prompt_once_and_draw_differently(plain: Transformer) -> None:
    engine = Engine(plain, max_sequences=4, block_size=4)
    engine.submit(Request([5, 9, 11, 3, 2, 7], 8, Sampling(temperature=2.0), seed=3, n=4))

    events = run(engine)

    assert engine.statistics.prompt_tokens == 6
    assert len({tuple(tokens_of(events[0, number])) for number in range(4)}) == 4
    alone = Engine(plain)
    assert answers(alone, [Request([5, 9, 11, 3, 2, 7], 8, Sampling(temperature=2.0), seed=3)]) == [
        tokens_of(events[0, 0])
    ]


def test_a_second_request_with_the_same_beginning_reads_only_what_is_new(
    plain: Transformer, plain_greedy: PlainGreedy
) -> None:
    """Of 9 tokens in blocks of 4, 8 are held; the answer's blocks too, for a conversation that goes on."""
    prompt = [5, 9, 11, 3, 2, 7, 1, 4, 8]
    engine = Engine(plain, block_size=4)
    [first] = answers(engine, [Request(prompt, 6, GREEDY)])
    engine.statistics.prompt_tokens = 0

    [second] = answers(engine, [Request([*prompt, *first, 1], 6, GREEDY)])

    assert second == plain_greedy(plain, [*prompt, *first, 1], 6)
    assert engine.statistics.shared_tokens == 12
    assert engine.statistics.prompt_tokens == 4


def test_competing_tokens_share_no_prefix_since_it_would_show(plain: Transformer) -> None:
    config = replace(
        plain.config,
        router=RouterConfig(selection="expert_choice"),
        balance=replace(plain.config.balance, load_balance=0),
    )
    engine = Engine(Transformer(config).eval(), block_size=2)

    answers(engine, [Request([5, 9, 11, 3, 2], 2, GREEDY)] * 2)

    assert engine.statistics.shared_tokens == 0


def test_a_continuation_ends_at_its_stop_token(plain: Transformer, plain_greedy: PlainGreedy) -> None:
    free = plain_greedy(plain, PROMPTS[0], 12)
    stop = next(token for token in free[2:] if token not in free[:2])
    engine = Engine(plain)
    engine.submit(Request(PROMPTS[0], 12, GREEDY, stop=stop))
    engine.submit(Request(PROMPTS[0], 3, GREEDY))

    events = run(engine)

    assert tokens_of(events[0, 0]) == free[: free.index(stop)]
    assert [event.finish for event in events[0, 0]][-1] == "stop"
    assert events[0, 0][-1].token is None
    assert [event.finish for event in events[1, 0]] == [None, None, "length"]


def test_probabilities_and_experts_are_those_of_the_forward_that_wrote_the_token(plain: Transformer) -> None:
    engine = Engine(plain)
    engine.submit(Request([5, 9, 11], 4, Sampling(temperature=3.0, top_k=5), alternatives=3, with_experts=True))
    events = run(engine)[0, 0]
    text = [5, 9, 11, *tokens_of(events)]

    with torch.no_grad():
        logits, routings = plain(torch.tensor([text]))

    for place, event in enumerate(events, start=2):
        expected = logits[0, place].log_softmax(-1)
        assert event.log_probability == pytest.approx(float(expected[event.token]), rel=1e-5)
        best = expected.topk(3)
        assert [token for token, _ in event.alternatives] == best.indices.tolist()
        assert [value for _, value in event.alternatives] == pytest.approx(best.values.tolist(), rel=1e-5)
        assert event.experts == tuple(tuple(routing.selected[place].tolist()) for routing in routings)


def test_settings_may_differ_within_a_batch(plain: Transformer) -> None:
    requests = [
        Request([5, 9], 9, Sampling(temperature=2.0), seed=1),
        Request([5, 9], 9, GREEDY),
        Request([7, 8], 9, Sampling(top_k=3, repetition_penalty=2.0), seed=5),
    ]

    assert answers(Engine(plain), requests) == [answers(Engine(plain), [request])[0] for request in requests]


def test_a_cancelled_request_leaves_no_trace(plain: Transformer, plain_greedy: PlainGreedy) -> None:
    engine = Engine(plain, max_sequences=2, block_size=4)
    numbers = [engine.submit(Request(prompt, 12, GREEDY)) for prompt in PROMPTS]
    engine.step()

    engine.cancel(numbers[0])  # is written
    engine.cancel(numbers[3])  # waits
    engine.cancel(99)  # never was

    events = run(engine)
    assert {number for number, _ in events} == {1, 2}
    assert tokens_of(events[2, 0]) == plain_greedy(plain, PROMPTS[2], 12)
    assert engine.cache.groups[0].pool.n_free == engine.cache.groups[0].pool.n_blocks


def test_one_of_several_continuations_can_be_cancelled(plain: Transformer) -> None:
    engine = Engine(plain)
    engine.submit(Request([5, 9], 6, Sampling(temperature=2.0), n=3))
    engine.step()

    engine.cancel(0, sample=1)

    assert {number for _, number in run(engine)} == {0, 2}


def test_no_new_tokens_end_at_once(plain: Transformer) -> None:
    engine = Engine(plain)
    engine.submit(Request([5], 0, n=2))

    assert [(event.sample, event.token, event.finish) for event in engine.step()] == [
        (0, None, "length"),
        (1, None, "length"),
    ]
    assert not engine.busy


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 3), "every prompt needs at least one token"),
        (Request([64], 3), "a prompt has a token outside 0 to 63"),
        (Request([1] * 60, 5), "a prompt of 60 tokens and 5 new ones do not fit max_seq = 64"),
        (Request([1] * 30, 5), "a prompt of 30 tokens and 5 new ones do not fit the cache, which holds 32"),
        (Request([1], 1, n=5), "5 continuations of 1 tokens were asked for, and must be from 1 to 4"),
    ],
    ids=["empty", "foreign", "too long", "too long for the cache", "too many"],
)
def test_what_can_never_be_answered_is_refused(plain: Transformer, request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(plain, n_tokens=32, max_sequences=4).submit(request_)


def test_ten_thousand_joins_and_leaves() -> None:
    """Requests join at random, some leave before their end, blocks are short, prompts begin alike, some draw: each
    answer is that of the request alone, or its beginning."""
    config = ModelConfig(
        vocab_size=16,
        n_layers=1,
        d_model=8,
        max_seq=32,
        init_std=0.5,
        attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=4),
        experts=ExpertsConfig(n_experts=2, d_ff=4),
        router=RouterConfig(top_k=1, normalise=False),
    )
    model, choose = Transformer(config).eval().double(), random.Random(0)
    beginnings = [[choose.randrange(16) for _ in range(8)] for _ in range(3)]
    kinds = [
        Request(
            choose.choice(beginnings)[: choose.randint(1, 8)] + [choose.randrange(16) for _ in range(number % 3)],
            choose.randint(1, 8),
            Sampling(temperature=0.0 if number % 2 else 2.0),
            seed=number,
            stop=3,
        )
        for number in range(40)
    ]
    expected = [answers(Engine(model), [kind])[0] for kind in kinds]
    engine = Engine(model, n_tokens=48, max_sequences=12, block_size=2, chunk=6)

    kind_of: dict[int, int] = {}
    got: dict[int, list[int]] = defaultdict(list)
    there: list[int] = []
    joined = left = 0
    while joined + left < 10_000:
        for _ in range(choose.randint(0, 6)):
            kind = choose.randrange(len(kinds))
            number = engine.submit(kinds[kind])
            kind_of[number] = kind
            there.append(number)
            joined += 1
        if there and choose.random() < 0.2:
            number = there.pop(choose.randrange(len(there)))
            engine.cancel(number)
            begun = got.pop(number, [])
            assert begun == expected[kind_of.pop(number)][: len(begun)]
            left += 1
        while engine.n_waiting > 12 or choose.random() < 0.7:
            for event in engine.step():
                if event.token is not None:
                    got[event.request].append(event.token)
                if event.finish:
                    there.remove(event.request)
                    assert got.pop(event.request, []) == expected[kind_of.pop(event.request)]
                    left += 1
    for (number, _), events in run(engine).items():
        assert got.pop(number, []) + tokens_of(events) == expected[kind_of.pop(number)]

    assert not kind_of
    assert engine.statistics.preemptions > 100 and engine.statistics.shared_tokens > 1000
    assert engine.cache.groups[0].pool.holders == [0] * 24
