"""What a training step allocates and sends, seen from below: every operator that torch dispatches passes here.

A storage is followed from the operator that makes it to the moment that nothing refers to it, in bytes as CUDA's
allocator counts them. What a storage was for is known only later, so the parts of the peak are told with hindsight: a
gradient is what a parameter's ``grad`` refers to before the optimizer's step, an activation what was made in a forward
pass and was still there in a backward pass.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Phase = Literal["forward", "backward", "optimizer"]
Part = Literal["parameters", "gradients", "optimizer", "weight copies", "activations", "temporaries"]
PARTS: tuple[Part, ...] = ("parameters", "gradients", "optimizer", "weight copies", "activations", "temporaries")
"""weight copies are casts of parameters, which autocast and the experts keep for the backward pass"""

GRANULE = 512
"""bytes that CUDA's caching allocator rounds every block up to"""

Workspace = Callable[[Any, tuple[Any, ...], Any], int]
"""bytes that an operator has in use inside beside its result, from the operator, its arguments and its result"""


@dataclass
class Allocation:
    """A storage from its first byte to its last."""

    n_bytes: int
    begin: int
    """number of the operator that made it"""
    phase: Phase
    operator: str
    shape: tuple[int, ...] = ()
    part: Part | None = None
    """where it is known for sure; else :meth:`told` tells"""
    end: int | None = None
    """number of the operator before which it was freed; None: it never was"""
    met_backward: bool = False
    """whether a backward pass went by while it was there"""

    def told(self) -> Part:
        """What it was for."""
        if self.part is not None:
            return self.part
        return "activations" if self.phase == "forward" and self.met_backward else "temporaries"


@dataclass(frozen=True)
class Collective:
    """One call that other ranks take part in."""

    name: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send, recv"""
    group: str
    """what the group was called when it was made: a dimension of the mesh"""
    ranks: int
    """size of the group"""
    n_bytes: int
    """of this rank's larger buffer: what it gathers, or what it reduces"""


@dataclass(frozen=True)
class Peak:
    """The busiest moment of a step."""

    parts: dict[Part, int]
    """bytes, by part"""
    workspace: int
    """of ``parts["temporaries"]``, what one operator had in use inside"""
    phase: Phase
    operator: str
    largest: list[Allocation]
    """the largest storages of that moment"""

    @property
    def total(self) -> int:
        """Bytes in use."""
        return sum(self.parts.values())


