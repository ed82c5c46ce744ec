"""``python -m moe rehearse CONFIG``: flags, the ranks that are rehearsed, and what is printed."""

import json
import multiprocessing
import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from moe import config_file
from moe.config import Config, ConfigError, format_layout, parse_layout
from moe.errors import UserError
from moe.rehearsal.rehearse import Rehearsal, rehearse
from moe.rehearsal.trace import PARTS, Collective

USAGE = "python -m moe rehearse CONFIG.yaml [--layout WORDS] [--rank N] [--micro-batch N] [--accumulation N] ..."
FLAGS = {
    "--layout WORDS": "such as tp8,pp15,dp208,ep16 (default: the configuration's)",
    "--rank N": "the rank to rehearse (default: the first of the first, a middle and the last pipeline stage)",
    "--micro-batch N": "sequences that a rank computes at once (default: by batch_size, accumulation and data ranks)",
    "--accumulation N": "micro-batches of a step (default: the configuration's)",
    "--sequence N": "tokens of a sequence (default: the configuration's)",
    "--json": "print JSON instead of tables",
    "--help": "show this",
}
MEANING = """\
One training step of the real model, cut and spread by the real code, with tensors that have a shape and no numbers and
a group of processes of which there is only this one: the memory that a GPU would be asked for at the busiest moment,
what is sent, and any error on the way. No GPU is needed. Settings are flags as in training
(--training.activation_checkpointing block, --training.weight_dtype bf16). Bytes are SI.
Exit status: 0, 1 where the step fails, 2 for a mistake."""
SUPPOSED = (
    "Supposed, since fake tensors hold no numbers: balanced load (each expert gets as many tokens as any other).\n"
    "Not counted: CUDA's context, NCCL's buffers, cuBLAS' workspace (about 0.03 GB), and what fragments."
)


@dataclass(frozen=True)
class Failure:
    """A step that ended in an error."""

    rank: int
    error: str


def rehearse_command(arguments: Sequence[str]) -> int:
    """Rehearse and print; 0, or 1 where a rank's step ends in an error."""
    line = config_file.parse_flags(arguments, FLAGS)
    options = line.options
    if "--help" in options:
        print(USAGE, "", MEANING, "", *(f"  {flag:18}{text}" for flag, text in FLAGS.items()), sep="\n")
        return 0
    if len(line.positional) != 1:
        raise UserError(f"one configuration is needed, and {len(line.positional)} were given: {USAGE}")
    path = Path(line.positional[0])
    path = path / "config.yaml" if path.is_dir() else path
    config, micro_batch = _of_this_shape(config_file.load(path, line.overrides), options)
    processes = _processes(config)
    outcomes = _rehearse_each(config, micro_batch, processes, _ranks(config, processes, options))
    done = [outcome for outcome in outcomes if isinstance(outcome, Rehearsal)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    title = (
        f"{path} on {processes:,} GPU{'s' * (processes > 1)}: {format_layout(config.parallel)}\n"
        f"{config.training.accumulation} x {micro_batch} x {config.data.sequence_length:,} tokens of each data rank, "
        f"{config.training.weight_dtype} weights, checkpointing {config.training.activation_checkpointing}"
    )
    if "--json" in options:
        print(as_json(title, done, failures))
    else:
        print(table(title, done, failures))
    return 1 if failures else 0


def _rehearse_each(config: Config, micro_batch: int, processes: int, ranks: Sequence[int]) -> list[Rehearsal | Failure]:
    """Each rank in a process of its own, since torch remembers meshes, and as many at a time as there are cores."""
    with multiprocessing.get_context("fork").Pool(min(len(ranks), os.cpu_count() or 1), maxtasksperchild=1) as pool:
        asked = [(config, micro_batch, processes, rank) for rank in ranks]
        return pool.starmap(_outcome, asked, chunksize=1)


def _outcome(config: Config, micro_batch: int, processes: int, rank: int) -> Rehearsal | Failure:
    torch.set_num_threads(1)
    try:
        return rehearse(config, micro_batch, processes=processes, rank=rank)
    except (UserError, ConfigError):
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(rank, f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})")


# ------------------------------------------------------------------------------------------------- what is rehearsed


def _of_this_shape(config: Config, options: Mapping[str, str]) -> tuple[Config, int]:
    """The configuration that the flags ask for, and the sequences of a micro-batch."""
    parallel = parse_layout(options["--layout"]) if "--layout" in options else config.parallel
    parallel = parallel if parallel.data is not None else replace(parallel, data=1)
    settings, data = config.training, parallel.data or 1
    accumulation = _number(options, "--accumulation", settings.accumulation)
    if accumulation < parallel.pipeline:
        raise UserError(
            f"--accumulation is {accumulation}, and a pipeline of {parallel.pipeline} ranks needs as many micro-batches"
        )
    micro_batch, rest = divmod(settings.batch_size, data * accumulation)
    if "--micro-batch" in options:
        micro_batch = _number(options, "--micro-batch", 1)
    elif rest or not micro_batch:
        raise UserError(
            f"training.batch_size: {settings.batch_size} sequences cannot be divided among {data} data ranks and "
            f"{accumulation} micro-batches; give --micro-batch"
        )
    length = _number(options, "--sequence", config.data.sequence_length)
    if config.model.vocab_size is None:
        config = config.with_vocab(config.data.vocab_size)
    training = replace(
        settings,
        batch_size=micro_batch * accumulation * data,
        accumulation=accumulation,
        precision="bf16" if settings.precision == "auto" else settings.precision,
    )
    config = replace(config, data=replace(config.data, sequence_length=length), training=training, parallel=parallel)
    return config, micro_batch


