"""What was reported of GPT-4, beside what a shape implies, and where the reports contradict each other.

OpenAI has published nothing of this. Most numbers are those of Patel & Wong 2023 (SemiAnalysis, "GPT-4
Architecture, Infrastructure, Training Dataset, Costs, Vision, MoE"). The comparison says how far a configuration is
from each, not that any of them is true.
"""

from dataclasses import dataclass

from moe.config import ModelConfig
from moe.planner.devices import device
from moe.planner.flops import count_flops
from moe.planner.serving import Server, cost_per_thousand, tokens_at_cost
from moe.planner.training import cost, mfu_of

TOKENS = 13e12
BATCH = 60e6
"""tokens of an optimizer step"""
GPUS, DAYS = 25_000, (90, 100)
GPT3 = 174.6e9
"""parameters of GPT-3 (configs/published/gpt3.yaml)"""
SA, SA24 = "Patel & Wong 2023", "SemiAnalysis 2024"


@dataclass(frozen=True)
class Claim:
    """One reported number."""

    key: str
    what: str
    reported: float
    computed: float
    unit: str
    source: str

    @property
    def residual(self) -> float:
        """How much more was computed than was reported, as a fraction."""
        return self.computed / self.reported - 1


def speaks_of(model: ModelConfig) -> bool:
    """Whether the reports are about a model such as this: 120 layers of 16 experts, two a token."""
    return (model.n_layers, model.experts.n_experts, model.router.top_k) == (120, 16, 2)


def claims(model: ModelConfig) -> list[Claim]:
    """Each reported number with what ``model`` makes it, in the order of the report."""
    parts, flops = model.parameters(), count_flops(model, 8192)
    a100 = device("a100-80gb")
    per_expert = model.n_layers * parts.per_expert
    products = flops.forward("products")
    every_expert = products + 2.0 * parts.idle_experts
    training = 3 * products * TOKENS
    two = 2.0  # bytes of a weight in 16 bits

    return [
        Claim("total", "parameters", 1.8e12, parts.total, "parameters", SA),
        Claim("total_hotz", "parameters, as 8 x 220B", 1.76e12, parts.total, "parameters", "Hotz 2023"),
        Claim("per_expert", "MLP parameters of an expert", 111e9, per_expert, "parameters", SA),
        Claim("attention", "shared parameters of attention", 55e9, parts.attention, "parameters", SA),
        Claim("active", "parameters that a token uses", 280e9, parts.active(), "parameters", SA),
        Claim("of_gpt3", "times GPT-3", 10, parts.total / GPT3, "x", "widely"),
        Claim("active_of_davinci", "active parameters over davinci's", 1.6, parts.active() / 175e9, "x", SA),
        Claim("forward", "arithmetic of a token, forward", 560e9, products, "FLOP", f"{SA}, as TFLOP"),
        Claim("dense_forward", "the same if it were dense", 3700e9, every_expert, "FLOP", f"{SA}, as TFLOP"),
        Claim("training", "arithmetic of training", 2.15e25, training, "FLOP", SA),
        Claim("training_epoch", "arithmetic of training", 2.1e25, training, "FLOP", "Epoch AI"),
        Claim("tokens_per_expert", "tokens of a step per expert", 7.5e6, BATCH * 2 / 16, "tokens", SA),
        Claim("mfu_90", "MFU in 90 days", 0.36, mfu_of(training, GPUS, a100.flops, DAYS[0]), "share", SA),
        Claim("mfu_100", "MFU in 100 days", 0.32, mfu_of(training, GPUS, a100.flops, DAYS[1]), "share", SA),
        Claim("cost", "cost at $1 an hour, 95 days", 63e6, cost(GPUS, sum(DAYS) / 2, 1.0), "$", SA),
        Claim("cost_h100", "cost on 8,192 H100, 55 days at $2", 21.5e6, cost(8192, 55, 2.0), "$", SA),
        Claim("weights_training", "16-bit weights a GPU, TP8 x PP15", 30e9, parts.total * two / 120, "bytes", SA),
        Claim("weights_serving", "16-bit weights a GPU, TP8 x PP16", 30e9, parts.total * two / 128, "bytes", SA),
        Claim("node", "parameters on a node that serves", 130e9, parts.total / 15, "parameters", f"{SA}, 15 nodes"),
        Claim("expert_batch", "tokens per expert at batch 4,096", 500, 4096 * 2 / 16, "tokens", SA),
        Claim("state", "weights and optimizer's state", 10.8e12, 16.0 * parts.total, "bytes", SA24),
        Claim("aws", "16 p4de a month", 512e3, 16 * 40.97 * 730, "$", "blog posts; list price $40.97 an hour"),
    ]


