"""The tiles of the fused experts: how they are chosen and remembered, and that a compiler for GPUs takes them all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton import KernelInterface
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from moe.model.experts import ExpertWeights, fused_experts
from moe.model.experts.fused import kernels, launch, tiles
from moe.model.experts.fused.sort import sort_assignments
from moe.model.experts.fused.tiles import Product, Tiles, choose_tiles, remember_in
from moe.model.routing import Routing

GPU = torch.device("cuda")
SMALL, MIDDLE, LARGE = Tiles(32, 32, 32, 4, 2), Tiles(64, 64, 32, 4, 3), Tiles(128, 256, 64, 8, 4, flatten=True)
PRODUCT = Product("plain", 128, 96, 8, torch.bfloat16)
KEY = "A GPU | plain | 8 x 128 -> 96 | bfloat16"


class Clock:
    """A GPU's time: ``run`` takes as many milliseconds as it is told, the last of them again and again."""

    def __init__(self, **milliseconds: float | list[float] | Exception) -> None:
        self.times = {tiles: milliseconds.get(name, 5.0) for name, tiles in NAMES.items()}
        self.now = 0.0
        self.runs: list[Tiles] = []

    def run(self, tiles: Tiles) -> None:
        self.runs.append(tiles)
        time = self.times[tiles]
        if isinstance(time, Exception):
            raise time
        if isinstance(time, list):
            time = time.pop(0) if len(time) > 1 else time[0]
        self.now += time

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    """What torch.cuda.Event is, on that clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def record(self) -> None:
        self.at = self.clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


NAMES = {"small": SMALL, "middle": MIDDLE, "large": LARGE}


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """A new process on a machine with a GPU that offers three tilings: nothing is chosen, no file is named."""

    def start(**milliseconds: float | list[float] | Exception) -> Clock:
        clock = Clock(**milliseconds)
        monkeypatch.setattr(tiles, "_chosen", {})
        monkeypatch.setattr(tiles, "_file", None)
        monkeypatch.setattr(tiles, "candidates", lambda product, device: [SMALL, MIDDLE, LARGE])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "Event", clock.event)
        return clock

    return start


# ----------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(("fastest", "expected"), NAMES.items())
def test_the_fastest_wins_and_is_timed_once(fastest: str, expected: Tiles, start: Callable[..., Clock]) -> None:
    clock = start(**{fastest: 4.0})

    assert choose_tiles(PRODUCT, GPU, clock.run) == expected
    assert clock.runs == [tiles for tiles in NAMES.values() for _ in range(1 + tiles_rounds())]
    assert choose_tiles(PRODUCT, GPU, clock.run) == expected
    assert len(clock.runs) == 3 * (1 + tiles_rounds())


def tiles_rounds() -> int:
    """Runs of each that are timed, after one in which it is compiled."""
    return tiles.ROUNDS


def test_neither_compilation_nor_one_slow_run_decides(start: Callable[..., Clock]) -> None:
    """Seconds to compile, then 9 ms where something else ran, then 3 and 4 ms: the 3 count, against 5."""
    clock = start(middle=[2000.0, 9.0, 3.0, 4.0])

    assert choose_tiles(PRODUCT, GPU, clock.run) == MIDDLE


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        PTXASError("out of registers"),
        CompilationError("", None, ""),
        RuntimeError("PassManager::run failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_does_not_fit_is_skipped(error: Exception, start: Callable[..., Clock]) -> None:
    clock = start(small=error, middle=8.0, large=7.0)

    assert choose_tiles(PRODUCT, GPU, clock.run) == LARGE
    assert clock.runs.count(SMALL) == 1


def test_a_device_that_none_fits_is_named_with_a_remedy(start: Callable[..., Clock]) -> None:
    too_large = OutOfResources(300_000, 65_536, "shared memory")
    clock = start(small=too_large, middle=too_large, large=too_large)

    with pytest.raises(RuntimeError) as refused:
        choose_tiles(PRODUCT, GPU, clock.run)

    assert str(refused.value) == (
        f"no tiling of the fused experts fits this device: {KEY}; use another experts.backend"
    )


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("an illegal memory access")])
def test_any_other_error_is_not_hidden(error: Exception, start: Callable[..., Clock]) -> None:
    clock = start(small=error)

    with pytest.raises(type(error)):
        choose_tiles(PRODUCT, GPU, clock.run)


def test_each_product_has_its_own_tiles(start: Callable[..., Clock]) -> None:
    """Every field counts; the number of rows is none of them."""
    others = [
        PRODUCT._replace(kind="transposed"),
        PRODUCT._replace(inner_width=64),
        PRODUCT._replace(out_width=64),
        PRODUCT._replace(n_experts=4),
        PRODUCT._replace(dtype=torch.float16),
    ]
    assert choose_tiles(PRODUCT, GPU, start(small=1.0).run) == SMALL
    first = tiles._chosen
    clock = start(large=1.0)
    tiles._chosen.update(first)

    assert [choose_tiles(other, GPU, clock.run) for other in others] == 5 * [LARGE]
    assert choose_tiles(PRODUCT, GPU, clock.run) == SMALL


def test_while_a_graph_is_recorded_nothing_is_timed(
    start: Callable[..., Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is taken, for this time; what was chosen before holds."""
    clock = start(large=1.0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    assert choose_tiles(PRODUCT, GPU, clock.run) == SMALL
    assert clock.runs == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose_tiles(PRODUCT, GPU, clock.run) == LARGE
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose_tiles(PRODUCT, GPU, clock.run) == LARGE


def test_the_interpreter_is_never_timed() -> None:
    def run(tiles: Tiles) -> None:
        raise AssertionError

    assert choose_tiles(PRODUCT, torch.device("cpu"), run) == Tiles(16, 32, 16, 4, 2)


def test_a_gate_more_or_less_is_another_product(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gate twice the columns of activations are written, and what fits with one need not fit.

    16 rows of W_in are a gate and a value for each of 8 hidden units, or one for each of 16.
    """
    products = []

    def choose(product: Product, device: torch.device, run: Callable[[Tiles], None]) -> Tiles:
        products.append(product)
        return Tiles(64, 64, 32, 4, 2)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=kernel_device, dtype=torch.bfloat16)

    monkeypatch.setattr(launch, "choose_tiles", choose)
    scores = ones(3, 1).float()
    routing = Routing(scores.log(), scores, torch.zeros(3, 1, dtype=torch.int64, device=kernel_device), scores)

    fused_experts(ones(3, 8), routing, ExpertWeights(ones(1, 16, 8), ones(1, 8, 8), None, None, "swiglu"))
    fused_experts(ones(3, 8), routing, ExpertWeights(ones(1, 16, 8), ones(1, 8, 16), None, None, "gelu"))

    assert products[0][1:] == products[2][1:] == (8, 16, 1, torch.bfloat16)
    assert (products[0].kind, products[2].kind) == ("hidden", "hidden, no gate")


# ------------------------------------------------------------------------------------------------------------- the file


def test_a_choice_is_written_and_read_by_the_next_process(start: Callable[..., Clock], tmp_path: Path) -> None:
    clock = start(large=1.0)
    remember_in(tmp_path / "tiles.json")
    choose_tiles(PRODUCT, GPU, clock.run)

    assert json.loads((tmp_path / "tiles.json").read_text()) == {
        KEY: {
            "block_m": 128,
            "block_n": 256,
            "block_k": 64,
            "warps": 8,
            "stages": 4,
            "group": 8,
            "flatten": True,
            "specialised": False,
            "gather": False,
        }
    }
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]
    clock = start(small=1.0)
    remember_in(tmp_path / "tiles.json")
    assert choose_tiles(PRODUCT, GPU, clock.run) == LARGE
    assert clock.runs == []


def test_choices_of_other_products_and_other_gpus_stay_in_the_file(
    start: Callable[..., Clock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    remember_in(tmp_path / "tiles.json")
    choose_tiles(PRODUCT, GPU, start_with_file(start, tmp_path, small=1.0).run)
    choose_tiles(PRODUCT._replace(n_experts=4), GPU, start_with_file(start, tmp_path, middle=1.0).run)
    clock = start_with_file(start, tmp_path, large=1.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    choose_tiles(PRODUCT, GPU, clock.run)

    written = json.loads((tmp_path / "tiles.json").read_text())
    assert {key: Tiles(**fields) for key, fields in written.items()} == {
        KEY: SMALL,
        KEY.replace("8 x", "4 x"): MIDDLE,
        KEY.replace("A GPU", "Another GPU"): LARGE,
    }


def start_with_file(start: Callable[..., Clock], folder: Path, **milliseconds: float) -> Clock:
    clock = start(**milliseconds)
    remember_in(folder / "tiles.json")
    return clock


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b'{"%s": 3}' % KEY.encode(), b'{"%s": {"block_q": 64}}' % KEY.encode()],
)
def test_a_damaged_file_is_made_anew(content: bytes, start: Callable[..., Clock], tmp_path: Path) -> None:
    (tmp_path / "tiles.json").write_bytes(content)
    clock = start_with_file(start, tmp_path, middle=1.0)

    assert choose_tiles(PRODUCT, GPU, clock.run) == MIDDLE
    assert list(json.loads((tmp_path / "tiles.json").read_text())) == [KEY]


def test_a_folder_that_cannot_be_written_is_a_warning(start: Callable[..., Clock], tmp_path: Path) -> None:
    """The run goes on with what was chosen; the file is named."""
    clock = start(large=1.0)
    remember_in(tmp_path / "missing" / "tiles.json")

    with pytest.warns(UserWarning) as warned:
        assert choose_tiles(PRODUCT, GPU, clock.run) == LARGE

    assert [str(warning.message) for warning in warned] == [
        f"{tmp_path}/missing/tiles.json: the tiles that were chosen cannot be written: No such file or directory"
    ]


# --------------------------------------------------------------------------------------------------------- the compiler


SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""bytes that a program may have (CUDA programming guide, compute capabilities)"""
ALL_CANDIDATES = 90
"""the capability for which all are compiled; for the others the first of each product, for the time's sake"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each kernel needs, from a process in which Triton compiles and does not interpret."""
    found = tmp_path_factory.mktemp("compiled") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    subprocess.run([sys.executable, __file__, str(found)], env=environment, check=True)
    return json.loads(found.read_text())


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_candidates_compile_and_fit_without_a_gpu_at_hand(capability: int, compiled: list[dict]) -> None:
    mine = [kernel for kernel in compiled if kernel["capability"] == capability]

    expected = {name for name, value in vars(kernels).items() if isinstance(value, KernelInterface) and name[0] != "_"}
    if capability == 90:
        expected |= {"inner_gradient", "weight_gradient_of_tokens"}
    assert {kernel["name"] for kernel in mine} == expected
    assert {kernel["product"] for kernel in mine} == {
        "hidden", "hidden, no gate", "plain", "transposed, gathered", "transposed", "weight gradient",
        "weight gradient, gathered", None
    }  # fmt: skip
    too_large = [kernel for kernel in mine if kernel["shared"] > SHARED_MEMORY[capability]]
    assert too_large == []


def test_no_kernel_needs_more_registers_than_there_are_on_sm_90(compiled: list[dict]) -> None:
    """Spilled registers lie on the stack. Of a width that no block divides, masks take some more."""
    on_90 = [kernel for kernel in compiled if kernel["capability"] == 90 and kernel["d_model"] == 256]

    products = [kernel["product"] for kernel in on_90]
    assert [products.count(name) for name in ("hidden, no gate", "plain", "weight gradient")] == [3, 4, 3]
    assert [kernel for kernel in on_90 if kernel["stack"]] == []


class Target:
    """Stands for a GPU of one compute capability: Triton's driver, as far as a compilation asks for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


class Compilations:
    """Compile what forward and backward launch, each product with its candidates, instead of running it."""

    def __init__(self, folder: Path) -> None:
        from triton.runtime.jit import JITFunction

        self.cubin = folder / "kernel.cubin"
        self.found: dict[tuple, dict] = {}
        self.target = Target(0)
        self.now: tuple[str | None, Tiles | None] = (None, None)
        JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: self.compile(kernel, *args, **kwargs)
        launch.choose_tiles = self.try_tiles
        launch._fast = lambda x: True
        launch.speaks_gluon = lambda device: tiles.speaks_gluon(GPU)
        torch.cuda.get_device_capability = lambda device=None: divmod(self.target.capability, 10)

    def layer(self, capability: int, activation: str, d_model: int = 256, d_ff: int = 256) -> None:
        """All kernels of a layer, for one architecture."""
        import triton

        self.target, self.d_model = Target(capability), d_model
        triton.runtime.driver.set_active(self.target)
        n_tokens, n_experts = 8, 4
        selected = torch.arange(2 * n_tokens).view(n_tokens, 2) % n_experts
        x = torch.zeros(n_tokens, d_model, dtype=torch.bfloat16)
        rows = d_ff if activation == "relu" else 2 * d_ff
        problem = launch.Problem(
            torch.zeros(n_experts, rows, d_model, dtype=torch.bfloat16),
            torch.zeros(n_experts, d_model, d_ff, dtype=torch.bfloat16),
            torch.zeros(selected.shape),
            sort_assignments(selected, None, n_experts),
            activation,
        )
        y, hidden = launch.forward(x, problem, x.dtype)
        launch.backward(y, x, hidden, problem)

    def try_tiles(self, product: Product, device: torch.device, run: Callable[[Tiles], None]) -> Tiles:
        """In place of :func:`choose_tiles`."""
        tried = tiles.candidates(product, GPU)
        tried = tried if self.target.capability == ALL_CANDIDATES else tried[:1]
        for candidate in tried:
            self.now = product.kind, candidate
            run(candidate)
        self.now = None, None
        return tried[0]

    def compile(self, kernel: object, *args: object, **kwargs: object) -> None:
        """In place of a launch."""
        product, candidate = self.now
        if product is None and "BLOCK_M" in kwargs:
            return  # the launch of what was chosen
        made = kernel.run(*args, grid=(1,), warmup=True, **kwargs)
        self.found[self.target.capability, self.d_model, kernel.__name__, product, candidate] = {
            "capability": self.target.capability,
            "d_model": self.d_model,
            "name": kernel.__name__,
            "product": product,
            "tiles": str(candidate),
            "shared": made.metadata.shared,
            "stack": self.stack(made.asm["cubin"]),
        }

    def stack(self, cubin: bytes) -> int:
        """Bytes a thread."""
        import triton

        self.cubin.write_bytes(cubin)
        dump = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", self.cubin],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(dump.stdout.split("STACK:")[1].split()[0])


if __name__ == "__main__":
    result = Path(sys.argv[1])
    compilations = Compilations(result.parent)
    for capability in SHARED_MEMORY:
        for activation in ("swiglu", "relu"):
            compilations.layer(capability, activation)
    # Whose rows are whole 16 bytes and no more, and whose activation is in no kernel of .hopper.
    compilations.layer(ALL_CANDIDATES, "swiglu", 328, 200)
    result.write_text(json.dumps(list(compilations.found.values())))
