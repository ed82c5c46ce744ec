"""Does what a router declares hold? Edit what it must not know of, and see whether a logit changes.

A router that compares tokens tells an earlier token something about a later one, or one sequence something about
another, whatever attention masks (Wang et al. 2024, arXiv 2408.15664, bound how much expert choice can tell).
:meth:`~moe.config.RouterConfig.is_causal` and :meth:`~moe.config.RouterConfig.is_batch_independent` declare which
routers do; :func:`check_router` tries it out on a small model with random weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig, RouterConfig, SharedExpertsConfig, require
from moe.model.transformer import Transformer

Edit = Literal["future", "batch-mates", "all futures"]
"""what is edited: the tokens of one sequence after a cut, all other sequences, or all sequences after a cut; the logits
that must stay are those of the sequence before the cut, all of the sequence, and those of all before the cut"""
EDITS: tuple[Edit, ...] = get_args(Edit)

DEFAULT_EDITS = 16
N_SEQUENCES = 4
LENGTH = 24
ROUNDING = 1e-9
"""A change of a logit above this is no rounding.

Another split of the tokens among the experts changes the last digits of their matrix products. Over all presets and
three seeds (8352 edits) that moved a logit, which is of order 1 to 10, by 2.2e-14 at most; a leak, which gives or takes
an expert, moved one by 2e-3 at least, and nothing lay between.
"""

_VOCABULARY = 64
_WIDTH = 16
_INIT_STD = 0.5


@dataclass(frozen=True)
class Finding:
    """What became of the edits of one kind in one mode."""

    training: bool
    """the mode of the model; else evaluation"""
    edit: Edit
    edits: int
    """how many were tried"""
    changed: int
    """how many of them changed a logit that they must not reach, by more than :data:`ROUNDING`"""
    largest: float
    """largest change of such a logit"""
    declared_clean: bool
    """whether the router declares that there is no such change"""

    @property
    def holds(self) -> bool:
        """Whether the edits agree with the declaration: none seen where none is declared, some where some are."""
        return (self.changed == 0) == self.declared_clean

    @property
    def verdict(self) -> str:
        """The same in words."""
        if self.holds:
            return "holds"
        return "LEAKS, and declared clean" if self.declared_clean else "declared leaking, not seen"


def declared_clean(router: RouterConfig, edit: Edit, *, training: bool) -> bool:
    """Whether ``router`` declares that ``edit`` changes nothing where it must not."""
    causal, independent = router.is_causal(training=training), router.is_batch_independent(training=training)
    # The future of all sequences reaches an earlier token through its own sequence or through another.
    return {"future": causal, "batch-mates": independent, "all futures": causal and independent}[edit]


def check_router(
    config: ModelConfig,
    *,
    edits: int = DEFAULT_EDITS,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> list[Finding]:
    """Try ``edits`` random edits of each kind in each mode on a tiny model with the router of ``config``.

    A finding for each mode (training first) and kind, in the order of :data:`EDITS`. ``advance`` is called after each
    round of one edit of each kind, 2 · ``edits`` times. Noise is the same before and after an edit: the shapes never
    change, and the seed of torch is set before each forward pass (torch's own state is put back in the end). Raises
    ConfigError for a model without a mixture layer.
    """
    require(bool(config.moe_layers), "model.dense_twin", "is true: there is no router to check")
    findings = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = tiny_model(config, seed)
        for training in (True, False):
            model.train(training)
            generator = torch.Generator().manual_seed(seed)
            changes: dict[Edit, list[float]] = {edit: [] for edit in EDITS}
            for _ in range(edits):
                for edit, change in _one_round(model, generator).items():
                    changes[edit].append(change)
                advance()
            findings += [
                Finding(
                    training=training,
                    edit=edit,
                    edits=edits,
                    # A NaN is a change too, whatever it is compared with.
                    changed=sum(not change <= ROUNDING for change in changes[edit]),
                    largest=max(changes[edit], key=lambda change: (change != change, change), default=0.0),
                    declared_clean=declared_clean(config.router, edit, training=training),
                )
                for edit in EDITS
            ]
    return findings


def _one_round(model: Transformer, generator: torch.Generator) -> dict[Edit, float]:
    """Draw a batch and edit it in each way; the largest change of a logit that the edit must not reach."""

    def draw(low: int, high: int, size: tuple[int, ...] = ()) -> Int[Tensor, "..."]:
        return torch.randint(low, high, size, generator=generator)

    noise_seed = int(draw(0, 2**31))
    tokens = draw(0, _VOCABULARY, (N_SEQUENCES, LENGTH))
    # No token stays what it was.
    others = (tokens + draw(1, _VOCABULARY, tuple(tokens.shape))) % _VOCABULARY
    sequence, cut = int(draw(0, N_SEQUENCES)), int(draw(1, LENGTH))
    before = _logits(model, tokens, noise_seed)

    own = torch.zeros_like(tokens, dtype=torch.bool)
    own[sequence] = True
    later = (torch.arange(LENGTH) >= cut).expand_as(own)
    edited: dict[Edit, Tensor] = {"future": own & later, "batch-mates": ~own, "all futures": later}
    kept: dict[Edit, Tensor] = {"future": own & ~later, "batch-mates": own, "all futures": ~later}
    changes: dict[Edit, float] = {}
    for edit in EDITS:
        after = _logits(model, others.where(edited[edit], tokens), noise_seed)
        changes[edit] = float((after - before)[kept[edit]].abs().max())
    return changes


def _logits(model: Transformer, tokens: Int[Tensor, "B S"], noise_seed: int) -> Float[Tensor, "B S V"]:
    # Not torch.manual_seed, which takes a picture of the stack for each kind of device.
    torch.default_generator.manual_seed(noise_seed)
    logits: Tensor = model(tokens)[0]
    return logits


def tiny_model(config: ModelConfig, seed: int) -> Transformer:
    """Two mixture layers with the experts, the router and the special experts of ``config``, narrow, in float64.

    Nothing is left as an untrained model has it, where a leak could hide: weights are large, so that experts and logits
    differ; what starts at a constant (biases, noise, gates, selection biases) is random; and all embeddings share a
    direction, as those of trained models do, so that some experts are wanted more than others and capacities are full.
    """
    tiny = replace(
        config,
        vocab_size=_VOCABULARY,
        n_layers=2,
        d_model=_WIDTH,
        max_seq=LENGTH,
        dropout=0.0,
        init_std=_INIT_STD,
        attention=AttentionConfig(n_heads=2, head_dim=_WIDTH // 2),
        feed_forward=replace(config.feed_forward, d_ff=None),
        # The reference loop computes in float64, and a row alone as with others but for the last digits.
        experts=ExpertsConfig(n_experts=config.experts.n_experts, d_ff=8, backend="reference"),
        shared=SharedExpertsConfig(n_experts=config.shared.n_experts, gated=config.shared.gated),
    )
    model = Transformer(tiny, seed).double()
    generator = torch.Generator().manual_seed(seed)

    def noise_like(values: Tensor) -> Tensor:
        return _INIT_STD * torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values.dtype)

    with torch.no_grad():
        constants = [parameter for parameter in model.parameters() if parameter.dim() and _is_constant(parameter)]
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("selection_bias")]
        for values in constants + biases:
            values.add_(noise_like(values))
        model.embedding.weight.add_(noise_like(model.embedding.weight[0]))
    return model


def _is_constant(values: Tensor) -> bool:
    return bool((values == values.flatten()[0]).all())


# --------------------------------------------------------------------------------------------------------------- tables

_WORDS: dict[Edit, tuple[str, str]] = {
    "future": ("a sequence's future", "its past"),
    "batch-mates": ("its batch-mates", "all of it"),
    "all futures": ("every future", "every past"),
}


def findings_table(name: str, findings: Sequence[Finding]) -> str:
    """One router in full: a line for each mode and kind of edit."""
    rows = [["mode", "edited", "compared", "edits that changed a logit", "largest change", "declared", "verdict"]]
    for finding in findings:
        rows.append(
            [
                "training" if finding.training else "evaluation",
                *_WORDS[finding.edit],
                f"{finding.changed} of {finding.edits}",
                f"{finding.largest:.1e}",
                "clean" if finding.declared_clean else "leaks",
                finding.verdict,
            ]
        )
    return f"{name}\n\n{_aligned(rows)}"


def overview_table(findings: Mapping[str, Sequence[Finding]]) -> str:
    """A line a router: how many edits of each kind and mode changed a logit, and whether the declarations hold."""
    rows = [["", "training", "", "", "evaluation", "", "", ""], ["router", *EDITS, *EDITS, "declarations"]]
    for name, found in findings.items():
        false = [finding.verdict for finding in found if not finding.holds]
        cells = [f"{finding.changed} of {finding.edits}" for finding in found]
        rows.append([name, *cells, "; ".join(dict.fromkeys(false)) or "hold"])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
