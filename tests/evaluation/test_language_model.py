"""The harness's interface to a model: every answer against a pass of one sequence without padding."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig
from moe.data.prepare import PreparedCorpus
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError
from moe.evaluation.language_model import RunLM
from moe.inference.generate import generate
from moe.inference.sampling import Sampling
from moe.model.transformer import Transformer

WINDOW = 24
TEXT = "the house sleeps under a ship and the dog sings slowly or runs Käse"


@pytest.fixture(scope="module")
def tokenizer(corpus: PreparedCorpus) -> Tokenizer:
    return corpus.tokenizer


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    """Two layers of four experts, initialised widely enough that each token has its own favourites."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.size,
        n_layers=2,
        d_model=32,
        max_seq=64,
        init_std=0.3,
        attention=AttentionConfig(n_heads=2, head_dim=16),
        experts=ExpertsConfig(n_experts=4, d_ff=16),
    )
    return Transformer(config).eval()


@pytest.fixture
def lm(model: Transformer, tokenizer: Tokenizer) -> RunLM:
    """Windows of 24 tokens, three sequences at once."""
    return RunLM(model, tokenizer, max_length=WINDOW, batch_size=3)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


@torch.no_grad()
def nats_of(model: Transformer, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """One sequence, alone: the last 24 tokens before each end, as the window holds them."""
    read = [*context, *continuation][-(WINDOW + 1) :][:-1]
    log_probabilities = model(torch.tensor([read]))[0][0, -len(continuation) :].double().log_softmax(-1)
    targets = torch.tensor(continuation)
    total = log_probabilities.gather(1, targets[:, None]).sum().item()
    return total, bool((log_probabilities.argmax(-1) == targets).all())


# --------------------------------------------------------------------------------------------------------- likelihoods


def test_likelihoods_are_those_of_sequences_alone(lm: RunLM, model: Transformer, tokenizer: Tokenizer) -> None:
    """Contexts of many lengths in batches of three: padding changes no answer, nor does the order."""
    pairs = [(" ".join(TEXT.split()[:words]), " the dog") for words in (1, 9, 3, 12, 5, 2, 7)]

    found = lm.loglikelihood(asked("loglikelihood", *pairs))

    for (context, continuation), (nats, greedy) in zip(pairs, found, strict=True):
        whole = [tokenizer.end_of_text, *tokenizer.encode(context + continuation)]
        before = [tokenizer.end_of_text, *tokenizer.encode(context)]
        expected = nats_of(model, before, whole[len(before) :])
        assert nats == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]


def test_an_empty_context_is_an_end_of_text(lm: RunLM, model: Transformer, tokenizer: Tokenizer) -> None:
    [(nats, _)] = lm.loglikelihood(asked("loglikelihood", ("", "the dog")))

    assert nats == pytest.approx(nats_of(model, [tokenizer.end_of_text], tokenizer.encode("the dog"))[0], abs=1e-4)


def test_a_space_before_the_answer_counts_to_the_answer(lm: RunLM) -> None:
    """Tokens of words hold the space before them: where a question ends in one, that is the answer's."""
    with_space, without = lm.loglikelihood(asked("loglikelihood", ("the ", "dog"), ("the", " dog")))

    assert with_space == without


def test_a_long_context_loses_its_beginning(lm: RunLM, model: Transformer, tokenizer: Tokenizer) -> None:
    """What the model reads are the last 24 tokens before the answer's last one."""
    context = " ".join([TEXT] * 4)
    before, answer = tokenizer.encode(context), tokenizer.encode(" the dog")
    assert len(before) > 2 * WINDOW

    [(nats, _)] = lm.loglikelihood(asked("loglikelihood", (context, " the dog")))

    assert nats == pytest.approx(nats_of(model, before, answer)[0], abs=1e-4)


def test_what_greedy_decoding_writes_is_told(lm: RunLM, model: Transformer, tokenizer: Tokenizer) -> None:
    """Two greedy tokens after a text, and the same with another last one."""
    context = [tokenizer.end_of_text, *tokenizer.encode(TEXT[:20])]
    [written] = generate(model, [context], 2, Sampling(temperature=0.0))
    other = [written[0], (written[1] + 1) % tokenizer.size]

    [(_, right), (_, wrong)] = lm._loglikelihood_tokens([(None, context, written), (None, context, other)])

    assert right and not wrong


