"""``python -m moe plan`` as it is called."""

import json
from pathlib import Path

import pytest

from moe.cli import main


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_the_plan_of_gpt4(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "configs/gpt4.yaml", "--gpus", "25000", "--tokens", "13e12", "--mfu", "0.34", "--count", "6nd")

    assert "1,820,849,418,240 (1.82T)" in text
    assert "Training on 25,000 a100-80gb" in text
    assert "94.5 days" in text  # 2.166e25 FLOP: the embedding counts in 6 N D
    assert "What was reported of GPT-4" in text
    assert "+169.8%" in text
    assert "Where the reports contradict each other" in text


def test_json_has_every_number_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "configs/gpt4.yaml", "--json", "--days", "95", "--serve", "tp8,pp16")
    numbers = json.loads(text)

    assert numbers["parameters"]["total"] == 1_820_849_418_240
    assert numbers["training"]["days"] == 95
    assert numbers["training"]["cost"] == 24_960 * 95 * 24
    assert numbers["serving"]["concurrent_32768"] == 346
    assert numbers["reported"]["training"]["residual"] == pytest.approx(0.0029, abs=1e-4)
    assert numbers["memory"]["total"] == pytest.approx(
        sum(numbers["memory"][part] for part in ("weights", "gradients", "optimizer", "activations", "buffers"))
    )


def test_days_and_utilisation_are_each_others_inverse(capsys: pytest.CaptureFixture[str]) -> None:
    there = json.loads(plan(capsys, "configs/toy.yaml", "--json", "--mfu", "0.3", "--gpus", "2"))["training"]
    back = json.loads(plan(capsys, "configs/toy.yaml", "--json", "--days", str(there["days"]), "--gpus", "2"))
    assert back["training"]["mfu"] == pytest.approx(0.3)


@pytest.mark.parametrize("path", sorted(Path("configs/published").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_published_configuration_has_a_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, str(path), "--gpu", "h200", "--rate", "3")
    assert "Memory of a device" in text
    assert "reported of GPT-4" not in text


def test_the_best_layout_is_the_first_of_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["configs/published/olmoe-1b-7b.yaml", "--gpus", "8", "--gpu", "h100", "--layout", "best"]
    numbers = json.loads(plan(capsys, *arguments, "--search", "2", "--json", "--training.batch_size", "64"))
    assert numbers["search"]["layout_1"]["layout"].startswith(numbers["asked"]["layout"])
    assert numbers["search"]["layout_1"]["tokens_per_second"] >= numbers["search"]["layout_2"]["tokens_per_second"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one configuration is needed, and 0 were given"),
        (["configs/toy.yaml", "--gpu", "h1000"], "--gpu h1000: no such device; did you mean h100?"),
        (["configs/toy.yaml", "--mfu", "0.3", "--days", "3"], "--mfu and --days say the same"),
        (["configs/toy.yaml", "--layout", "tp8,xx3"], "--layout tp8,xx3"),
        (["configs/toy.yaml", "--layout", "dp8", "--gpus", "4"], "takes 8 devices, and --gpus is 4"),
        (["configs/toy.yaml", "--gpus", "2.5"], "must be a whole number above 0"),
        (["configs/toy.yaml", "--tokens", "nan"], "must be a number above 0"),
        (["configs/toy.yaml", "--lengths", "8k"], "must be whole numbers with commas"),
        (["configs/toy.yaml", "--count", "all"], "must be one of 6nd, products, causal, full_square"),
        (["configs/toy.yaml", "--serve", "dp2"], "a server has tpN and ppN alone"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
