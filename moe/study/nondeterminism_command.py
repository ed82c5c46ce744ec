"""``python -m moe nondeterminism RUN``: one prompt, many strangers, and how many answers."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from moe import config_file
from moe.config import CapacityConfig
from moe.errors import UserError
from moe.inference.command import number, seed_of
from moe.model.transformer import Transformer
from moe.study.nondeterminism import Exposure, Outcome, Setting, among_strangers, by_batch_size, exposure
from moe.study.plots import DASHES, FORMATS, GRID, INK, LINES, graph_objects, require_browser, save
from moe.training.run_folder import RunFolder

if TYPE_CHECKING:
    import plotly.graph_objects as go

USAGE = "python -m moe nondeterminism RUN [--tokens N] [--trials N] [--batch N] [--prompts N] [--seed N] [--out FILE]"
MEANING = """\
The same prompts at temperature 0 among random strangers, under several expert capacities: how many different answers?
With controls, the effect of the batch's size on arithmetic measured apart, and how far one stranger reaches."""
FLAGS = {
    "--tokens N": "new tokens of each request (default 32)",
    "--trials N": "batches of strangers for each prompt (default 30)",
    "--batch N": "requests in a batch (default 16)",
    "--prompts N": "prompts, of held-out text (default 3)",
    "--seed N": "of prompts, strangers and places (default 0)",
    "--out FILE": "of the picture: .html, .png, .svg or .pdf (default RUN/study/nondeterminism.html)",
    "--help": "show this",
}
PROMPT = 24
"""tokens of a prompt, and of what strangers ask"""
MANY = 256
"""strangers to draw from"""
SENTENCES = """\
It shows that capacity shared by a batch is enough for one prompt to get many answers at temperature 0, and that
dropless routing ends that. It does not show that GPT-4 was served so: arithmetic alone can do it too where outputs are
long, kernels depend on the batch and weights are coarse, and nobody outside knows which routing was served."""


def nondeterminism_command(arguments: Sequence[str]) -> int:
    """``python -m moe nondeterminism RUN``."""
    line = config_file.parse_flags(arguments, FLAGS)
    options = line.options
    if "--help" in options:
        print(USAGE, "", MEANING, "", *(f"  {flag:14}{meaning}" for flag, meaning in FLAGS.items()), sep="\n")
        return 0
    if line.overrides:
        raise UserError(f"--{next(iter(line.overrides))} belongs to training: a run's settings are in its folder")
    if len(line.positional) != 1:
        raise UserError(f"one run folder is needed, and {len(line.positional)} were given: {USAGE}")
    n_new, trials = number(options, "--tokens", int, 32, at_least=1), number(options, "--trials", int, 30, at_least=1)
    batch, n_prompts = number(options, "--batch", int, 16, at_least=2), number(options, "--prompts", int, 3, at_least=1)
    seed = seed_of(options)
    path = Path(line.positional[0])
    out = Path(options.get("--out", path / "study" / "nondeterminism.html"))
    graph_objects()
    if out.suffix not in FORMATS:
        raise UserError(f"--out is {out}, and must end in one of {', '.join(FORMATS)}")
    if out.suffix != ".html":
        require_browser()

    run = RunFolder.open(path)
    plain, exact = _models(run)
    if PROMPT + n_new > plain.config.max_seq:
        raise UserError(f"--tokens: {PROMPT} and {n_new} new ones do not fit max_seq = {plain.config.max_seq}")
    texts = _texts(run, n_prompts + max(MANY, batch + trials), seed)
    prompts, strangers = texts[:n_prompts], texts[n_prompts:]

    settings = _settings(plain.config.experts.n_experts / plain.config.router.top_k)
    steps = len(settings) * n_prompts * n_new + 2 * n_prompts * batch
    outcomes, exposures = [], []
    with tqdm(total=steps, unit="step", leave=False, disable=None) as progress:
        for setting in settings:
            progress.set_description(_name(setting))
            outcomes.append(
                among_strangers(
                    exact, setting, prompts, strangers,
                    n_new=n_new, trials=trials, batch=batch, seed=seed, advance=progress.update,
                )
            )  # fmt: skip
            exposures.append(exposure(exact, setting, prompts, strangers, trials=trials, batch=batch, seed=seed))
        progress.set_description("batch sizes")
        rivals = [
            by_batch_size(
                plain, prompts, strangers, n_new=n_new, largest=batch, bf16=bf16, seed=seed, advance=progress.update
            )
            for bf16 in (False, True)
        ]
    print(table(settings, outcomes, exposures, rivals), "", SENTENCES, sep="\n")
    save(picture(settings, outcomes, trials), out)
    numbers = out.with_suffix(".json")
    rows = [
        {"setting": asdict(setting), "outcome": asdict(outcome), "exposure": asdict(reach)}
        for setting, outcome, reach in zip(settings, outcomes, exposures, strict=True)
    ]
    numbers.write_text(json.dumps({"settings": rows, "batch_size": [asdict(rival) for rival in rivals]}, indent=1))
    print(f"\n{out}, {numbers}")
    return 0


