"""Kill a process of a run under ``torchrun --max-restarts``, again and again, and see whether the run goes on.

    python dev/kills.py --runs 20

Each run trains a small mixture on two processes with spread experts. Once it has saved, one process, chosen at random,
is killed at a random moment. The run must end by itself with every step logged once, and the losses of a run that
nobody disturbed.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe.training.metrics import read_metrics  # noqa: E402

SETTINGS = """\
model:
  n_layers: 2
  d_model: 32
  max_seq: 64
  attention: {{n_heads: 2, head_dim: 16}}
  experts: {{n_experts: 4, d_ff: 16}}
data:
  corpus: {folder}/corpus.yaml
  cache: {folder}/cache
  vocab_size: 300
  sequence_length: 32
  validation_bytes: 600
training:
  steps: {steps}
  batch_size: 4
  device: cpu
  precision: fp32
  evaluate_every: 100000
  checkpoint_every: 5
  schedule: {{warmup_steps: 1}}
parallel: {{expert: 2, shard: full}}
run: {{folder: {folder}/runs}}
"""


def main() -> int:
    """Run the command; 0 if every run went on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    run = parser.parse_args()
    chance = random.Random(run.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["the", "a", "house", "ship", "dog", "sleeps", "runs", "sings", "slowly", "and", "or", "under"]
        (folder / "text.txt").write_text("\n".join(" ".join(chance.choices(words, k=30)) for _ in range(200)))
        (folder / "corpus.yaml").write_text("- {domain: text, kind: files, include: text.txt}\n")
        (folder / "small.yaml").write_text(SETTINGS.format(folder=folder, steps=run.steps))
        undisturbed = launch(folder, "undisturbed")
        assert undisturbed.wait() == 0, "the run that nobody disturbs must end well"
        expected = losses(folder, "undisturbed")
        good = 0
        for number in range(run.runs):
            went_on, what = disturbed(folder, f"run-{number}", chance, expected)
            good += went_on
            print(f"{number + 1:3}: {what}", flush=True)
    print(f"{good} of {run.runs} went on and ended with the numbers of the undisturbed run")
    return 0 if good == run.runs else 1


def launch(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """Two processes, which are started again up to three times."""
    arguments = ["--nproc-per-node", "2", "--max-restarts", "3", "--monitor-interval", "0.2", str(ROOT / "train.py")]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *arguments, str(folder / "small.yaml"), "--run.name", name],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ
            | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )


def disturbed(folder: Path, name: str, chance: random.Random, expected: list[float]) -> tuple[bool, str]:
    """Whether a run whose process is killed after its first checkpoint goes on, and what happened."""
    launcher = launch(folder, name)
    checkpoints = folder / "runs" / name / "checkpoints"
    while not list(checkpoints.glob("step-????????")):
        if launcher.poll() is not None:
            return False, "ended before it had saved"
        time.sleep(0.05)
    time.sleep(chance.uniform(0, 0.5))
    victims = children(launcher.pid)
    if len(victims) != 2:
        launcher.wait()
        return False, f"had {len(victims)} processes when one was to be killed"
    rank = chance.randrange(2)
    reached = len(losses(folder, name))
    os.kill(victims[rank], signal.SIGKILL)
    try:
        status = launcher.wait(180)
    except subprocess.TimeoutExpired:
        launcher.terminate()
        launcher.wait()
        return False, f"rank {rank} killed after step {reached}: did not end"
    seen = losses(folder, name)
    same = seen == expected
    return status == 0 and same, (
        f"rank {rank} killed after step {reached}: ended with status {status}, {len(seen)} steps, "
        f"{'the same' if same else 'other'} losses"
    )


def losses(folder: Path, name: str) -> list[float]:
    """The loss of every step that is logged."""
    path = folder / "runs" / name / "metrics.jsonl"
    return [row["lm_loss"] for row in read_metrics(path) if row["kind"] == "train"] if path.exists() else []


def children(pid: int) -> list[int]:
    """The processes that ``pid`` started, in the order of their ranks."""
    return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


if __name__ == "__main__":
    sys.exit(main())
