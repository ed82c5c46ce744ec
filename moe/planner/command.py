"""``python -m moe plan CONFIG``: flags, the plan, and what is printed and written."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_args

from moe import config_file
from moe.config import Checkpointing, Config, ConfigError
from moe.errors import UserError
from moe.planner import reported
from moe.planner.devices import Device, device
from moe.planner.flops import Counting
from moe.planner.layout import Layout, layout_in_words, layout_of
from moe.planner.plan import Question, answer, memory_by_stage, search_section, with_candidate
from moe.planner.search import search
from moe.planner.serving import Server
from moe.planner.step import Recipe, Step, recipe_of
from moe.planner.table import as_json, table, write
from moe.planner.training import EFFICIENCY, step_time

USAGE = "python -m moe plan CONFIG.yaml [--gpu NAME] [--gpus N] [--tokens N] [--mfu X | --days X] [--layout WORDS] ..."
FLAGS = {
    "--gpu NAME": "the device: a100-40gb, a100-80gb, h100, h200, b200, mi300x, laptop-cpu (default a100-80gb)",
    "--gpus N": "devices that train (default: those of the layout)",
    "--hardware FILE": "more devices, in the form of moe/planner/devices.yaml",
    "--tokens X": "tokens of training (default: the configuration's steps)",
    "--mfu X": "model FLOPs utilisation, which gives days (default: that of the estimated step)",
    "--days X": "days of training, which give the utilisation",
    "--count NAME": "what counts as arithmetic: 6nd, products, causal (default) or full_square",
    "--efficiency X": f"share of the peak that devices reach while they compute (default {EFFICIENCY})",
    "--rate X": "dollars an hour and device (default: the device's, where there is a source)",
    "--layout WORDS": "such as tp8,pp15,dp208,ep16,zero1; best: by a search (default: the configuration's)",
    "--states NAME": "bytes a parameter: fp32, bf16, mixed, mixed_fp32_gradients (default: by training.weight_dtype)",
    "--search N": "print the N fastest layouts that fit (default 0, a search takes seconds to minutes)",
    "--serve WORDS": "layout of a server: tp8,pp16 (default: one node)",
    "--lengths NAMES": "sequences that are served, in tokens (default 8192,32768)",
    "--decode N": "sequences of a micro-batch in decoding (default 8)",
    "--weights X": "bytes of a weight that is served (default 2)",
    "--json": "print JSON instead of tables",
    "--out FOLDER": "write plan.json and a picture (plan.png, plan.svg) there",
    "--help": "show this",
}
MEANING = """\
What a configuration costs: parameters, arithmetic, time and money of training, memory of a device under a layout, a
step by part, and what it takes to serve it. Settings are flags as in training (--model.router.top_k 4,
--training.activation_checkpointing block). Bytes are SI. The step's time is an estimate, for comparing layouts."""
Number = TypeVar("Number", int, float)


def plan_command(arguments: Sequence[str]) -> int:
    """Print the plan of one configuration; 0."""
    line = config_file.parse_flags(arguments, FLAGS)
    options = line.options
    if "--help" in options:
        print(USAGE, "", MEANING, "", *(f"  {flag:18}{text}" for flag, text in FLAGS.items()), sep="\n")
        return 0
    if len(line.positional) != 1:
        raise UserError(f"one configuration is needed, and {len(line.positional)} were given: {USAGE}")
    path = Path(line.positional[0])
    path = path / "config.yaml" if path.is_dir() else path
    config = _with_vocabulary(config_file.load(path, line.overrides))
    extra = Path(options["--hardware"]) if "--hardware" in options else None
    where = device(options.get("--gpu", "a100-80gb"), extra)
    question = _question(config, where, options)

    wanted = _number(options, "--search", int, 0, smallest=0)
    candidates = []
    if wanted or options.get("--layout") == "best":
        candidates = search(
            config.model,
            where,
            question.devices,
            question.step,
            question.batch,
            efficiency=question.efficiency,
        )
    if options.get("--layout") == "best":
        if not candidates:
            raise UserError(
                f"--layout best: none fits {question.devices:,} {where.name}; give more devices, or larger ones"
            )
        question = with_candidate(question, candidates[0])
    sections = answer(question)
    if wanted:
        sections.append(search_section(candidates[:wanted], question.devices))
    claims = reported.claims(config.model) if reported.speaks_of(config.model) else []
    notes = reported.contradictions(config.model) if claims else []
    asked = {"configuration": str(path), "layout": question.layout.words(), "device": where.name} | options
    text = as_json(asked, sections, claims, notes)
    print(text if "--json" in options else table(sections, claims, notes))
    if "--out" in options:
        folder = Path(options["--out"])
        try:
            write(folder / "plan.json", text)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from None
        _draw(question, path.stem, folder)
    return 0


