"""A plan: every number of one configuration on one kind of device, in sections that a table and JSON both show."""

from dataclasses import dataclass, replace
from typing import Literal

from moe.config import ModelConfig
from moe.planner.devices import Device
from moe.planner.flops import Counting, count_flops
from moe.planner.layout import Layout, share_of
from moe.planner.memory import Memory, largest, memory_of
from moe.planner.search import Candidate
from moe.planner.serving import Server, cost_per_thousand, distinct_experts, kv_bytes_of_sequence, kv_bytes_per_token
from moe.planner.step import Step
from moe.planner.training import (
    StepTime,
    Traffic,
    bubble,
    cost,
    device_days,
    mfu_of,
    step_time,
    traffic_of,
    training_days,
)

Unit = Literal[
    "parameters", "flop", "bytes", "seconds", "days", "device_days", "$", "share", "tokens", "tokens/s", "count", "text"
]


@dataclass(frozen=True)
class Row:
    """One number."""

    key: str
    """in JSON"""
    label: str
    """in a table"""
    value: float | int | str | None
    unit: Unit
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Numbers about one thing."""

    key: str
    title: str
    rows: list[Row]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a model."""

    model: ModelConfig
    device: Device
    devices: int
    tokens: float
    """of training"""
    batch: int
    """sequences of an optimizer step"""
    layout: Layout
    step: Step
    counting: Counting = "causal"
    """what counts as arithmetic for MFU, days and dollars"""
    mfu: float | None = None
    days: float | None = None
    """one of these two gives the other; where neither is given, the layout's step does"""
    efficiency: float
    hourly: float | None
    server: Server
    lengths: tuple[int, ...] = (8192, 32768)
    """of the sequences that are served"""
    decoding: int = 8
    """sequences of a micro-batch in decoding"""


def answer(question: Question) -> list[Section]:
    """Every section but those of the search and of what was reported."""
    return [
        parameters_section(question.model),
        flops_section(question),
        training_section(question),
        memory_section(question),
        time_section(question),
        serving_section(question),
    ]


def parameters_section(model: ModelConfig) -> Section:
    """Parameters by what they belong to, and what a token uses by each convention."""
    parts = model.parameters()
    rows = [
        Row("total", "all", parts.total, "parameters"),
        Row("active", "used by a token", parts.active(), "parameters"),
        Row("active_without_embedding", "without the input embedding", parts.active("without_embedding"), "parameters"),
        Row(
            "active_without_embedding_and_head",
            "without embedding and head",
            parts.active("without_embedding_and_head"),
            "parameters",
        ),
        Row("attention", "attention", parts.attention, "parameters"),
        Row("experts", "routed experts", parts.experts, "parameters"),
        Row("per_expert", "one expert, one layer", parts.per_expert, "parameters"),
        Row("per_expert_all_layers", "one expert, all layers", parts.per_expert * len(model.moe_layers), "parameters"),
        Row("shared", "shared experts", parts.shared, "parameters"),
        Row("dense", "dense layers", parts.dense, "parameters"),
        Row("router", "routers", parts.router + parts.special, "parameters"),
        Row("norms", "norms", parts.norms, "parameters"),
        Row("embedding", "embedding", parts.embedding + parts.positions, "parameters"),
        Row("head", "head, where not tied", parts.head, "parameters"),
    ]
    return Section("parameters", "Parameters", [row for row in rows if row.value])


def flops_section(question: Question) -> Section:
    """Arithmetic of a token, forward and in training, in every counting."""
    flops = count_flops(question.model, question.step.sequence)
    ways: list[tuple[Counting, str]] = [
        ("6nd", "2 N: all active parameters"),
        ("products", "matrix products, no scores"),
        ("causal", "with causal scores"),
        ("full_square", "with scores of the full square"),
    ]
    rows = [Row(f"forward_{way}", label, flops.forward(way), "flop") for way, label in ways]
    rows += [Row(f"training_{way}", f"training, {label}", flops.training(way), "flop") for way, label in ways]
    recomputed = flops.recomputed(question.step.checkpointing)
    if recomputed:
        rows.append(Row("recomputed", "computed again in the backward pass", recomputed, "flop"))
    return Section("flops", f"Arithmetic of a token in sequences of {question.step.sequence:,}", rows)