def test_choices_after_one_context_are_read_once(lm: RunLM, tokenizer: Tokenizer) -> None:
    """Four choices of a token each: the model reads the same tokens for all of them, so one row does."""
    context = [tokenizer.end_of_text, *tokenizer.encode("the house")]
    rows: list[int] = []
    hidden = lm._hidden
    lm._hidden = lambda some: rows.append(len(some)) or hidden(some)  # type: ignore[method-assign, func-returns-value]

    answers = lm._loglikelihood_tokens([(None, context, [token]) for token in (5, 6, 7, 8)])

    assert rows == [1]
    assert len({nats for nats, _ in answers}) == 4


def test_batches_are_of_like_lengths_and_the_longest_is_first(lm: RunLM) -> None:
    rows = [(1,) * length for length in (2, 9, 4, 7, 9, 1, 3)]

    lengths = [[len(row) for row in some] for some in lm._batches(rows)]

    assert lengths == [[9, 9, 7], [4, 3, 2], [1]]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, WINDOW)), min_size=1, max_size=7), st.integers(1, 4))
def test_any_lengths_in_any_batches(
    model: Transformer, tokenizer: Tokenizer, lengths: list[tuple[int, int]], batch_size: int
) -> None:
    lm = RunLM(model, tokenizer, max_length=WINDOW, batch_size=batch_size)
    source = torch.Generator().manual_seed(len(lengths))
    requests = [
        tuple(torch.randint(0, tokenizer.size, (n,), generator=source).tolist() for n in pair) for pair in lengths
    ]

    found = lm._loglikelihood_tokens([(None, context, continuation) for context, continuation in requests])

    for (context, continuation), (nats, greedy) in zip(requests, found, strict=True):
        expected = nats_of(model, context, continuation)
        assert nats == pytest.approx(expected[0], abs=1e-3)
        assert greedy == expected[1]


def test_an_answer_that_adds_no_token_is_refused(lm: RunLM) -> None:
    with pytest.raises(UserError, match="'dog' adds no token to what stands before it: end the context at a word"):
        lm._loglikelihood_tokens([(("the dog", "dog"), [1, 2], [])])


def test_an_answer_longer_than_the_window_is_refused(lm: RunLM) -> None:
    with pytest.raises(UserError, match=r"continuation of 25 tokens does not fit the 24 .*--sequence-length"):
        lm._loglikelihood_tokens([(None, [1], [2] * 25)])


# ---------------------------------------------------------------------------------------------------------- whole texts


def test_a_whole_text_is_scored_after_an_end_of_text(lm: RunLM, model: Transformer, tokenizer: Tokenizer) -> None:
    text = "the dog sings"

    [nats] = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))

    assert nats == pytest.approx(nats_of(model, [tokenizer.end_of_text], tokenizer.encode(text))[0], abs=1e-4)


def test_a_long_text_is_scored_in_windows_each_token_once(lm: RunLM, model: Transformer, tokenizer: Tokenizer) -> None:
    """Windows of 24 by hand: the last one is full too, and scores what is left."""
    text = " ".join([TEXT] * 3)
    tokens = tokenizer.encode(text)
    assert len(tokens) % WINDOW, "the last window is not like the others"
    expected, done = 0.0, 0
    while done < len(tokens):
        end = min(done + WINDOW, len(tokens))
        before = [tokenizer.end_of_text] if done == 0 else tokens[max(0, end - WINDOW - 1) : done]
        expected += nats_of(model, before, tokens[done:end])[0]
        done = end

    [alone, _, again] = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,), ("the",), (text,)))

    assert alone == pytest.approx(expected, abs=1e-3)
    assert again == alone


# ----------------------------------------------------------------------------------------------------------- generation


def written_by(model: Transformer, tokenizer: Tokenizer, context: str, n_tokens: int, room: int = WINDOW) -> str:
    """Greedily after the last ``room`` tokens of a context, alone and in one go."""
    prompt = [tokenizer.end_of_text, *tokenizer.encode(context)][-room:]
    [tokens] = generate(model, [prompt], n_tokens, Sampling(temperature=0.0), stop=tokenizer.end_of_text)
    return tokenizer.decode(tokens)


