"""A checkpoint gives back every bit, and a damaged, partial or foreign one is refused by name."""

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe.errors import UserError
from moe.training import checkpoint as checkpoints
from moe.training.checkpoint import Checkpoint, DamagedCheckpointError, newest, open_checkpoint, save

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]


class Small(nn.Module):
    """One of everything that a model may hold."""

    counts: Tensor
    selection_bias: Tensor

    def __init__(self, width: int = 3, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.low = nn.Parameter(torch.randn(4).bfloat16())
        self.never_used = nn.Parameter(torch.randn(2))
        self.register_buffer("counts", torch.tensor([2**53 + 1, 0, 7]))
        self.register_buffer("selection_bias", torch.tensor([1e-9, -0.25]))
        self.register_buffer("flags", torch.tensor([0, 255], dtype=torch.uint8))
        self.register_buffer("transposed", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("derived", torch.randn(2), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(self.embedding(ids))) * self.gain
        return logits + self.low.float().sum()


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """Matrices decay and vectors do not, as in training."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """A few steps on random tokens, so that the numbers depend on weights, moments and generator alike."""
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(torch.randint(5, (8,))), torch.randint(5, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(seed: int = 0) -> tuple[Small, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Small()
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    return model, optimizer


def no_report(line: str) -> None:
    raise AssertionError(f"unexpected report: {line}")


def assert_same_tensors(first: nn.Module, second: nn.Module) -> None:
    for (name, left), right in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert left.dtype == right.dtype and torch.equal(left, right), name


# ----------------------------------------------------------------------------------------------------------- round trip


def test_a_resumed_run_continues_with_the_same_numbers_to_the_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    optimizer.param_groups[1]["lr"] = 0.003
    save(tmp_path, 2, model, optimizer, {"tokens": 16}, keep=1)
    straight = train(model, optimizer, 3)

    torch.manual_seed(99)
    resumed = Small()
    resumed_optimizer = optimizer_of(resumed)
    found = newest(tmp_path, no_report)
    found.load_model(resumed)
    found.load_optimizer(resumed_optimizer, resumed)
    found.restore_random_state()

    assert train(resumed, resumed_optimizer, 3) == straight
    assert_same_tensors(model, resumed)
    assert [group["lr"] for group in resumed_optimizer.param_groups] == [0.01, 0.003]
    # 2 steps saved and 3 done, except for the parameter that never had a gradient.
    assert resumed_optimizer.state[resumed.gain]["step"] == 5
    assert resumed.never_used not in resumed_optimizer.state


def test_a_second_resume_still_continues_the_straight_run(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (2, 3):
        save(tmp_path, step, model, optimizer, {}, keep=1)
        expected = train(model, optimizer, 1)
        model, optimizer = Small(), optimizer_of(Small())
        optimizer = optimizer_of(model)
        found = newest(tmp_path, no_report)
        found.load_model(model)
        found.load_optimizer(optimizer, model)
        found.restore_random_state()
        assert train(model, optimizer, 1) == expected


def test_every_generator_continues(tmp_path: Path) -> None:
    model, _ = trained()
    random.gauss(0, 1)  # python and numpy make normal numbers in pairs, and keep the second one
    np.random.standard_normal()

    def draw() -> list[float]:
        return [
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.rand(),
            torch.rand(()).item(),
        ]

    save(tmp_path, 1, model, None, {}, keep=1)
    expected = draw()
    draw()
    newest(tmp_path, no_report).restore_random_state()
    assert draw() == expected


def test_progress_and_environment_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = {"tokens": 2**60 + 1, "skipped": 0, "best": float("inf"), "domains": ["a", "ü"], "last": {"loss": 0.1}}
    save(tmp_path, 7, Small(), None, progress, keep=1)
    found = newest(tmp_path, no_report)
    assert (found.step, found.progress, found.folder) == (7, progress, tmp_path / "step-00000007")
    assert found.environment_differences() == []
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert found.environment_differences() == [f"threads {threads} then, {threads + 1} now"]


def test_a_tied_weight_is_stored_once_and_derived_buffers_not_at_all(tmp_path: Path) -> None:
    stored = load_file(save(tmp_path, 1, Small(), None, {}, keep=1) / "model.safetensors")
    assert sorted(stored) == [
        "counts", "embedding.weight", "flags", "gain", "inner.bias", "inner.weight", "low", "never_used",
        "selection_bias", "transposed",
    ]  # fmt: skip


def test_the_optimizer_is_stored_by_parameter_name(tmp_path: Path) -> None:
    stored = load_file(save(tmp_path, 1, *trained(), {}, keep=1) / "optimizer.safetensors")
    names = ["embedding.weight", "gain", "inner.bias", "inner.weight", "low"]
    assert sorted(stored) == [f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq", "step") for name in names]


def test_views_of_one_memory_are_stored_each(tmp_path: Path) -> None:
    def views(values: Tensor) -> nn.Module:
        model = nn.Module()
        model.register_buffer("whole", values)
        model.register_buffer("flat", values.view(-1))
        model.register_buffer("row", values[1])
        return model

    save(tmp_path, 1, views(torch.arange(6.0).reshape(2, 3)), None, {}, keep=1)
    loaded = views(torch.zeros(2, 3))
    newest(tmp_path, no_report).load_model(loaded)
    assert loaded.row.tolist() == [3, 4, 5]  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(("saved_compiled", "loaded_compiled"), [(True, False), (False, True), (True, True)])
def test_compiling_changes_no_name(tmp_path: Path, saved_compiled: bool, loaded_compiled: bool) -> None:
    def build(seed: int, compiled: bool) -> tuple[nn.Module, torch.optim.AdamW]:
        """torch.compile wraps here a block and then the whole model; nothing runs compiled."""
        torch.manual_seed(seed)
        model: nn.Module = Small()
        optimizer = optimizer_of(model)
        train(model, optimizer, 1)
        if compiled:
            model.inner = torch.compile(model.inner)  # type: ignore[assignment]
            model = torch.compile(model)  # type: ignore[assignment]
            assert "_orig_mod.inner._orig_mod.weight" in model.state_dict()
        return model, optimizer

    model, optimizer = build(0, saved_compiled)
    folder = save(tmp_path, 1, model, optimizer, {}, keep=1)
    assert not [name for name in load_file(folder / "model.safetensors") if "_orig_mod" in name]
    loaded, loaded_optimizer = build(1, loaded_compiled)
    found = newest(tmp_path, no_report)
    found.load_model(loaded)
    found.load_optimizer(loaded_optimizer, loaded)
    assert_same_tensors(model, loaded)
    for left, right in zip(model.parameters(), loaded.parameters(), strict=True):
        if left in optimizer.state:
            assert torch.equal(optimizer.state[left]["exp_avg"], loaded_optimizer.state[right]["exp_avg"])


def test_optimizer_groups_may_be_in_another_order(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer, {}, keep=1)
    other = optimizer_of(model)
    other.param_groups.reverse()
    newest(tmp_path, no_report).load_optimizer(other, model)
    for parameter, state in optimizer.state.items():
        assert torch.equal(state["exp_avg_sq"], other.state[parameter]["exp_avg_sq"])


def test_loaded_tensors_survive_the_checkpoint_that_they_came_from(tmp_path: Path) -> None:
    model, optimizer = trained()
    expected = {parameter: state["exp_avg"].clone() for parameter, state in optimizer.state.items()}
    folder = save(tmp_path, 1, model, optimizer, {}, keep=1)
    open_checkpoint(folder).load_optimizer(optimizer, model)
    for file in folder.iterdir():
        file.write_bytes(bytes(file.stat().st_size))  # in place: a mapping of the file would see it
    assert all(torch.equal(optimizer.state[parameter]["exp_avg"], value) for parameter, value in expected.items())


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2."""
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer, {}, keep=2)
    save(tmp_path, 2, model, optimizer, {}, keep=2)
    return tmp_path


def assert_falls_back(folder: Path, named: str) -> None:
    """The damaged file of step 2 is named, and step 1 is used."""
    lines: list[str] = []
    found = newest(folder, lines.append)
    assert found.step == 1
    assert len(lines) == 1 and f"step-00000002/{named}" in lines[0], lines


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(two: Path, name: str) -> None:
    path = two / "step-00000002" / name
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    path.write_bytes(content)
    lines: list[str] = []
    assert newest(two, lines.append).step == 1
    # A wrong manifest accuses the file that it is wrong about.
    assert "step-00000002" in lines[0] and (name in lines[0] or name == "manifest.json")


def test_no_flipped_bit_of_the_manifest_passes(two: Path) -> None:
    path = two / "step-00000002" / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match="step-00000002"):
            open_checkpoint(path.parent)
    path.write_bytes(whole)
    assert open_checkpoint(path.parent).step == 2


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(two: Path, name: str) -> None:
    path = two / "step-00000002" / name
    os.truncate(path, path.stat().st_size - 1)
    assert_falls_back(two, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(two: Path, name: str) -> None:
    (two / "step-00000002" / name).unlink()
    assert_falls_back(two, f"{name}: missing")


@pytest.mark.parametrize("name", FILES)
def test_an_unreadable_file_is_named(two: Path, name: str) -> None:
    """A folder in the file's place: even root cannot read it."""
    path = two / "step-00000002" / name
    path.unlink()
    path.mkdir()
    assert_falls_back(two, name)


def test_a_renamed_checkpoint_is_refused(two: Path) -> None:
    (two / "step-00000002").rename(two / "step-00000009")
    lines: list[str] = []
    assert newest(two, lines.append).step == 1
    assert "step-00000009: holds step 2" in lines[0]


def test_another_format_is_refused(two: Path) -> None:
    path = two / "step-00000002" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 3'))
    assert_falls_back(two, "manifest.json: of format 3, not 1 or 2")


def test_where_every_checkpoint_is_damaged_the_user_is_told(two: Path) -> None:
    for step in (1, 2):
        (two / f"step-0000000{step}" / "state.json").unlink()
    lines: list[str] = []
    with pytest.raises(UserError, match=r"every checkpoint here \(2\) is damaged"):
        newest(two, lines.append)
    assert len(lines) == 2


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="no checkpoint here"):
            newest(folder, no_report)