def contradictions(model: ModelConfig) -> list[str]:
    """Where reported numbers cannot all be true, whatever the shape; each with the arithmetic that shows it."""
    a40 = Server(model=model, device=device("a100-40gb"), tensor=8, pipeline=16)
    a80 = Server(model=model, device=device("a100-80gb"), tensor=8, pipeline=16)
    served = tokens_at_cost(128, 1.0, 0.0049)
    most = a80.tokens_by_compute()
    days_63 = 63e6 / (GPUS * 24)
    plain = model.attention.head_dim * model.attention.n_heads / model.d_model
    return [
        '560 and 3,700 "TFLOP" a token are GFLOP: 2 FLOPs for each of 280B and of 1,831B parameters.',
        "16 x 111B + 55B is 1,831B and 2 x 111B + 55B is 277B, not 1.8T and 280B; 2.15e25 / (6 x 13T) is 275.6B. No "
        "shape is within 0.85 % of all of them.",
        f"$63M at $1 an hour is {days_63:.0f} days of 25,000 GPUs, and 90 to 100 days are "
        f"${cost(GPUS, 90, 1) / 1e6:.0f}M to ${cost(GPUS, 100, 1) / 1e6:.0f}M.",
        "25,000 A100s became about 20,000 a year later (SemiAnalysis 2024), which would be an MFU of "
        f"{mfu_of(2.15e25, 20_000, 312e12, 90):.1%} to {mfu_of(2.15e25, 20_000, 312e12, 100):.1%}, not 32 to 36 %.",
        f"55 days on 8,192 H100 are an MFU of {mfu_of(2.15e25, 8192, 989e12, 55):.1%} in bfloat16, far above the 32 to "
        "36 % of the A100s: hopeful, or 8 bits.",
        f"130B parameters a node are {130e9 * 2 / 8 / 1e9:.1f} GB a GPU, not less than 30; 1,831B on 15 nodes are "
        f"{1831 / 15:.0f}B each ({1831 * 2 / 120:.1f} GB a GPU), on the 16 of TP8 x PP16 {1831 / 16:.0f}B "
        f"({1831 * 2 / 128:.1f} GB).",
        f"10.8 TB of weights and optimizer's state are {10.8 / 1.8:.0f} bytes a parameter; AdamW in mixed precision "
        f"has 16 to 18, {16 * 1.8:.0f} to {18 * 1.8:.0f} TB.",
        f'0.0049 "cents" for a thousand tokens are dollars: at $1 an hour 128 A100s would do {served:,.0f} tokens/s '
        f"for $0.0049, {served / most:.0%} of what their arithmetic allows ({most:,.0f}), and for a hundredth of that "
        f"{100 * served:,.0f}, {100 * served / most:.0f} times as many as it allows.",
        f"One key head and 55B of attention need queries wider than the model ({plain:g} times here): with queries as "
        "wide as the model, 120 layers of width 10,752 have 28B.",
        f"32k on 40 GB: {a40.concurrent(32768)} sequences at once on 128 GPUs, {a80.concurrent(32768)} on 80 GB; at 8k "
        f"{a40.concurrent(8192)} and {a80.concurrent(8192)}, and a batch of 4,096 leaves each "
        f"{a80.context_at(4096):,} tokens.",
        f"$512k a month for 16 p4de is $43.84 an hour each; the list price is $40.97. At $701 an hour for 128 GPUs and "
        f"{served:,.0f} tokens/s a thousand tokens cost ${cost_per_thousand(128, 701 / 128, served):.4f}; the API "
        "asked $0.03 and $0.06.",
    ]