def _question(config: Config, where: Device, options: Mapping[str, str]) -> Question:
    training, sequence = config.training, config.data.sequence_length
    layout = _layout(config, options)
    devices = _number(options, "--gpus", int, layout.devices)
    if "--gpus" in options and "--layout" not in options and config.parallel.data is None:
        layout = _spread(layout, devices, training.batch_size)
    if layout.devices > devices and options.get("--layout") != "best":
        raise UserError(f"the layout {layout.words()} takes {layout.devices:,} devices, and --gpus is {devices:,}")
    mfu = _number(options, "--mfu", float, 0.0) if "--mfu" in options else None
    days = _number(options, "--days", float, 0.0) if "--days" in options else None
    if mfu is not None and days is not None:
        raise UserError("--mfu and --days say the same; give one of them")
    tokens = _number(options, "--tokens", float, float(training.steps * training.batch_size * sequence))
    return Question(
        model=config.model,
        device=where,
        devices=devices,
        tokens=tokens,
        batch=training.batch_size,
        layout=layout,
        step=_step(config, layout, options),
        counting=_choice(options, "--count", get_args(Counting), "causal"),  # type: ignore[arg-type]
        mfu=mfu,
        days=days,
        efficiency=_number(options, "--efficiency", float, EFFICIENCY),
        hourly=_number(options, "--rate", float, 0.0) if "--rate" in options else where.hourly,
        server=_server(config, where, options),
        lengths=_lengths(options),
        decoding=_number(options, "--decode", int, 8),
    )


def _layout(config: Config, options: Mapping[str, str]) -> Layout:
    words = options.get("--layout", "")
    if words in ("", "best"):
        return layout_of(config.parallel)
    try:
        return layout_in_words(words, config.parallel)
    except ConfigError as error:
        raise UserError(f"--layout {words}: {error}") from None


def _spread(layout: Layout, devices: int, batch: int) -> Layout:
    """``layout`` with as many replicas as ``devices`` and the batch allow."""
    data = min(devices // (layout.tensor * layout.pipeline), batch) // layout.expert * layout.expert
    return replace(layout, data=max(layout.expert, data))


def _step(config: Config, layout: Layout, options: Mapping[str, str]) -> Step:
    training = config.training
    recipe: Recipe = _choice(  # type: ignore[assignment]
        options, "--states", get_args(Recipe), recipe_of(training.weight_dtype)
    )
    per_replica = -(-training.batch_size // layout.data)
    micro_batches = min(training.accumulation, per_replica)
    checkpointing: Checkpointing = training.activation_checkpointing
    return Step(
        sequence=config.data.sequence_length,
        micro_batch=-(-per_replica // micro_batches),
        n_micro_batches=micro_batches,
        recipe=recipe,
        checkpointing=checkpointing,
        bf16=training.precision != "fp32",
    )


def _server(config: Config, where: Device, options: Mapping[str, str]) -> Server:
    words = options.get("--serve")
    if words is None:
        tensor, pipeline = where.node, 1
    else:
        try:
            layout = layout_in_words(words, type(config.parallel)())
        except ConfigError as error:
            raise UserError(f"--serve {words}: {error}") from None
        tensor, pipeline = layout.tensor, layout.pipeline
        if layout.devices != tensor * pipeline:
            raise UserError(f"--serve {words}: a server has tpN and ppN alone")
    return Server(
        model=config.model,
        device=where,
        tensor=tensor,
        pipeline=pipeline,
        weight_bytes=_number(options, "--weights", float, 2.0),
    )


def _lengths(options: Mapping[str, str]) -> tuple[int, ...]:
    texts = options.get("--lengths", "8192,32768").split(",")
    if not all(text.strip().isdecimal() and int(text) > 0 for text in texts):
        raise UserError(f"--lengths is {options['--lengths']!r}, and must be whole numbers with commas: 8192,32768")
    return tuple(int(text) for text in texts)


def _with_vocabulary(config: Config) -> Config:
    """The configuration with the vocabulary that its tokenizer will have."""
    if config.model.vocab_size is not None:
        return config
    sizes = {"bpe": config.data.vocab_size, "gpt2": 50_257, "cl100k": 100_277}
    if config.data.tokenizer not in sizes:
        raise UserError(
            f"data.tokenizer {config.data.tokenizer}: what it holds is not read here; give --model.vocab_size"
        )
    return config.with_vocab(sizes[config.data.tokenizer])


def _draw(question: Question, name: str, folder: Path) -> None:
    from moe.planner.picture import draw, save

    time = step_time(question.model, question.layout, question.step, question.device, efficiency=question.efficiency)
    memories = {
        f"pipeline rank {stage}" if question.layout.pipeline > 1 else "every device": memory
        for stage, memory in memory_by_stage(question).items()
    }
    title = f"{name} on {question.layout.devices:,} {question.device.name}, {question.layout.words()}"
    try:
        for written in save(draw(title, question.device.name, question.device.memory, memories, time), folder / "plan"):
            print(f"wrote {written}", file=sys.stderr)
    except UserError as error:  # the numbers are there
        print(f"no picture: {error}", file=sys.stderr)


def _choice(options: Mapping[str, str], flag: str, known: tuple[str, ...], default: str) -> str:
    value = options.get(flag, default)
    if value not in known:
        raise UserError(f"{flag} is {value}, and must be one of {', '.join(known)}")
    return value


def _number(
    options: Mapping[str, str], flag: str, kind: type[Number], default: Number, smallest: float | None = None
) -> Number:
    """The value of ``flag`` as a number above 0 (from ``smallest``, where given); 13e12 is a whole number too."""
    if flag not in options:
        return default
    try:
        value = float(options[flag].replace("_", ""))
    except ValueError:
        value = math.nan
    whole = kind is not int or value == value // 1
    if not math.isfinite(value) or not whole or (value <= 0 if smallest is None else value < smallest):
        above = "above 0" if smallest is None else f"from {smallest:g}"
        raise UserError(f"{flag} is {options[flag]!r}, and must be a {'whole ' * (kind is int)}number {above}")
    return kind(value)
