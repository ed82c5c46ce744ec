"""Draw which experts each domain's held-out text goes to: ``python dev/picture.py RUN OUT.svg``, the picture in README.

A cell is the share of a domain's assignments that an expert gets, over the fair share 1/E. A column of a model without
specialisation is one colour.
"""

import sys
from pathlib import Path

import torch

from moe.data.batches import validation_batches
from moe.training.run_folder import RunFolder

CELL, GAP, LEFT, TOP = 20, 36, 84, 64
LOW, FAIR, HIGH = (247, 247, 244), (203, 213, 224), (23, 63, 115)


@torch.no_grad()
def loads(run: RunFolder) -> tuple[list[str], torch.Tensor]:
    """Domains, and load over fair share by [layer, domain, expert]."""
    config, model = run.config(), run.load_model()
    if not config.model.moe_layers:
        raise SystemExit(f"{run.path}: a dense model has no experts to draw")
    corpus = run.corpus(config.data, print)
    length = config.data.sequence_length
    counts = torch.zeros(len(config.model.moe_layers), len(corpus.domains), config.model.experts.n_experts)
    for index, held_out in enumerate(corpus.validation.values()):
        for batch in validation_batches(
            held_out,
            domain=index,
            end_of_text=corpus.tokenizer.end_of_text,
            sequence_length=length,
            stride=length,
            rows=32,
        ):
            _, routings = model.hidden(batch.tokens)
            counts[:, index] += torch.stack([routing.counts() for routing in routings])
    return list(corpus.domains), counts / counts.mean(-1, keepdim=True)


def draw(domains: list[str], over_fair: torch.Tensor) -> str:
    """The heat maps as a self-contained SVG, one a layer, side by side in two rows."""
    n_layers, n_domains, n_experts = over_fair.shape
    per_row = min(2, n_layers)
    panel_width, panel_height = n_experts * CELL + GAP, n_domains * CELL + GAP + 8
    width = LEFT + per_row * panel_width
    height = TOP + -(-n_layers // per_row) * panel_height + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="16" y="26" font-size="16" font-weight="bold" fill="#1a202c">'
        f"Which of the {n_experts} experts each kind of text goes to</text>",
        f'<text x="16" y="44" fill="#4a5568">held-out text; every expert gets {1 / n_experts:.2%} of all '
        "assignments where nothing is specialised</text>",
    ]
    for layer in range(n_layers):
        left = LEFT + (layer % per_row) * panel_width
        top = TOP + (layer // per_row) * panel_height + 20
        parts.append(f'<text x="{left}" y="{top - 6}" fill="#1a202c">layer {layer}</text>')
        for domain in range(n_domains):
            y = top + domain * CELL
            if layer % per_row == 0:
                label = f'<text x="{left - 8}" y="{y + 14}" text-anchor="end" fill="#1a202c">{domains[domain]}</text>'
                parts.append(label)
            for expert in range(n_experts):
                value = float(over_fair[layer, domain, expert])
                title = f"<title>{domains[domain]}, expert {expert}: {value:.2f} x fair</title>"
                parts.append(
                    f'<rect x="{left + expert * CELL}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
                    f'fill="{colour(value)}">{title}</rect>'
                )
    y = height - 26
    for step, value in enumerate((0, 0.5, 1, 2, 3, 4)):
        x = LEFT + step * 74
        parts.append(f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour(value)}"/>')
        parts.append(f'<text x="{x + CELL + 4}" y="{y + 14}" fill="#4a5568">{value:g} x fair</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def colour(over_fair: float) -> str:
    """White-grey for none, light blue for the fair share, dark blue for four times it and more."""
    if over_fair <= 1:
        start, end, part = LOW, FAIR, over_fair
    else:
        start, end, part = FAIR, HIGH, min(1.0, (over_fair - 1) / 3)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(start, end, strict=True))


if __name__ == "__main__":
    source, target = sys.argv[1:]
    Path(target).write_text(draw(*loads(RunFolder.open(Path(source)))), encoding="utf-8")