# -------------------------------------------------------------------------------------------------------- another model


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> Checkpoint:
    """Change the tensors of a file and put the digest right, so that only the names can tell."""
    path = folder / name
    with checkpoints.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    manifest = json.loads((folder / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][name] = {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return open_checkpoint(folder)


def test_missing_extra_and_misshapen_tensors_are_named_and_nothing_is_loaded(two: Path) -> None:
    folder = two / "step-00000002"
    model = Small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    found = rewrite(folder, "model.safetensors", lambda tensors: tensors.update(gian=tensors.pop("gain")))
    with pytest.raises(UserError, match="has no gain, which the model has"):
        found.load_model(model)
    found = rewrite(folder, "model.safetensors", lambda tensors: tensors.update(gain=tensors["gian"].clone()))
    with pytest.raises(UserError, match="has gian, which the model has not"):
        found.load_model(model)
    found = rewrite(folder, "model.safetensors", lambda tensors: tensors.pop("gian"))
    found.load_model(Small())
    with pytest.raises(UserError, match=r"embedding.weight is float32 \[5, 3\], and should be float32 \[5, 4\]"):
        found.load_model(Small(width=4))
    found = rewrite(folder, "model.safetensors", lambda tensors: tensors.update(low=tensors["low"].float()))
    with pytest.raises(UserError, match=r"low is float32 \[4\], and should be bfloat16 \[4\]"):
        found.load_model(model)

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tied_checkpoint_does_not_fill_an_untied_model(two: Path) -> None:
    with pytest.raises(UserError, match=r"has no head\.weight"):
        newest(two, no_report).load_model(Small(tied=False))


def test_a_model_without_memory_is_not_taken_for_loaded(two: Path) -> None:
    with torch.device("meta"):
        model = Small()
    with pytest.raises(ValueError, match="meta device"):
        newest(two, no_report).load_model(model)


def test_a_foreign_optimizer_state_is_named(two: Path) -> None:
    folder = two / "step-00000002"
    model, optimizer = trained(1)
    before = optimizer.state[model.gain]["exp_avg"].clone()

    found = rewrite(folder, "optimizer.safetensors", lambda t: t.update({"exp_avg/gian": t.pop("exp_avg/gain")}))
    with pytest.raises(UserError, match="exp_avg/gian, but the optimizer has no parameter gian"):
        found.load_optimizer(optimizer, model)
    found = rewrite(folder, "optimizer.safetensors", lambda t: t.pop("exp_avg/gian"))
    with pytest.raises(UserError, match="has no exp_avg/gain, which goes with exp_avg_sq/gain"):
        found.load_optimizer(optimizer, model)
    found = rewrite(folder, "optimizer.safetensors", lambda t: t.update({"exp_avg/gain": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"exp_avg/gain is float32 \[2\], and should be float32 \[\]"):
        found.load_optimizer(optimizer, model)

    assert torch.equal(optimizer.state[model.gain]["exp_avg"], before)


def test_another_hyperparameter_is_named_with_its_parameter(two: Path) -> None:
    model = Small()
    optimizer = optimizer_of(model)
    optimizer.param_groups[0]["weight_decay"] = 0.2
    with pytest.raises(UserError, match=r"weight_decay of embedding.weight is 0.1, and should be 0.2"):
        newest(two, no_report).load_optimizer(optimizer, model)


def test_an_optimizer_over_fewer_parameters_is_refused(two: Path) -> None:
    model = Small()
    with pytest.raises(UserError, match="which the optimizer has not"):
        newest(two, no_report).load_optimizer(torch.optim.AdamW([model.gain]), model)


def test_a_checkpoint_without_an_optimizer_says_so(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, None, {}, keep=1)
    with pytest.raises(UserError, match="saved without an optimizer"):
        newest(tmp_path, no_report).load_optimizer(optimizer, model)


# ----------------------------------------------------------------------------------------------------- keeping, failing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step, Small(), None, {}, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    save(tmp_path, 200, Small(), None, {}, keep=1)
    assert names(tmp_path) == ["step-00000200"]


def test_the_one_just_saved_is_kept_whatever_later_ones_an_interrupted_run_left(tmp_path: Path) -> None:
    for step in (100, 200):
        save(tmp_path, step, Small(), None, {}, keep=2)
    (tmp_path / "step-00000200" / "state.json").unlink()
    save(tmp_path, 150, Small(), None, {}, keep=1)
    lines: list[str] = []
    assert newest(tmp_path, lines.append).step == 150
    assert names(tmp_path) == ["step-00000150", "step-00000200"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        save(tmp_path, 5, Small(), None, {"attempt": attempt}, keep=2)
    assert names(tmp_path) == ["step-00000005"]
    assert newest(tmp_path, no_report).progress == {"attempt": 3}


def test_the_old_checkpoint_of_a_replacement_that_was_killed_is_used_and_then_removed(tmp_path: Path) -> None:
    """Between stepping aside and its successor taking the name, it is the only one of its step."""
    save(tmp_path, 1, Small(), None, {}, keep=2)
    save(tmp_path, 2, Small(), None, {"attempt": 1}, keep=2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.replaced")
    assert newest(tmp_path, no_report).progress == {"attempt": 1}
    save(tmp_path, 2, Small(), None, {"attempt": 2}, keep=2)
    assert newest(tmp_path, no_report).progress == {"attempt": 2}
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-three").write_text("mine")
    save(tmp_path, 1, Small(), None, {}, keep=1)
    assert names(tmp_path) == ["notes", "step-00000001", "step-three"]


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, *trained(), {}, keep=1)
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}


@contextmanager
def small_files() -> Iterator[None]:
    """The kernel refuses to let any file grow beyond 600 bytes, as a full disk would; pytest's own output, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_a_write_that_the_kernel_refuses_leaves_what_was_there(two: Path) -> None:
    model, optimizer = trained()
    with (
        pytest.raises(UserError, match=r"step-00000003: .* could not be written .*too large.*make room"),
        small_files(),
    ):
        save(two, 3, model, optimizer, {}, keep=1)
    assert names(two) == ["step-00000001", "step-00000002"]
    assert newest(two, no_report).step == 2


@pytest.mark.parametrize("call", range(9))
def test_a_disk_that_fills_up_at_any_file_leaves_what_was_there(
    two: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The nine calls: three tensor files, five files to the disk, and the folder."""
    done = 0

    def fills_up(real: Callable[..., None]) -> Callable[..., None]:
        def write(*arguments: object, **options: object) -> None:
            nonlocal done
            done += 1
            if done > call:
                raise OSError(28, "No space left on device")
            real(*arguments, **options)

        return write

    monkeypatch.setattr(checkpoints, "save_file", fills_up(save_file))
    monkeypatch.setattr(os, "fsync", fills_up(os.fsync))
    with pytest.raises(UserError, match=r"step-00000003: .*No space left on device"):
        save(two, 3, *trained(), {}, keep=1)
    assert done == call + 1
    assert names(two) == ["step-00000001", "step-00000002"]
    assert newest(two, no_report).step == 2


def count_lines(act: Callable[[], object], kill_at: int | None = None) -> int:
    """Lines of checkpoint.py that ``act`` runs; the process kills itself before line number ``kill_at``."""
    count = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal count
        if frame.f_code.co_filename != checkpoints.__file__:  # type: ignore[attr-defined]
            return None
        if event == "line":
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        act()
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "the same step again"])
def test_a_kill_at_any_point_of_a_save_loses_nothing(tmp_path: Path, step: int) -> None:
    model, optimizer = trained()
    folder = tmp_path / "run"

    def start() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, 1, model, optimizer, {"attempt": 1}, keep=2)
        save(folder, 2, model, optimizer, {"attempt": 1}, keep=2)

    def save_again() -> None:
        save(folder, step, model, optimizer, {"attempt": 2}, keep=2)

    start()
    lines = count_lines(save_again)
    outcomes = set()
    points = sorted(random.Random(0).sample(range(lines * 3 // 4), 10)) + list(range(lines * 3 // 4, lines, 12))
    for point in points:
        start()
        child = os.fork()
        if child == 0:
            count_lines(save_again, kill_at=point + 1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        found = newest(folder, no_report)
        outcomes.add((found.step, found.progress["attempt"]))
        found.load_model(Small())
        found.load_optimizer(optimizer_of(model), model)

        save_again()
        assert newest(folder, no_report).progress == {"attempt": 2}
        assert names(folder) == sorted({"step-00000002", f"step-0000000{step}", "step-00000001"})[-2:]
    # Both sides of the moment at which the new one takes its place were seen.
    assert outcomes == {(2, 1), (step, 2)}