@dataclass
class StepTrace(TorchDispatchMode):
    """Follows storages while it is entered (above a FakeTensorMode, where there is one).

    Nothing of the tensors' contents is looked at, so it follows a real step as well as a fake one.
    """

    workspace: Workspace = field(default=lambda operator, arguments, result: 0)
    parts: dict[int, Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocations: list[Allocation] = []
        self.collectives: Counter[Collective] = Counter()
        self.operators = 0
        self._live: dict[int, Allocation] = {}
        self._in_use = 0
        self._in_optimizer = False
        self._last_backward = 0
        self._most: tuple[int, int, str, Phase, int] = (0, 0, "", "forward", 0)
        self._resize: Any = None

    # ------------------------------------------------------------------------------------------------ who is who

    def own(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Say what the storages of ``tensors`` are for, and count those that were made before."""
        for tensor in tensors:
            local = getattr(tensor, "_local_tensor", tensor)
            self._follow(local, "made before")
            allocation = self._live.get(local.untyped_storage()._cdata)
            if allocation is not None:
                allocation.part = part

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Learn from every step of ``optimizer`` what are gradients of ``model``, and what its own states."""
        self.own([*model.parameters(), *model.buffers()], "parameters")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._own_gradient)  # type: ignore[no-untyped-call]

        def before(*_: object) -> None:
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.own([parameter.grad for parameter in held if parameter.grad is not None], "gradients")
            self._in_optimizer = True

        def after(*_: object) -> None:
            states = [value for state in optimizer.state.values() for value in state.values()]
            self.own([value for value in states if isinstance(value, Tensor)], "optimizer")
            self._in_optimizer = False

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def _own_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.own([parameter.grad], "gradients")

    def forget(self) -> None:
        """Begin the search for the peak anew, with what is in use now: the first step made the optimizer's states."""
        self.allocations = list(self._live.values())
        self.collectives.clear()
        self._most = (self._in_use, self.operators, "", "forward", 0)

    # ------------------------------------------------------------------------------------------------ what is seen

    @property
    def phase(self) -> Phase:
        """What the step is doing: autograd has a node in hand in a backward pass, in what it computes again too."""
        if self._in_optimizer:
            return "optimizer"
        return "forward" if torch._C._current_autograd_node() is None else "backward"

    @property
    def in_use(self) -> int:
        """Bytes in use now."""
        return self._in_use

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, then look at what it returned."""
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        name, phase = str(func), self.phase
        if phase == "backward":
            self._last_backward = self.operators
        collective = collective_of(func, args, kwargs or {}, result)
        if collective is not None:
            self.collectives[collective] += 1
        copied = self._copied_parameter(func, args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf, name, "weight copies" if copied else None)
        extra = self.workspace(func, args, result)
        if self._in_use + extra > self._most[0]:
            self._most = (self._in_use + extra, self.operators, name, phase, extra)
        return result

    def _copied_parameter(self, func: Any, args: tuple[Any, ...]) -> bool:
        if func is not torch.ops.aten._to_copy.default:
            return False
        source = self._live.get(args[0].untyped_storage()._cdata)
        return source is not None and source.part == "parameters"

    def _follow(self, tensor: Tensor, operator: str, part: Part | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._begin(key, storage.nbytes(), operator, tuple(tensor.shape), part)
        weakref.finalize(storage, self._finish, key)

    def _begin(self, key: int, n_bytes: int, operator: str, shape: tuple[int, ...], part: Part | None) -> None:
        rounded = -(-n_bytes // GRANULE) * GRANULE
        allocation = Allocation(rounded, self.operators, self.phase, operator, shape, part)
        self.allocations.append(allocation)
        self._live[key] = allocation
        self._in_use += rounded

    def _finish(self, key: int) -> None:
        allocation = self._live.pop(key, None)
        if allocation is not None:
            allocation.end, allocation.met_backward = self.operators, self._last_backward > allocation.begin
            self._in_use -= allocation.n_bytes

    def __enter__(self) -> "StepTrace":
        """Follow what is dispatched from here on, and the storages that FSDP empties and fills by ``resize_``."""
        resize = torch.UntypedStorage.resize_
        self._resize = resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            key = storage._cdata
            before = self._live.get(key)
            result = resize(storage, size)
            if before is not None and before.n_bytes != -(-size // GRANULE) * GRANULE:
                self._finish(key)
                self._begin(key, size, "resize", before.shape, before.part)
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop following."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    # ------------------------------------------------------------------------------------------------ what was seen

    def peak(self, largest: int = 12) -> Peak:
        """The busiest moment since :meth:`forget`."""
        _, moment, operator, phase, extra = self._most
        there = [
            allocation
            for allocation in self.allocations
            if allocation.begin <= moment and (allocation.end is None or allocation.end >= moment)
        ]
        parts = dict.fromkeys(PARTS, 0)
        for allocation in there:
            parts[allocation.told()] += allocation.n_bytes
        parts["temporaries"] += extra
        return Peak(parts, extra, phase, operator, sorted(there, key=lambda allocation: -allocation.n_bytes)[:largest])


_NAMES = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "recv",
    "barrier": "barrier",
}


def collective_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Collective | None:
    """The collective that an operator is, or None."""
    if func.namespace not in ("c10d", "_c10d_functional"):
        return None
    own = func.name().split("::")[1].removeprefix("_")
    name = next((ours for theirs, ours in _NAMES.items() if own.startswith(theirs)), None)
    if name is None:
        return None
    from torch._C._distributed_c10d import ProcessGroup, _resolve_process_group

    leaves = [*tree_leaves(args), *tree_leaves(kwargs)]
    group = None
    for leaf in leaves:
        if isinstance(leaf, str):
            try:
                group = _resolve_process_group(leaf)  # type: ignore[arg-type]
            except (RuntimeError, ValueError, LookupError):
                continue
        elif isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            group = ProcessGroup.unbox(leaf)
    tensors = [leaf for leaf in [*leaves, *tree_leaves(result)] if isinstance(leaf, Tensor)]
    n_bytes = max((tensor.numel() * tensor.itemsize for tensor in tensors), default=0)
    return Collective(
        name,
        group.group_desc.removeprefix("mesh_") if group is not None else "",
        group.size() if group is not None else 0,
        n_bytes,
    )