def _processes(config: Config) -> int:
    parallel = config.parallel
    return parallel.pipeline * (parallel.data or 1) * parallel.tensor


def _ranks(config: Config, processes: int, options: Mapping[str, str]) -> list[int]:
    if "--rank" in options:
        rank = _number(options, "--rank", 0, smallest=0)
        if rank >= processes:
            raise UserError(f"--rank is {rank}, and there are {processes} ranks, from 0 on")
        return [rank]
    of_a_stage, stages = processes // config.parallel.pipeline, config.parallel.pipeline
    return [stage * of_a_stage for stage in sorted({0, stages // 2, stages - 1})]


def _number(options: Mapping[str, str], flag: str, default: int, smallest: int = 1) -> int:
    text = options.get(flag, str(default))
    if not text.isdecimal() or int(text) < smallest:
        raise UserError(f"{flag} is {text!r}, and must be a whole number, {smallest} or more")
    return int(text)


# ---------------------------------------------------------------------------------------------------- what is printed


def table(title: str, done: Sequence[Rehearsal], failures: Sequence[Failure] = ()) -> str:
    """For a terminal: the memory of each rank by part, and what the first of them sends."""
    lines = [title, ""]
    if done:
        lines += _memory(done)
        lines += ["", f"what rank {done[0].rank:,} sends or receives in a step", ""]
        lines += _traffic(done[0])
        lines += ["", SUPPOSED]
    lines += [f"rank {failure.rank:,} failed: {failure.error}" for failure in failures]
    return "\n".join(lines)


def _memory(done: Sequence[Rehearsal]) -> list[str]:
    rows = [("GB at the peak", [f"rank {rehearsal.rank:,}" for rehearsal in done])]
    rows.append(("blocks", [_blocks(rehearsal) for rehearsal in done]))
    for part in PARTS:
        rows.append((part, [f"{rehearsal.peak.parts[part] / 1e9:,.3f}" for rehearsal in done]))
    rows.append(("together", [f"{rehearsal.peak.total / 1e9:,.3f}" for rehearsal in done]))
    rows.append(("busiest in", [rehearsal.peak.phase for rehearsal in done]))
    rows.append(("between two steps", [f"{rehearsal.after / 1e9:,.3f}" for rehearsal in done]))
    lines = [f"{name:20}" + "".join(f"{value:>16}" for value in values) for name, values in rows]
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:-3], rule, *lines[-3:]]


def _blocks(rehearsal: Rehearsal) -> str:
    return ", ".join(f"{first}-{last}" for first, last in rehearsal.blocks)


def _traffic(rehearsal: Rehearsal) -> list[str]:
    groups: dict[tuple[str, str, int], list[tuple[Collective, int]]] = {}
    for collective, calls in rehearsal.collectives.items():
        groups.setdefault((collective.name, collective.group, collective.ranks), []).append((collective, calls))
    lines = [f"{'collective':16}{'group':16}{'ranks':>7}{'calls':>9}{'largest, MB':>14}{'together, GB':>15}"]
    lines.append("-" * len(lines[0]))
    for (name, group, ranks), seen in sorted(groups.items(), key=lambda item: -_volume(item[1])):
        largest = max(collective.n_bytes for collective, _ in seen) / 1e6
        calls, volume = sum(n for _, n in seen), _volume(seen) / 1e9
        lines.append(f"{name:16}{group:16}{ranks:7,}{calls:9,}{largest:14,.2f}{volume:15,.3f}")
    return lines


def _volume(calls: Sequence[tuple[Collective, int]]) -> int:
    return sum(collective.n_bytes * n for collective, n in calls)


def as_json(title: str, done: Sequence[Rehearsal], failures: Sequence[Failure] = ()) -> str:
    """All that was seen, in bytes."""
    ranks = [
        {
            "rank": rehearsal.rank,
            "pipeline_rank": rehearsal.pipeline_rank,
            "blocks": rehearsal.blocks,
            "peak": rehearsal.peak.total,
            "parts": rehearsal.peak.parts,
            "workspace": rehearsal.peak.workspace,
            "busiest": {"phase": rehearsal.peak.phase, "operator": rehearsal.peak.operator},
            "largest": [
                {"bytes": storage.n_bytes, "part": storage.told(), "operator": storage.operator, "shape": storage.shape}
                for storage in rehearsal.peak.largest
            ],
            "between_steps": rehearsal.after,
            "collectives": [asdict(collective) | {"calls": n} for collective, n in rehearsal.collectives.items()],
            "seconds": rehearsal.seconds,
        }
        for rehearsal in done
    ]
    return json.dumps({"what": title, "ranks": ranks, "failures": [asdict(failure) for failure in failures]}, indent=1)