def training_section(question: Question) -> Section:
    """The whole training: FLOPs, device-days, wall time, cost; from MFU to days or the other way."""
    model, peak, devices = question.model, question.device.flops, question.devices
    total = count_flops(model, question.step.sequence).training(question.counting) * question.tokens
    if question.days is not None:
        days, mfu, how = question.days, mfu_of(total, devices, peak, question.days), "as given"
    elif question.mfu is not None:
        mfu, days, how = question.mfu, training_days(total, devices, peak, question.mfu), "as given"
    else:
        mfu, how = _time(question).mfu, "estimated from the layout's step"
        days = training_days(total, devices, peak, mfu)
    hourly = question.hourly
    batch = question.batch * question.step.sequence
    load = batch * question.model.experts_per_token / question.model.routed_experts
    dollars = None if hourly is None else cost(devices, days, hourly)
    rate = "no source for a price: --rate" if hourly is None else f"at ${hourly:g} an hour"
    return Section(
        "training",
        f"Training on {devices:,} {question.device.name}",
        [
            Row("tokens", "tokens", question.tokens, "tokens"),
            Row("flops", "arithmetic", total, "flop", f"counted as {question.counting}"),
            Row("mfu", "model FLOPs utilisation", mfu, "share", "" if question.days is not None else how),
            Row("days", "wall time", days, "days", how if question.days is not None else ""),
            Row("device_days", "device-days", device_days(total, peak, mfu), "device_days"),
            Row("cost", "cost", dollars, "$", rate),
            Row("tokens_per_second", "tokens a second", question.tokens / days / 86400, "tokens/s"),
            Row("steps", "optimizer steps", question.tokens / batch, "count"),
            Row("batch_tokens", "tokens of a step", batch, "tokens"),
            *([Row("tokens_per_expert", "of them to each expert", load, "tokens")] if model.moe_layers else []),
        ],
    )


def memory_section(question: Question) -> Section:
    """Memory of the pipeline rank that holds most, by part."""
    model, layout, step = question.model, question.layout, question.step
    stage, memory = largest(model, layout, step)
    room = question.device.memory
    fits = "fits" if memory.total <= room else f"does not fit {question.device.name}"
    rows = [
        Row("devices", "devices of the layout", layout.devices, "count"),
        Row("parameters", "parameters on the device", share_of(model, layout, stage).total, "parameters"),
        Row("weights", "weights", memory.weights, "bytes"),
        Row("gradients", "gradients", memory.gradients, "bytes"),
        Row("optimizer", "optimizer's state", memory.optimizer, "bytes"),
        Row("activations", f"activations (checkpointing {step.checkpointing})", memory.activations, "bytes"),
        Row("buffers", "buffers", memory.buffers, "bytes"),
        Row("total", "all, at the peak", memory.total, "bytes", f"{memory.total / room:.0%} of the device: {fits}"),
    ]
    where = f", pipeline rank {stage}" if layout.pipeline > 1 else ""
    return Section("memory", f"Memory of a device, {layout.words()}{where}", rows)


def time_section(question: Question) -> Section:
    """A step by part, the pipeline's bubble, and what is sent."""
    time, traffic = _time(question), _traffic(question)
    step, layout = question.step, question.layout
    rows = [
        Row("micro_batches", "micro-batches a replica", step.n_micro_batches, "count", f"of {step.micro_batch}"),
        Row("step_seconds", "a step", time.total, "seconds"),
        Row("compute_seconds", "arithmetic", time.compute, "seconds", f"at {question.efficiency:.0%} of the peak"),
        Row("recompute_seconds", "arithmetic again", time.recompute, "seconds"),
        Row("bubble_seconds", "pipeline bubble", time.bubble, "seconds"),
        Row("bubble", "of a step", bubble(layout, step.n_micro_batches), "share"),
        Row("tensor_bytes", "tensor parallel sends", traffic.tensor, "bytes"),
        Row("tensor_seconds", "which takes", time.tensor, "seconds"),
        Row("expert_bytes", "expert parallel sends", traffic.expert, "bytes"),
        Row("expert_seconds", "which takes", time.expert, "seconds"),
        Row("pipeline_bytes", "pipeline sends", traffic.pipeline, "bytes"),
        Row("pipeline_seconds", "which takes", time.pipeline, "seconds"),
        Row("data_bytes", "data parallel sends", traffic.data, "bytes"),
        Row("data_seconds", "which takes", traffic.data_seconds, "seconds"),
        Row("exposed_seconds", "of that not hidden", time.data, "seconds"),
        Row("step_mfu", "MFU of the step", time.mfu, "share", "scores counted causally"),
    ]
    kept = [row for row in rows if row.value or row.key in ("step_seconds", "compute_seconds")]
    return Section("time", f"A step, {layout.words()} (estimated)", kept)


