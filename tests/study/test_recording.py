"""What a recorded row says, against forward passes of its window alone; and that recording leaves no trace."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from moe import presets
from moe.config import CapacityConfig, ModelConfig, Preset, RouterConfig
from moe.data.prepare import HeldOut, PreparedCorpus
from moe.data.tokenizer import train_bpe
from moe.errors import UserError
from moe.model.transformer import Transformer
from moe.study import recording
from moe.study.leakage import tiny_model
from moe.study.record import EMPTY, Record
from moe.study.recording import record_sample, record_validation, vocabulary_of
from moe.study.storage import read_record
from moe.training.evaluate import validate

END = 0
LENGTH = 8


def corpus_of(**streams: list[int]) -> PreparedCorpus:
    """A corpus whose held-out text is these tokens, and nothing else."""
    held_out = {
        domain: HeldOut(names=("text",), documents=(b"text",), stream=np.array(stream, np.uint16))
        for domain, stream in streams.items()
    }
    return PreparedCorpus(
        folder=Path(),
        shares={domain: Fraction(1, len(streams)) for domain in streams},
        tokenizer=train_bpe(["a"], 260),
        train={},
        validation=held_out,
        manifest={},
    )


def random_stream(n_tokens: int, seed: int) -> list[int]:
    """Documents of 13 tokens, each after an end of text."""
    ids = np.random.default_rng(seed).integers(1, 64, n_tokens)
    ids[::14] = END
    return ids.tolist()


@pytest.fixture(scope="module")
def corpus() -> PreparedCorpus:
    return corpus_of(prose=random_stream(100, 0), code=random_stream(61, 1))


def model_of(**router: object) -> Transformer:
    return tiny_model(ModelConfig(router=RouterConfig(**router)), 0)


def record(model: Transformer, corpus: PreparedCorpus, folder: Path, **options: object) -> Record:
    record_validation(model, corpus, folder / "record", sequence_length=LENGTH, **options)
    return read_record(folder / "record")


# ------------------------------------------------------------------------------------------------------- which rows


def test_each_text_token_is_the_target_of_one_row(tmp_path: Path) -> None:
    """A stream of 10 tokens in windows of 4: two whole ones, and the last, moved back, adds one row."""
    corpus = corpus_of(prose=[END, 11, 12, 13, END, 21, 22, 23, 24, 25], code=[END, 31, 32])

    record_validation(model_of(), corpus, tmp_path / "record", sequence_length=4)

    found = read_record(tmp_path / "record")
    rows = zip(found.token_id, found.target_id, found.position, found.sequence, found.domain, strict=True)
    assert list(rows) == [
        (END, 11, 0, 0, 0),
        (11, 12, 1, 0, 0),
        (12, 13, 2, 0, 0),  # after 13 comes an end of text, which is no target
        (END, 21, 0, 1, 0),
        (21, 22, 1, 1, 0),
        (22, 23, 2, 1, 0),
        (23, 24, 3, 1, 0),
        (24, 25, 3, 2, 0),
        (END, 31, 0, 3, 1),
        (31, 32, 1, 3, 1),
    ]
    assert found.domains == ("prose", "code")


def test_losses_are_those_of_validation(corpus: PreparedCorpus, tmp_path: Path) -> None:
    model = model_of()

    found = record(model, corpus, tmp_path)

    scores = validate(model, corpus, LENGTH, LENGTH, "fp32").domains
    for index, domain in enumerate(found.domains):
        mine = found.loss[found.domain == index]
        assert len(mine) == scores[domain].tokens
        assert mine.sum(dtype=np.float64) == pytest.approx(scores[domain].nats, rel=1e-6)


# ------------------------------------------------------------------------------------------------------ what they say


def windows_of(corpus: PreparedCorpus) -> list[torch.Tensor]:
    """The windows of each domain, by the rule in words: LENGTH apart, the last moved back."""
    windows = []
    for held_out in corpus.validation.values():
        stream = torch.from_numpy(held_out.stream.astype(np.int64))
        last = len(stream) - 1 - LENGTH
        begins = [*range(0, last, LENGTH), last]
        windows.append(torch.stack([stream[begin : begin + LENGTH + 1] for begin in begins]))
    return windows


@pytest.mark.parametrize("block_bytes", [4 << 20, 4 * 64 * 7], ids=["whole", "7 rows at a time"])
def test_loss_and_prediction_are_those_of_the_logits(
    corpus: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setitem(recording.BLOCK_BYTES, "cpu", block_bytes)
    model = model_of()

    found = record(model, corpus, tmp_path)

    model.eval()
    windows = [window for domain in windows_of(corpus) for window in domain]
    for row in range(found.n_tokens):
        window = windows[found.sequence[row]]
        position = found.position[row]
        logits = model(window[None, : position + 1])[0][0, -1]
        assert window[position] == found.token_id[row]
        assert window[position + 1] == found.target_id[row]
        assert logits.argmax() == found.predicted_id[row]
        expected = logits.logsumexp(0) - logits[found.target_id[row]]
        assert found.loss[row] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("preset", [None, *get_args(Preset)])
def test_every_router_is_recorded_as_it_routed(corpus: PreparedCorpus, tmp_path: Path, preset: str | None) -> None:
    """Place by place against the routing of the same batches; a router may compare the tokens of a batch."""
    config = ModelConfig() if preset is None else presets.model_config(preset)
    model = tiny_model(config, 0).train()
    state = torch.get_rng_state()

    found = record(model, corpus, tmp_path)

    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    model.eval()
    first_sequence = 0
    for domain in windows_of(corpus):
        routings = model(domain[:, :-1])[1]
        mine = (found.sequence >= first_sequence) & (found.sequence < first_sequence + len(domain))
        token = (found.sequence[mine] - first_sequence) * LENGTH + found.position[mine]
        for layer, routing in zip(found.layers, routings, strict=True):
            empty = torch.zeros_like(routing.selected, dtype=torch.bool)
            if routing.assigned is not None:
                empty = ~routing.assigned
            selected = np.where(empty.numpy(), EMPTY, routing.selected.numpy())[token]
            np.testing.assert_array_equal(layer.selected[mine], selected)
            np.testing.assert_array_equal(layer.weights[mine], routing.weights.float().detach().numpy()[token])
            np.testing.assert_array_equal(layer.scores[mine], routing.scores.half().detach().numpy()[token])
            assert layer.n_experts == routing.n_experts
            assert not layer.dropped.any(), "capacity is a thing of training"
            assert (layer.weights[layer.selected == EMPTY] == 0).all()
        first_sequence += len(domain)
    assert first_sequence == found.sequence.max() + 1
    has_empty = any((layer.selected == EMPTY).any() for layer in found.layers)
    assert has_empty == (preset in ("expert_choice", "remoe", "top_p"))


def test_an_assignment_beyond_capacity_keeps_its_expert_and_has_no_weight(
    corpus: PreparedCorpus, tmp_path: Path
) -> None:
    capacity = CapacityConfig(factor=0.5, order="position", scope="sequence", in_evaluation=True)

    found = record(model_of(top_k=2, capacity=capacity), corpus, tmp_path)

    for layer in found.layers:
        # An expert's room in a window of 8 tokens is ceil(0.5 x 2 x 8 / 16) = 1 token.
        whole = found.sequence == 0
        kept = layer.selected[whole][~layer.dropped[whole]]
        assert np.bincount(kept, minlength=16).max() == 1
        assert layer.dropped.any()
        assert (layer.selected[layer.dropped] >= 0).all()
        assert (layer.weights[layer.dropped] == 0).all()
        assert (layer.weights[~layer.dropped] > 0).all()


def test_blocks_are_those_with_a_mixture(corpus: PreparedCorpus, tmp_path: Path) -> None:
    tiny = model_of().config
    model = Transformer(replace(tiny, n_layers=4, experts=replace(tiny.experts, every=2)))

    assert record(model, corpus, tmp_path).blocks == ("1", "3")


def test_the_vocabulary_reaches_as_far_as_the_head() -> None:
    tokenizer = train_bpe(["naïve"], 260)

    vocabulary = vocabulary_of(tokenizer, tokenizer.size + 2)

    assert vocabulary[0] == "<|endoftext|>"
    assert vocabulary[tokenizer.encode("a")[0]] == "a"
    assert vocabulary[-2:] == (f"<{tokenizer.size}>", f"<{tokenizer.size + 1}>")


def test_text_source_and_step_are_told(corpus: PreparedCorpus, tmp_path: Path) -> None:
    found = record(model_of(), corpus, tmp_path, source="runs/a", step=12, scores=False)

    assert (found.source, found.step) == ("runs/a", 12)
    assert found.text_of(0) == "<|endoftext|>"
    assert len(found.vocabulary) == 64
    assert all(layer.scores is None for layer in found.layers)


def test_bf16_is_near_and_not_the_same(corpus: PreparedCorpus, tmp_path: Path) -> None:
    model = Transformer(replace(model_of().config, init_std=0.1))
    (tmp_path / "bf16").mkdir()

    exact = record(model, corpus, tmp_path)
    rounded = record(model, corpus, tmp_path / "bf16", precision="bf16")

    assert 0 < np.abs(exact.loss - rounded.loss).max() < 0.1
    assert rounded.loss.mean() == pytest.approx(math.log(64), rel=0.2)


# ------------------------------------------------------------------------------------------------------------- a sample


def test_a_limit_takes_whole_windows_spread_evenly_and_as_many_from_each_domain(
    corpus: PreparedCorpus, tmp_path: Path
) -> None:
    rows: list[int] = []

    found = record(model_of(), corpus, tmp_path, tokens=64, advance=rows.append)

    # 64 / 2 domains / 8 a window = 4 windows each, of the 13 of prose (0, 3, 6, 9) and the 8 of code (0, 2, 4, 6).
    starts = {(domain, int(found.token_id[found.sequence == n][0])) for n, domain in enumerate([0] * 4 + [1] * 4)}
    prose, code = (held_out.stream for held_out in corpus.validation.values())
    assert starts == {(0, int(prose[8 * n])) for n in (0, 3, 6, 9)} | {(1, int(code[8 * n])) for n in (0, 2, 4, 6)}
    assert found.sequence.max() == 7
    assert sum(rows) == found.n_tokens
    assert 64 - 2 * 4 <= found.n_tokens <= 64


def test_a_domain_of_less_text_gives_all_it_has(tmp_path: Path) -> None:
    corpus = corpus_of(long=random_stream(400, 0), short=[END, 5, 6])

    found = record(model_of(), corpus, tmp_path, tokens=160)

    assert (found.domain == 1).sum() == 2
    assert len(np.unique(found.sequence[found.domain == 0])) == 10


def test_samples_are_of_the_same_tokens_and_without_scores(corpus: PreparedCorpus, tmp_path: Path) -> None:
    first = record_sample(model_of(), corpus, tmp_path, 20, sequence_length=LENGTH, tokens=48, source="a")
    second = record_sample(model_of(top_k=1, normalise=False), corpus, tmp_path, 100, sequence_length=LENGTH, tokens=48)

    assert [path.name for path in (first, second)] == ["step-00000020", "step-00000100"]
    one, other = read_record(first), read_record(second)
    assert (one.step, other.step, one.source) == (20, 100, "a")
    for name in ("token_id", "target_id", "position", "sequence", "domain"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert all(layer.scores is None for layer in one.layers)


def test_the_sample_of_a_step_that_is_taken_again_is_replaced(corpus: PreparedCorpus, tmp_path: Path) -> None:
    record_sample(model_of(), corpus, tmp_path, 5, sequence_length=LENGTH, source="before")

    folder = record_sample(model_of(), corpus, tmp_path, 5, sequence_length=LENGTH, source="after")

    assert read_record(folder).source == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("preset", ["shazeer", "grin", "random", "base"])
def test_training_goes_on_as_if_nothing_had_been_recorded(corpus: PreparedCorpus, tmp_path: Path, preset: str) -> None:
    """Routers that draw noise in training, and dropout: three steps with a sample after each are those without."""

    def train(recording: bool) -> dict[str, torch.Tensor]:
        model = Transformer(replace(tiny_model(presets.model_config(preset), 0).config, dropout=0.2)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tokens = torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(3))
        torch.manual_seed(1)
        for step in range(3):
            model(tokens)[0].logsumexp(-1).sum().backward()
            optimizer.step()
            if recording:
                record_sample(model, corpus, tmp_path, step, sequence_length=LENGTH)
        return model.state_dict()

    without, with_samples = train(False), train(True)

    assert all(torch.equal(without[name], with_samples[name]) for name in without)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_the_same_model_gives_the_same_files(corpus: PreparedCorpus, tmp_path: Path) -> None:
    for name in ("one", "other"):
        record_validation(model_of(), corpus, tmp_path / name, sequence_length=LENGTH)

    assert {path.name for path in (tmp_path / "one").iterdir()} == {"_record.json", "shard-00000.parquet"}
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_a_dense_model_has_nothing_to_record(corpus: PreparedCorpus, tmp_path: Path) -> None:
    dense = Transformer(replace(model_of().config, dense_twin=True))

    with pytest.raises(UserError, match=r"model\.dense_twin: is true: a dense model has no routing to record"):
        record(dense, corpus, tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_recording_leaves_the_mode_and_no_folder(corpus: PreparedCorpus, tmp_path: Path) -> None:
    model = model_of().train()

    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(model, corpus, tmp_path, advance=stop)

    assert model.training
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_records_what_a_cpu_records(corpus: PreparedCorpus, tmp_path: Path) -> None:
    """In float64, so that no near-tie is decided otherwise."""
    (tmp_path / "gpu").mkdir()

    on_cpu = record(model_of(), corpus, tmp_path)
    on_gpu = record(model_of().cuda(), corpus, tmp_path / "gpu")

    np.testing.assert_array_equal(on_cpu.predicted_id, on_gpu.predicted_id)
    np.testing.assert_allclose(on_cpu.loss, on_gpu.loss, rtol=1e-6)
    for mine, other in zip(on_cpu.layers, on_gpu.layers, strict=True):
        np.testing.assert_array_equal(mine.selected, other.selected)
        np.testing.assert_allclose(mine.weights, other.weights, rtol=1e-6)