def _settings(no_drop: float) -> list[Setting]:
    """The capacities from none on down, then the controls at the fair share."""
    factors = sorted({no_drop, 4.0, 2.0, 1.25, 1.0, 0.75}, reverse=True)
    return [
        Setting(None),
        *(Setting(factor) for factor in factors if factor <= no_drop),
        Setting(1.0, place="first"),
        Setting(1.0, order="choice", place="first"),
    ]


def _models(run: RunFolder) -> tuple[Transformer, Transformer]:
    """The run's model, and the same in arithmetic that no batch changes."""
    plain = run.load_model()
    config = plain.config
    if not config.moe_layers:
        raise UserError(f"{run.path}: a dense model has no capacity to share")
    if not replace(config.router, capacity=CapacityConfig()).is_batch_independent(training=False):
        raise UserError(f"{run.path}: its router compares the sequences of a batch, whatever the capacity")
    exact = Transformer(replace(config, deterministic=True))
    exact.load_state_dict(plain.state_dict())
    return plain, exact.eval()


def _texts(run: RunFolder, wanted: int, seed: int) -> Int[Tensor, "N S"]:
    """As many pieces of held-out text, from anywhere, in the order of the seed."""
    corpus = run.corpus(run.config().data, lambda text: print(text, file=sys.stderr))
    stream = np.concatenate([held_out.stream for held_out in corpus.validation.values()]).astype(np.int64)
    pieces = torch.from_numpy(stream[: len(stream) // PROMPT * PROMPT]).view(-1, PROMPT)
    if len(pieces) < wanted:
        raise UserError(
            f"{run.path}: its held-out text has {len(pieces)} pieces of {PROMPT} tokens; {wanted} are needed"
        )
    return pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[:wanted]]


def _name(setting: Setting) -> str:
    if setting.factor is None:
        return "dropless"
    controls = {
        ("position", "any"): "",
        ("position", "first"): ", prompt first",
        ("choice", "first"): ", prompt first, by choice",
    }
    return f"capacity {setting.factor:g}{controls[setting.order, setting.place]}"


def table(
    settings: Sequence[Setting], outcomes: Sequence[Outcome], exposures: Sequence[Exposure], rivals: Sequence[Outcome]
) -> str:
    """A line for each setting."""
    head = f"{'':36}{'answers of ' + str(outcomes[0].trials):>16}{'first':>9}{'dropped in':>17}   one stranger swapped"
    lines = [
        head,
        f"{'':36}{'each':>10}{'mean':>6}{'logit':>9}{'prefill':>9}{'decode':>8}{'logit':>8}{'token':>8}{'copy':>8}",
    ]
    for setting, outcome, reach in zip(settings, outcomes, exposures, strict=True):
        each = " ".join(map(str, outcome.unique))
        lines.append(
            f"{_name(setting):36}{each:>10}{outcome.mean:6.1f}{outcome.difference:9.2g}{outcome.prefill.share:9.1%}"
            f"{outcome.decode.share:8.1%}{reach.swapped:8.2g}{reach.flipped:8.1%}{reach.copied:8.2g}"
        )
    lines.append(f"\nthe rival cause: dropless, plain arithmetic, batches of 1 to {rivals[0].trials}")
    for name, rival in zip(("float32", "bf16"), rivals, strict=True):
        each = " ".join(map(str, rival.unique))
        lines.append(f"{name:36}{each:>10}{rival.mean:6.1f}{rival.difference:9.2g}")
    return "\n".join(lines)


def picture(settings: Sequence[Setting], outcomes: Sequence[Outcome], trials: int) -> "go.Figure":
    """Different answers over the capacity: each prompt, the mean, and the controls."""
    go = graph_objects()
    main = [row for row in zip(settings, outcomes, strict=True) if row[0].place == "any"]
    names = ["dropless" if setting.factor is None else f"{setting.factor:g}" for setting, _ in main]
    figure = go.Figure()
    for prompt in range(len(main[0][1].unique)):
        line = {"color": GRID.replace("0.25", "0.7"), "width": 1, "dash": DASHES[prompt % len(DASHES)]}
        counts = [outcome.unique[prompt] for _, outcome in main]
        figure.add_scatter(x=names, y=counts, mode="lines", line=line, name=f"prompt {prompt + 1}")
    means = [outcome.mean for _, outcome in main]
    figure.add_scatter(x=names, y=means, mode="lines+markers", line={"color": LINES[0], "width": 3}, name="mean")
    controls = [row for row in zip(settings, outcomes, strict=True) if row[0].place == "first"]
    for (setting, outcome), colour in zip(controls, LINES[2:], strict=False):
        name = "prompt first" if setting.order == "position" else "prompt first, by choice"
        marker = {"color": colour, "size": 11, "symbol": "diamond"}
        figure.add_scatter(x=["1"], y=[outcome.mean], mode="markers", marker=marker, name=name)
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK, "family": "system-ui, sans-serif", "size": 12},
        title={"text": f"Different answers of {trials} at temperature 0, the strangers alone differing", "x": 0.02},
        legend={"orientation": "h", "y": -0.2},
        margin={"l": 60, "r": 20, "t": 60, "b": 90},
        height=420,
        width=760,
    )
    figure.update_xaxes(title="capacity over the fair share", type="category")
    figure.update_yaxes(title="different answers", gridcolor=GRID, range=[0, trials + 1])
    return figure