def serving_section(question: Question) -> Section:
    """Cache, concurrency, and the bounds on decoding."""
    model, server, batch = question.model, question.server, question.decoding
    rows = [
        Row("devices", "devices", server.devices, "count", f"tp{server.tensor},pp{server.pipeline}"),
        Row("weights", "weights on a device", server.weights, "bytes"),
        Row("free", f"left for the cache, {server.usable:.0%} used", server.free, "bytes"),
        Row("kv_token", "cache of a token", kv_bytes_per_token(model, server.cache_bytes), "bytes"),
    ]
    for length in question.lengths:
        cache = kv_bytes_of_sequence(model, length, server.cache_bytes)
        rows.append(Row(f"kv_{length}", f"cache of {length:,} tokens", cache, "bytes"))
        rows.append(Row(f"concurrent_{length}", f"sequences of {length:,} at once", server.concurrent(length), "count"))
    rows.append(Row("user_1", "tokens/s of a user, alone", server.tokens_per_user(1), "tokens/s", "by bandwidth"))
    if model.moe_layers:
        hit = distinct_experts(model.experts.n_experts, model.mlps_per_token, batch)
        rows.append(Row("experts_hit", f"experts of a layer hit by {batch}", round(hit, 2), "count"))
    crossover = server.crossover()
    by_compute = server.tokens_by_compute()
    rows += [
        Row(f"user_{batch}", f"tokens/s of each of {batch}", server.tokens_per_user(batch), "tokens/s", "by bandwidth"),
        Row("user_all", "tokens/s where all experts are hit", _all_hit(server), "tokens/s", "by bandwidth"),
        Row(
            f"server_{batch}",
            f"tokens/s of the server, {batch} a stage",
            server.tokens_by_bandwidth(batch),
            "tokens/s",
            "by bandwidth",
        ),
        Row("server_compute", "tokens/s of the server", by_compute, "tokens/s", "by arithmetic"),
        Row("crossover", "sequences a stage where arithmetic takes over", round(crossover), "count"),
    ]
    if question.hourly is not None:
        fastest = min(by_compute, server.tokens_by_bandwidth(crossover))
        rows.append(
            Row(
                "cost_1000",
                "cost of 1,000 tokens at that bound",
                cost_per_thousand(server.devices, question.hourly, fastest),
                "$",
                f"at ${question.hourly:g} an hour",
            )
        )
        at_batch = min(by_compute, server.tokens_by_bandwidth(batch))
        rows.append(
            Row(
                f"cost_1000_at_{batch}",
                f"the same, {batch} a stage",
                cost_per_thousand(server.devices, question.hourly, at_batch),
                "$",
            )
        )
    return Section("serving", f"Serving on {server.devices} {server.device.name}", rows)


def search_section(candidates: list[Candidate], devices: int) -> Section:
    """The best layouts as a section of text."""
    rows = []
    for number, one in enumerate(candidates, start=1):
        words = f"{one.layout.words()}, {one.step.n_micro_batches} x {one.step.micro_batch}"
        words += f", checkpointing {one.step.checkpointing}"
        note = f"{one.memory.total / 1e9:.1f} GB, {one.time.total:.1f} s a step, MFU {one.mfu:.1%}"
        rows.append(Row(f"layout_{number}", words, one.tokens_per_second, "tokens/s", note))
    if not rows:
        rows.append(Row("layout_1", "none fits", None, "text", "more devices, or more memory on each"))
    return Section("search", f"Fastest layouts on at most {devices:,} devices (estimated)", rows)


def with_candidate(question: Question, best: Candidate) -> Question:
    """The same question under the layout of ``best``."""
    return replace(question, layout=best.layout, step=best.step)


def memory_by_stage(question: Question) -> dict[int, Memory]:
    """The peak of the first, a middle and the last pipeline rank."""
    layout = question.layout
    stages = sorted({0, layout.pipeline // 2, layout.pipeline - 1})
    return {stage: memory_of(question.model, layout, question.step, stage) for stage in stages}


def _all_hit(server: Server) -> float:
    return server.tokens_per_user(1e9) if server.model.moe_layers else server.tokens_per_user(1)


def _time(question: Question) -> StepTime:
    return step_time(question.model, question.layout, question.step, question.device, efficiency=question.efficiency)


def _traffic(question: Question) -> Traffic:
    return traffic_of(question.model, question.layout, question.step, question.device)
