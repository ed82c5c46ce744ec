"""All that is known of one model's routing, with a method for each question.

import moe.study

study = moe.study.load("runs/a")
study.saturation()
study.domain_specialisation().plot()
"""

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from moe.data.batches import Batch
from moe.data.prepare import PreparedCorpus
from moe.errors import UserError
from moe.model.transformer import Transformer
from moe.study import ablation
from moe.study.measurement import Array, Axis, Measurement
from moe.study.metrics import load as loads
from moe.study.metrics import pairs, similarity, specialisation, stability
from moe.study.metrics.load import Choice, DropsBy, Over
from moe.study.metrics.specialisation import By, TypicalToken
from moe.study.page.findings import findings
from moe.study.record import Record
from moe.study.recording import held_out_windows, record_validation
from moe.study.storage import HEADER, read_record
from moe.training import checkpoint
from moe.training.checkpoint import Checkpoint
from moe.training.machine import choose_device
from moe.training.run_folder import RunFolder

ABLATION_TOKENS = 12288
"""held-out tokens on which each expert is knocked out by default, and each k tried"""
SAMPLE_TOKENS = 2048
"""held-out tokens on which experts' outputs and precisions are compared"""

Say = Callable[[str], None]


def on_stderr(line: str) -> None:
    """Print ``line`` where it is not mixed up with results."""
    print(line, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------- study


@dataclass(repr=False)
class Study:
    """The records of one model and, where there is a run, the way back to its weights and its text."""

    final: Record
    """every held-out token under the newest checkpoint, with scores, or what part of them was asked for"""
    over_training: tuple[Record, ...] = ()
    """one small sample of held-out text at increasing steps, without scores; empty where none was recorded"""
    run: RunFolder | None = None
    """None for a record alone"""
    checkpoint: Checkpoint | None = None
    """the weights that ``final`` is of"""
    name: str = ""
    folder: Path = Path()
    """that of the run, or of the record"""
    is_whole: bool = False
    """whether ``final`` is of all held-out text of the run"""
    is_newest: bool = True
    """whether it is of the run's newest checkpoint, and not of one that was named"""
    delta_loss: Measurement | None = None
    """what each expert is worth to each domain; None until :meth:`ablate`"""
    loss_by_k: Measurement | None = None
    """the loss with other numbers of experts; None until :meth:`ablate`"""
    say: Say = on_stderr
    """takes a line about what is being done"""

    def __repr__(self) -> str:
        step = "" if self.final.step is None else f", step {self.final.step}"
        return (
            f"<Study of {self.name or 'a record'}{step}: {self.final.n_tokens} tokens, "
            f"{len(self.final.layers)} mixture layers, {len(self.over_training)} records of training>"
        )

    # ------------------------------------------------------------------------------------------- the run behind it

    def model(self) -> Transformer:
        """The model that ``final`` is of, in evaluation mode, on the CPU; raises UserError for a record alone."""
        run, saved = self._run(), self.checkpoint
        assert saved is not None
        model = Transformer(run.config().model)
        saved.load_model(model)
        return model.eval()

    def corpus(self) -> PreparedCorpus:
        """The text that the run was trained on and tested on; raises UserError for a record alone."""
        run = self._run()
        return run.corpus(run.config().data, self.say)

    def held_out(self, tokens: int | None = None) -> list[Batch]:
        """Batches of held-out text, all of it or about so many ``tokens``, spread evenly over the domains."""
        length = self._run().config().data.sequence_length
        return list(held_out_windows(self.corpus(), length, tokens))

    def sample(self, tokens: int = SAMPLE_TOKENS) -> Int[Tensor, "B S"]:
        """About so many ``tokens`` of held-out text, for metrics that run the model."""
        return torch.cat([batch.tokens for batch in self.held_out(tokens)])

    def ablate(self, tokens: int | None = ABLATION_TOKENS) -> tuple[Measurement, Measurement | None]:
        """Knock out each expert, and try each k, on ``tokens`` of held-out text (None: all of it).

        Sets ``delta_loss`` and ``loss_by_k`` and returns them; the latter is None, and a line says why, for a router
        that decides for itself how many experts a token gets. See :mod:`~moe.study.ablation`.
        """
        model, batches = self.model().to(choose_device("auto")), self.held_out(tokens)
        domains = self.final.domains
        n_tokens = sum(int(batch.scored.sum()) for batch in batches if batch.scored is not None)
        self.say(f"knocking out each expert, and trying each k, on {n_tokens:,} tokens of held-out text")
        with _bar("experts knocked out", "pass") as advance:
            self.delta_loss = ablation.delta_loss(model, batches, domains, progress=advance)
        try:
            with _bar("numbers of experts", "pass") as advance:
                self.loss_by_k = ablation.loss_by_k(model, batches, domains, progress=advance)
        except ValueError as reason:  # there is no k to change
            self.say(f"left out: {reason}")
        return self.delta_loss, self.loss_by_k

    def facts(self) -> dict[str, str | int | float]:
        """What a page shows on top: whose routing it is, how much text was read, and the loss on it."""
        layers = self.final.layers
        facts: dict[str, str | int | float] = {"run": self.name}
        if self.final.step is not None:
            facts["step"] = self.final.step
        if layers:
            facts["mixture layers"] = len(layers)
            at_most = "up to " if any(not layer.assigned.all() for layer in layers) else ""
            facts["experts"] = (
                f"{max(layer.n_experts for layer in layers)}, {at_most}{max(layer.top_k for layer in layers)} a token"
            )
        facts["tokens read"] = self.final.n_tokens
        facts["loss"] = float(self.final.loss.mean(dtype=np.float64)) if self.final.n_tokens else math.nan
        if self.run is not None and self.is_whole:
            n_bytes = sum(len(held_out.text) for held_out in self.corpus().validation.values())
            facts["bits per byte"] = float(self.final.loss.sum(dtype=np.float64)) / math.log(2) / n_bytes
        return facts

    def findings(self, measurements: Mapping[str, Measurement]) -> list[str]:
        """What ``measurements`` (:meth:`measurements`) and the ablation say, in plain words, as the page has it."""
        layers = self.final.layers
        flows = [self.cross_layer_transitions(one.block, other.block) for one, other in pairwise(layers)]
        return findings(self.final, measurements, flows, self.delta_loss, self.loss_by_k)

    def _run(self) -> RunFolder:
        if self.run is None:
            raise UserError(f"{self.name or 'this study'}: is a record alone, and this needs the run and its weights")
        return self.run

    # ------------------------------------------------------------------------------------------------------ balance

    def load(self) -> Measurement:
        """Share of each layer's assignments by expert: :func:`moe.study.metrics.load.load`."""
        return loads.load(self.final)

    def coefficient_of_variation(self) -> Measurement:
        """Spread of the load: :func:`moe.study.metrics.load.coefficient_of_variation`."""
        return loads.coefficient_of_variation(self.final)

    def max_violation(self, over: Over = "all", batch_sequences: int = 16) -> Measurement:
        """MaxVio: :func:`moe.study.metrics.load.max_violation`."""
        return loads.max_violation(self.final, over, batch_sequences)

    def load_entropy(self) -> Measurement:
        """Evenness of the load: :func:`moe.study.metrics.load.load_entropy`."""
        return loads.load_entropy(self.final)

    def dead_experts(self, threshold: float = loads.DEAD) -> Measurement:
        """Experts that are hardly used: :func:`moe.study.metrics.load.dead_experts`."""
        return loads.dead_experts(self.final, threshold)

    def router_entropy(self) -> Measurement:
        """How undecided the router is of one token: :func:`moe.study.metrics.load.router_entropy`."""
        return loads.router_entropy(self.final)

    def experts_per_token(self) -> Measurement:
        """Experts that a token gets: :func:`moe.study.metrics.load.experts_per_token`."""
        return loads.experts_per_token(self.final)

    def experts_per_token_distribution(self) -> Measurement:
        """Tokens by how many they get: :func:`moe.study.metrics.load.experts_per_token_distribution`."""
        return loads.experts_per_token_distribution(self.final)

    def drop_rate(self, by: DropsBy = "layer", bins: int = 16) -> Measurement:
        """What found its expert full: :func:`moe.study.metrics.load.drop_rate`."""
        return loads.drop_rate(self.final, by, bins)

    # ------------------------------------------------------------------------------------------------ along the text

    def consecutive_repetition(self, choice: Choice = "first", permutations: int = 20, seed: int = 0) -> Measurement:
        """Neighbours with the same expert: :func:`moe.study.metrics.load.consecutive_repetition`."""
        return loads.consecutive_repetition(self.final, choice, permutations, seed)

    def position_dependence(self, bins: int = 16, permutations: int = 20, seed: int = 0) -> Measurement:
        """What the position tells: :func:`moe.study.metrics.load.position_dependence`."""
        return loads.position_dependence(self.final, bins, permutations, seed)

    # --------------------------------------------------------------------------------------------- experts together

    def co_activation(self) -> Measurement:
        """Experts chosen together: :func:`moe.study.metrics.pairs.co_activation`."""
        return pairs.co_activation(self.final)

    def cross_layer_transitions(self, from_layer: int, to_layer: int, choice: Choice = "first") -> Measurement:
        """From one layer's experts to another's: :func:`moe.study.metrics.pairs.cross_layer_transitions`."""
        return pairs.cross_layer_transitions(self.final, from_layer, to_layer, choice)

    def cross_layer_information(self, permutations: int = 20, seed: int = 0) -> Measurement:
        """What a layer tells of the next: :func:`moe.study.metrics.pairs.cross_layer_information`."""
        return pairs.cross_layer_information(self.final, permutations, seed)

    def expert_paths(self, top: int = 20) -> Measurement:
        """The most frequent paths: :func:`moe.study.metrics.pairs.expert_paths`."""
        return pairs.expert_paths(self.final, top)

    def distinct_paths(self, permutations: int = 5, seed: int = 0) -> Measurement:
        """How many paths occur: :func:`moe.study.metrics.pairs.distinct_paths`."""
        return pairs.distinct_paths(self.final, permutations, seed)

    # ------------------------------------------------------------------------------------------------ specialisation

    def domain_specialisation(self, permutations: int = 20, seed: int = 0) -> Measurement:
        """Which experts a domain goes to: :func:`moe.study.metrics.specialisation.domain_specialisation`."""
        return specialisation.domain_specialisation(self.final, permutations, seed)

    def domain_information(self, permutations: int = 20, seed: int = 0) -> Measurement:
        """What the expert tells of the domain, and what with the token known:
        :func:`moe.study.metrics.specialisation.domain_information`."""
        return specialisation.domain_information(self.final, permutations, seed)

    def domain_max_violation(self, permutations: int = 20, seed: int = 0) -> Measurement:
        """Imbalance within each domain: :func:`moe.study.metrics.specialisation.domain_max_violation`."""
        return specialisation.domain_max_violation(self.final, permutations, seed)

    def vocabulary_specialisation(
        self, by: By = "input", minimum_count: int = 30, permutations: int = 20, seed: int = 0
    ) -> Measurement:
        """How far a token decides its expert: :func:`moe.study.metrics.specialisation.vocabulary_specialisation`."""
        return specialisation.vocabulary_specialisation(self.final, by, minimum_count, permutations, seed)

    def typical_tokens(
        self, layer: int, top: int = 10, by: By = "input", minimum_count: int = 30
    ) -> tuple[tuple[TypicalToken, ...], ...]:
        """The tokens of each expert of a block: :func:`moe.study.metrics.specialisation.typical_tokens`."""
        return specialisation.typical_tokens(self.final, layer, top, by, minimum_count)

    def token_dependence(self, permutations: int = 20, seed: int = 0) -> Measurement:
        """What the token tells of its expert: :func:`moe.study.metrics.specialisation.token_dependence`."""
        return specialisation.token_dependence(self.final, permutations, seed)

    # ----------------------------------------------------------------------------------------------------- stability

    def saturation(self) -> Measurement:
        """How early tokens find their experts: :func:`moe.study.metrics.stability.saturation`.

        Raises ValueError where fewer than two steps were recorded (``training.record_every``).
        """
        return stability.saturation(self.over_training)

    def flip_rate(self, other: "Study | None" = None) -> Measurement:
        """Tokens that change experts: :func:`moe.study.metrics.stability.flip_rate`.

        From this study to ``other``, or, without one, from each step of ``over_training`` to the next: [layer, step,
        choice], a step being the later one. Raises ValueError as the metric does, and for fewer than two steps.
        """
        if other is not None:
            return stability.flip_rate(self.final, other.final)
        records = self.over_training
        if len(records) < 2:
            raise ValueError(f"{len(records)} records over training: flips are between at least 2")
        flips = [stability.flip_rate(*pair) for pair in pairwise(records)]

        def stacked(parts: Sequence[Array | None]) -> Array | None:
            present = [part for part in parts if part is not None]
            return np.stack(present, axis=1) if len(present) == len(parts) else None

        layer, choice = flips[0].axes
        steps = Axis("step", tuple(str(record.step) for record in records[1:]))
        return replace(
            flips[0],
            title="Tokens that change experts from one step to the next",
            values=np.stack([flip.values for flip in flips], axis=1),
            axes=(layer, steps, choice),
            chance=stacked([flip.chance for flip in flips]),
            null=stacked([flip.null for flip in flips]),
        )

    def selection_margin(self) -> Measurement:
        """How firmly experts are selected: :func:`moe.study.metrics.stability.selection_margin`."""
        return stability.selection_margin(self.final)

    def near_ties(self, margin: float = 1e-3) -> Measurement:
        """Tokens on the brink of other experts: :func:`moe.study.metrics.stability.near_ties`."""
        return stability.near_ties(self.final, margin)

    def precision_flips(self, tokens: Int[Tensor, "B S"] | None = None) -> Measurement:
        """Tokens that bfloat16 sends elsewhere: :func:`moe.study.metrics.stability.precision_flips`.

        On held-out text where no ``tokens`` are given.
        """
        return stability.precision_flips(self.model(), self.sample() if tokens is None else tokens)

    # ---------------------------------------------------------------------------------------------------- similarity

    def weight_similarity(self) -> Measurement:
        """Cosine of experts' weights: :func:`moe.study.metrics.similarity.weight_similarity`."""
        return similarity.weight_similarity(self.model())

    def router_similarity(self) -> Measurement:
        """Cosine of router rows: :func:`moe.study.metrics.similarity.router_similarity`."""
        return similarity.router_similarity(self.model())

    def output_similarity(
        self, tokens: Int[Tensor, "B S"] | None = None, sample: int = 512, random_experts: int = 8, seed: int = 0
    ) -> Measurement:
        """CKA of experts' outputs: :func:`moe.study.metrics.similarity.output_similarity`.

        On held-out text where no ``tokens`` are given.
        """
        tokens = self.sample() if tokens is None else tokens
        return similarity.output_similarity(self.model(), tokens, sample, random_experts, seed)

    # ---------------------------------------------------------------------------------------------------- everything

    def measurements(self, without: Collection[str] = ()) -> dict[str, Measurement]:
        """Every metric that can be taken, by name: that of its method, and what it is taken over or by, if not the
        default. What cannot be measured is said and left out; what is named in ``without`` is left out."""
        measured = {}
        with _bar("metrics", "metric") as advance:
            for number, (name, metric) in enumerate(METRICS.items(), 1):
                if name not in without and (self.run is not None or name not in OF_THE_MODEL):
                    try:
                        measured[name] = metric(self)
                    except ValueError as reason:
                        self.say(f"left out: {name.replace('_', ' ')}: {reason}")
                advance(number, len(METRICS))
        return measured


METRICS: dict[str, Callable[[Study], Measurement]] = {
    "load": Study.load,
    "coefficient_of_variation": Study.coefficient_of_variation,
    "max_violation": Study.max_violation,
    "max_violation over batch": lambda study: study.max_violation("batch"),
    "max_violation over sequence": lambda study: study.max_violation("sequence"),
    "load_entropy": Study.load_entropy,
    "dead_experts": Study.dead_experts,
    "router_entropy": Study.router_entropy,
    "experts_per_token": Study.experts_per_token,
    "experts_per_token_distribution": Study.experts_per_token_distribution,
    "drop_rate": Study.drop_rate,
    "drop_rate by rank": lambda study: study.drop_rate("rank"),
    "drop_rate by position": lambda study: study.drop_rate("position"),
    "drop_rate by domain": lambda study: study.drop_rate("domain"),
    "consecutive_repetition": Study.consecutive_repetition,
    "consecutive_repetition any": lambda study: study.consecutive_repetition("any"),
    "position_dependence": Study.position_dependence,
    "co_activation": Study.co_activation,
    "cross_layer_information": Study.cross_layer_information,
    "expert_paths": Study.expert_paths,
    "distinct_paths": Study.distinct_paths,
    "domain_specialisation": Study.domain_specialisation,
    "domain_information": Study.domain_information,
    "domain_max_violation": Study.domain_max_violation,
    "vocabulary_specialisation": Study.vocabulary_specialisation,
    "vocabulary_specialisation by predicted": lambda study: study.vocabulary_specialisation("predicted"),
    "vocabulary_specialisation by target": lambda study: study.vocabulary_specialisation("target"),
    "token_dependence": Study.token_dependence,
    "saturation": Study.saturation,
    "flip_rate": Study.flip_rate,
    "selection_margin": Study.selection_margin,
    "near_ties": Study.near_ties,
    "precision_flips": Study.precision_flips,
    "weight_similarity": Study.weight_similarity,
    "router_similarity": Study.router_similarity,
    "output_similarity": Study.output_similarity,
}
"""all metrics, by the names that :meth:`Study.measurements` gives them"""
OF_THE_MODEL = ("precision_flips", "weight_similarity", "router_similarity", "output_similarity")
"""those that need the weights"""
OVER_TRAINING = ("saturation", "flip_rate")
"""those that need records of several steps"""


# -------------------------------------------------------------------------------------------------------------- loading


def load(path: Path | str, tokens: int | None = None, *, say: Say = on_stderr) -> Study:
    """The study of a run (``runs/a``), of one of its checkpoints, or of the folder of a record alone.

    The record of the newest sound checkpoint, or of that which is named, is read from ``records/`` of the run, or made
    and kept there if it is missing, which takes a pass over the held-out text, or about so many ``tokens`` of it. On
    Linux that pass is several times faster after :func:`~moe.training.machine.keep_freed_memory`.
    ``say`` takes a line about what is being done. Raises UserError where ``path`` is none of these, and what reading
    and recording raise.
    """
    path = Path(path)
    if (path / HEADER).is_file():
        if tokens is not None:
            raise UserError(f"{path}: is a record, of which all is studied; leave out the number of tokens")
        record = read_record(path)
        return Study(record, name=record.source or path.name, folder=path, say=say)
    if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file():
        run = RunFolder.open(path.parent.parent)
        saved = checkpoint.open_checkpoint(path)
    elif (path / "config.yaml").is_file():
        run = RunFolder.open(path)
        saved = _newest(run, say)
    else:
        raise UserError(f"{path}: is neither the folder of a run, nor one of its checkpoints, nor that of a record")
    if tokens is not None and tokens < 1:
        raise UserError(f"the number of tokens is {tokens}, and must be 1 or more")
    folder = run.path / "records" / (f"validation-{saved.step:08d}" + (f"-of-{tokens}" if tokens else ""))
    return Study(
        _final(run, saved, folder, tokens, say),
        tuple(_over_training(run, saved.step, say)),
        run=run,
        checkpoint=saved,
        name=str(path),
        folder=path,
        is_whole=tokens is None,
        is_newest=path == run.path,
        say=say,
    )


def _newest(run: RunFolder, say: Say) -> Checkpoint:
    """The newest sound checkpoint; without one, UserError that names a record that can be studied all the same."""
    try:
        return checkpoint.newest(run.checkpoints_path, say)
    except UserError as error:
        records = {
            header.parent.name: header.parent for header in (run.path / "records").glob(f"validation-*/{HEADER}")
        }
        if not records:
            raise
        # Of the latest step, that of all text before that of a part.
        name = max(records, key=lambda name: (name.partition("-of-")[0], "-of-" not in name))
        raise UserError(
            f"{run.path}: has no sound checkpoint to study; what is recorded can be studied alone: {records[name]}"
        ) from error


def _final(run: RunFolder, saved: Checkpoint, folder: Path, tokens: int | None, say: Say) -> Record:
    """The record in ``folder``, made first if it is not there."""
    if not folder.exists():
        config = run.config()
        if not config.model.moe_layers:
            raise UserError(f"{run.path}: model.dense_twin is true: a dense model has no routing to study")
        corpus = run.corpus(config.data, say)
        model = Transformer(config.model)
        saved.load_model(model)
        what = "all held-out text" if tokens is None else f"about {tokens:,} tokens of held-out text"
        say(f"recording {what} at step {saved.step} to {folder}")
        total = sum(len(held_out.stream) for held_out in corpus.validation.values()) if tokens is None else tokens
        with tqdm(total=total, unit="token", unit_scale=True, desc="record", leave=False, disable=None) as bar:
            # In float32, whatever the run was trained in: a record should not depend on the machine that made it.
            record_validation(
                model.to(choose_device("auto")),
                corpus,
                folder,
                sequence_length=config.data.sequence_length,
                precision="fp32",
                tokens=tokens,
                source=str(run.path),
                step=saved.step,
                advance=bar.update,
            )
    return read_record(folder)


def _over_training(run: RunFolder, last: int, say: Say) -> Iterator[Record]:
    """The records that training wrote up to step ``last``, in order; a damaged one is said and left out.

    It cannot be made again, and the others are as good without it.
    """
    for folder in sorted((run.path / "records").glob("step-*")):
        step = folder.name.removeprefix("step-")
        if step.isdigit() and int(step) <= last:
            try:
                record = read_record(folder)
            except UserError as damage:
                say(f"left out: {damage}")
                continue
            yield record


@contextmanager
def _bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that a terminal sees; called with what is done and what there is to do."""
    with tqdm(unit=unit, desc=what, leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
