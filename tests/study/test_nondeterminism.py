"""One prompt among many strangers: a capacity that a batch shares gives it many answers, and dropless routing one."""

import pytest
import torch

from moe.config import AttentionConfig, CapacityConfig, ExpertsConfig, ModelConfig, RouterConfig
from moe.errors import UserError
from moe.model.router import Router
from moe.model.transformer import Transformer
from moe.study.nondeterminism import Setting, among_strangers, by_batch_size, exposure, greedily, sharing
from moe.study.nondeterminism_command import nondeterminism_command, picture, table

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS, STRANGERS = (torch.randint(64, (n, 6), generator=GENERATOR) for n in (2, 20))


def model_of(capacity: CapacityConfig | None = None) -> Transformer:
    """Weights so large that an expert more or less changes the likeliest token."""
    config = ModelConfig(
        vocab_size=64,
        n_layers=2,
        d_model=16,
        max_seq=32,
        init_std=0.5,
        deterministic=True,
        attention=AttentionConfig(n_heads=2, head_dim=8),
        experts=ExpertsConfig(n_experts=4, d_ff=8),
        router=RouterConfig(capacity=capacity or CapacityConfig()),
    )
    return Transformer(config).eval()


def test_dropless_gives_one_answer_and_a_tight_capacity_many() -> None:
    model = model_of()
    outcomes = [
        among_strangers(model, setting, PROMPTS, STRANGERS, n_new=4, trials=5, batch=4)
        for setting in (Setting(None), Setting(2.0), Setting(0.5), Setting(0.5, place="first"))
    ]
    dropless, roomy, tight, first = outcomes
    # 2 of 4 experts a token: from a factor of E/k = 2 on nothing is dropped.
    for outcome in (dropless, roomy):
        assert outcome.unique == [1, 1] and outcome.mean == 1
        assert outcome.difference == outcome.prefill.share == outcome.decode.share == 0
    assert tight.mean > 1 and tight.difference > 0
    # Half of the assignments find no room, of 4 requests x 6 tokens x 2 choices x 2 layers at least.
    assert tight.prefill.share >= 0.5
    assert tight.prefill.assigned == 2 * 5 * 4 * 6 * 2 * 2
    assert tight.decode.assigned == 2 * 5 * 4 * 3 * 2 * 2
    # Who comes first always finds room, in the order of the tokens.
    assert first.unique == [1, 1] and first.difference == 0


def test_batches_computed_at_once_share_nothing() -> None:
    """Two batches of four at once, against each alone with the capacity of the model's own."""
    capacity = CapacityConfig(factor=0.75, order="choice", in_evaluation=True)
    tokens = STRANGERS[:8]
    with torch.no_grad():
        alone = torch.cat([model_of(capacity)(half)[0] for half in tokens.split(4)])
        model = model_of()
        with sharing(model, Setting(0.75, order="choice"), 2) as counted:
            together = model(tokens)[0]
    assert torch.equal(together, alone)
    assert counted[0].dropped > 0
    assert not any("within_capacity" in vars(module) for module in model.modules() if isinstance(module, Router))


def test_greedy_decoding_reads_from_its_cache_what_it_would_read_anew() -> None:
    model = model_of()
    steps = [chosen for chosen, _ in greedily(model, PROMPTS, 3)]
    text = torch.cat([PROMPTS, torch.stack(steps, dim=1)], dim=1)
    with torch.no_grad():
        assert torch.equal(model(text)[0].argmax(dim=-1)[:, 5:8], torch.stack(steps, dim=1))


def test_a_stranger_reaches_a_prompt_through_the_capacity_alone() -> None:
    model = model_of()
    closed, open_, first = (
        exposure(model, setting, PROMPTS, STRANGERS, trials=5, batch=4)
        for setting in (Setting(None), Setting(0.5), Setting(0.5, place="first"))
    )
    assert closed.swapped == closed.copied == closed.flipped == 0
    assert open_.swapped > 0.01 and open_.copied > 0.01
    assert first.swapped == first.copied == 0


def test_the_rival_is_measured_without_a_capacity_and_shown() -> None:
    model = model_of(CapacityConfig(factor=0.5, in_evaluation=True))
    rival = by_batch_size(model, PROMPTS, STRANGERS, n_new=2, largest=3)
    assert rival.unique == [1, 1] and rival.difference == 0  # this model's arithmetic knows no batch either
    setting = Setting(None)
    outcome = among_strangers(model, setting, PROMPTS, STRANGERS, n_new=2, trials=2, batch=3)
    reach = exposure(model, setting, PROMPTS, STRANGERS, trials=2, batch=3)
    shown = table([setting], [outcome], [reach], [rival, rival])
    assert "dropless" in shown and "batches of 1 to 3" in shown
    assert [trace.name for trace in picture([setting], [outcome], 2).data] == ["prompt 1", "prompt 2", "mean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one run folder is needed, and 0 were given"),
        (["runs/a", "--batch", "1"], "--batch is 1, and must be 2 or more"),
        (["runs/a", "--out", "a.txt"], "--out is a.txt, and must end in one of"),
        (["runs/a", "--model.n_layers", "2"], "--model.n_layers belongs to training"),
        (["no-such-run"], "no-such-run"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        nondeterminism_command(arguments)