def test_what_is_written_is_what_each_context_gives_alone(lm: RunLM, model: Transformer, tokenizer: Tokenizer) -> None:
    contexts = ["the", "a house sleeps", "", "under a ship and", "the dog"]
    settings = {"until": [], "max_gen_toks": 8, "do_sample": False}

    found = lm.generate_until(asked("generate_until", *((context, settings) for context in contexts)))

    assert found == [written_by(model, tokenizer, context, 8) for context in contexts]
    assert len(set(found)) > 1, "there is something to get wrong"


def test_blocks_join_to_what_is_written_in_one_go(model: Transformer, tokenizer: Tokenizer) -> None:
    """30 tokens come in blocks of 16 and 14, between which a window that is long enough loses nothing."""
    lm = RunLM(model, tokenizer, max_length=64)
    settings = {"until": ["no such text"], "max_gen_toks": 30, "do_sample": False}

    [found] = lm.generate_until(asked("generate_until", ("the dog", settings)))

    assert found == written_by(model, tokenizer, "the dog", 30)


def test_a_long_context_leaves_room_for_what_is_written(lm: RunLM, model: Transformer, tokenizer: Tokenizer) -> None:
    """Of 24 tokens 8 are to be written: of the context the last 16 are read."""
    context = " ".join([TEXT] * 3)

    [found] = lm.generate_until(asked("generate_until", (context, {"until": [], "max_gen_toks": 8})))

    assert found == written_by(model, tokenizer, context, 8, room=16)


def test_it_ends_before_the_first_string_to_stop_at(lm: RunLM, model: Transformer, tokenizer: Tokenizer) -> None:
    """A string that the model writes all by itself, and one that comes later."""
    whole = written_by(model, tokenizer, "the dog", 12)
    early, late = whole[2:4], whole[6:8]
    assert early and late

    [found] = lm.generate_until(asked("generate_until", ("the dog", {"until": [late, early], "max_gen_toks": 12})))

    assert found == whole[: min(whole.find(early), whole.find(late))]


def test_an_end_of_text_ends_it(lm: RunLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that writes one token and then the end: the row takes no part in the blocks after that."""
    asked_for: list[int] = []

    def fake(_: object, prompts: list[list[int]], n_tokens: int, *__: object, **___: object) -> list[list[int]]:
        asked_for.append(len(prompts))
        return [[tokenizer.encode("a")[0]] * (n_tokens if prompt[1] % 2 else 1) for prompt in prompts]

    monkeypatch.setattr("moe.evaluation.language_model.generate", fake)
    lm.max_length = 64
    odd = next(word for word in ("a", "b", "c", "d") if tokenizer.encode(word)[0] % 2)
    even = next(word for word in ("a", "b", "c", "d") if not tokenizer.encode(word)[0] % 2)

    long, short = lm.generate_until(
        asked("generate_until", *((word, {"until": ["§"], "max_gen_toks": 20}) for word in (odd, even)))
    )

    assert asked_for == [2, 1]
    assert (long, short) == ("a" * 20, "a")


def test_no_more_is_written_than_half_of_the_window_and_that_is_said_once(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    said: list[str] = []
    lm = RunLM(model, tokenizer, max_length=WINDOW, say=said.append)

    found = lm.generate_until(asked("generate_until", *((word, {"until": []}) for word in ("the", "a"))))

    assert found == [written_by(model, tokenizer, word, 12) for word in ("the", "a")]
    assert said == ["a task wants up to 256 new tokens; 12 are written, half of what the model reads at once"]


def test_draws_are_the_same_every_time_and_settings_that_are_left_out_are_said(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    said: list[str] = []
    lm = RunLM(model, tokenizer, max_length=WINDOW, say=said.append)
    drawn = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 50, "length_penalty": 2}

    one, other = (lm.generate_until(asked("generate_until", ("the dog", drawn))) for _ in range(2))

    assert one == other != [written_by(model, tokenizer, "the dog", 12)]
    assert said == ["left out of a task's generation settings: length_penalty"]


def test_settings_that_are_none_are_refused(lm: RunLM) -> None:
    with pytest.raises(UserError, match="a task's generation settings: "):
        lm.generate_until(asked("generate_until", ("a", {"do_sample": True, "temperature": -1.0, "max_gen_toks": 4})))
