"""A model card says what the run's folder knows, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe import presets
from moe.config import ModelConfig
from moe.interop.exporting import export_huggingface
from moe.training import checkpoint
from moe.training.run_folder import RunFolder

Make = Callable[..., Any]

MODEL = presets.model_config(
    "mixtral",
    n_layers=3,
    d_model=32,
    attention={"n_heads": 4, "head_dim": 8},
    experts={"n_experts": 4, "d_ff": 24},
)


def card(run: RunFolder, tmp_path: Path) -> str:
    export_huggingface(run, tmp_path / "out")
    return (tmp_path / "out" / "README.md").read_text()


def test_it_counts_what_there_is(run_of: Make, tmp_path: Path) -> None:
    """Embedding 320 x 32; a layer: attention 4 x 32², two norms, router 4 x 32, four experts of 3 x 24 x 32; a norm."""
    layer = 4 * 32 * 32 + 2 * 32 + 4 * 32
    expert = 3 * 24 * 32
    total = 320 * 32 + 3 * (layer + 4 * expert) + 32

    text = card(run_of(MODEL), tmp_path)

    assert f"| parameters | {total:,}, stored as fp32 |" in text
    assert f"| used by a token | {total - 3 * 2 * expert:,} |" in text
    assert "| experts | 4 a mixture layer, of 24 hidden units |" in text
    assert "| router | 2 experts a token, softmax scores, weights normalised (preset mixtral) |" in text
    assert "transformers reads it as `MixtralForCausalLM`" in text
    assert text.startswith("---\nlibrary_name: transformers\n")


def test_training_text_and_results_are_those_of_the_folder(run_of: Make, tmp_path: Path) -> None:
    run = run_of(MODEL)
    (run.path / "corpus.json").write_text(
        json.dumps({"domains": {"speech": {"train": {"tokens": 5000}}}, "shares": {"speech": "1"}})
    )
    result = {"domain": "speech", "cross_entropy": 4.394, "bits_per_byte": 1.567, "xz": 2.51}
    pooled = result | {"domain": "all text"}
    (run.path / "summary.json").write_text(json.dumps({"progress": {"step": 7}, "domains": [result], "pooled": pooled}))

    text = card(run, tmp_path)

    assert "| steps | 7 of 1,000 |" in text
    assert "| tokens | 1,234 |" in text
    assert "| speech | 5,000 | 1 |" in text
    assert "| speech | 4.394 | 1.567 | 2.510 |" in text


def test_results_of_another_step_are_not_given(run_of: Make, tmp_path: Path) -> None:
    run = run_of(MODEL)
    (run.path / "summary.json").write_text(json.dumps({"progress": {"step": 6}}))

    assert "Results" not in card(run, tmp_path)


@pytest.mark.parametrize(
    ("step", "said"),
    [(0, "taken over as they are. "), (9, "taken over as they are, and were trained on for 9 steps with moe-lab. ")],
)
def test_where_weights_came_from_is_said(
    step: int, said: str, checkpoint_of: Make, imported: Make, tmp_path: Path
) -> None:
    run = imported(checkpoint_of("mixtral"))
    checkpoint.save(run.checkpoints_path, step, run.load_model(), None, {"tokens": 10}, keep=1)

    text = card(run, tmp_path)

    assert f"whose weights came from a mixtral checkpoint, {said}" in text
    assert ("| steps | none |" in text) == (step == 0)


def test_a_dense_model_has_no_experts_to_speak_of(run_of: Make, tmp_path: Path) -> None:
    twin: ModelConfig = presets.build(
        ModelConfig, {"dense_twin": True, "n_layers": 2, "d_model": 32, "attention.n_heads": 2, "experts.d_ff": 24}
    )

    text = card(run_of(twin), tmp_path)

    assert "A dense language model trained with moe-lab." in text
    assert "| feed-forward | 48 hidden units |" in text
    assert "expert" not in text.split("# ours")[1]
