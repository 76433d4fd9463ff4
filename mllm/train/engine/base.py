"""How do gradients of several processes become one update? Plain torch here (with shared state in `mllm.train.engine.sharded`), DeepSpeed's
ZeRO in `mllm.train.engine.zero`.

Every engine is given losses that are already divided by the supervised tokens of the whole optimizer step, over
micro-batches and processes; gradients are summed, never averaged, so a process with few tokens weighs little. Every
learning parameter has a gradient at every step, a zero one where nothing was used: that is what ZeRO-1/2 need, and
`none` does the same, so engines agree. Groups are formed by parameter names; ZeRO-3's parameters have one dimension
only.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm import assets
from mllm.damage import damage_of
from mllm.errors import ConfigError, did_you_mean
from mllm.recipe import StageSpec
from mllm.train.engine.compact_adamw import CompactAdamW
from mllm.train.engine.groups import Group
from mllm.train.engine.optim import (
    OF_BF16,
    build_optimizer,
    check_engine,
    check_pieces,
    swap_average,
    take_average,
    update_average,
)
from mllm.train.engine.reduce import OverlappedScatter, OverlappedSum

SHIPPED = ("none", "sharded", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class EngineChoice:
    """What ``engine:`` of a stage means. zero_stage: DeepSpeed's, 0 without it, also where weights and gradients are whole and the
    optimizer's state alone is shared; config: DeepSpeed's, without what the stage fixes."""

    name: str
    zero_stage: int
    config: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """The shipped engine that shares as this one does: for a DeepSpeed config that of its stage."""
        return f"zero{self.zero_stage}" if self.zero_stage else self.name

    @property
    def shares_weights(self) -> bool:
        """Whether a process holds no more than its share of the language model's weights: they are gathered for every pass, which all
        processes must then make equally often."""
        return self.zero_stage == 3 or self.name == "fsdp2"

    def offloaded(self, what: Literal["optimizer", "param"]) -> str:
        """Where the optimizer's state, or the weights, lie between their uses: ``cpu``, ``nvme``, or "" for the GPU."""
        settings = ((self.config or {}).get("zero_optimization") or {}).get(f"offload_{what}") or {}
        device = settings.get("device", "none")
        return "" if device == "none" else device


def choose_engine(stage: StageSpec) -> EngineChoice:
    """Resolve ``stage.engine``: a name, a DeepSpeed json file, or its content. Raises `ConfigError`."""
    where, engine = f"stages.{stage.name}.engine", stage.engine_here
    if engine in ("none", "sharded", "fsdp2"):
        if engine != "none":
            check_pieces(stage.optimizer, stage.name, engine)
        return EngineChoice(str(engine), 0)
    if isinstance(engine, dict):
        config, name = dict(engine), "deepspeed"
    elif engine in SHIPPED:
        config, name = json.loads(assets.shipped_text(f"recipes/deepspeed/{engine}.json")), engine
    elif engine.endswith(".json"):
        config, name = _read_json(engine, where), engine
    else:
        raise ConfigError(
            f"{where}: unknown engine {engine!r}{did_you_mean(engine, ('auto', *SHIPPED))}. "
            f"Known: auto, {', '.join(SHIPPED)}, or a DeepSpeed json file"
        )
    zero_stage = config.get("zero_optimization", {}).get("stage", 0)
    if zero_stage not in (1, 2, 3):
        raise ConfigError(
            f"{where}: zero_optimization.stage is {zero_stage!r}; 1, 2 or 3 is expected (engine: none is without ZeRO)"
        )
    for key, cure in (("optimizer", "optimizer"), ("scheduler", "schedule")):
        if key in config:
            raise ConfigError(
                f"{where}: the json has {key!r}; that belongs in the stage's own {cure}: key, delete it there"
            )
    if config.get("fp16", {}).get("enabled") is True:
        raise ConfigError(f"{where}: the json enables fp16; this toolkit trains in bf16 or fp32 (stage key dtype)")
    if config.get("compile", {}).get("deepcompile"):
        raise ConfigError(
            f"{where}: the json enables DeepCompile, which traces a whole forward pass; ours changes with a batch's pictures, and "
            "it would not be used. Delete it there; the stage's own compile: true compiles each layer (none, sharded, zero1, zero2, fsdp2)"
        )
    choice = EngineChoice(name, zero_stage, config)
    _check_offload(choice, where)
    check_engine(stage.optimizer, stage.name, zero_stage)
    return choice


def _check_offload(choice: EngineChoice, where: str) -> None:
    for what in ("optimizer", "param"):
        device = choice.offloaded(what)
        if device not in ("", "cpu", "nvme"):
            raise ConfigError(f"{where}: offload_{what}.device is {device!r}; cpu, nvme or none is expected")
        if device != "nvme":
            continue
        if choice.zero_stage != 3:
            raise ConfigError(
                f"{where}: offload_{what}.device is nvme, and zero_optimization.stage is {choice.zero_stage}: NVMe goes with stage 3; use "
                "stage: 3, or device: cpu"
            )
        if not (choice.config or {})["zero_optimization"][f"offload_{what}"].get("nvme_path"):
            raise ConfigError(f"{where}: offload_{what}.nvme_path is missing; a folder on the NVMe disk is expected")


def _read_json(path: str, where: str) -> dict[str, Any]:
    for candidate in (Path(path).expanduser(), *(root / path for root in assets.roots())):
        if candidate.is_file():
            try:
                config = json.loads(candidate.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(
                    f"{where}: {damage_of(candidate) or f'{candidate} is not valid JSON: {error}'}"
                ) from None
            if not isinstance(config, dict):
                raise ConfigError(f"{where}: {candidate} does not hold a DeepSpeed config")
            return config
    raise ConfigError(f"{where}: no such file {path}")


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements that this process owns: elements ``start`` to ``start + length`` of the
    flattened parameter are elements ``offset`` … of ``flat`` (its fp32 weights) and of every tensor in ``state``."""

    name: str
    start: int
    length: int
    flat: Tensor
    offset: int
    state: dict[str, Any]
    like: Tensor
    """What the optimizer updates: state tensors have its shape."""


class Engine:
    """Replicas: forward is the model's own; gradients of several processes are summed while backward runs."""

    zero_stage = 0
    shares_weights = False
    """See `EngineChoice.shares_weights`."""
    reduction: OverlappedSum | OverlappedScatter | None = None
    starts: Mapping[str, int] = {}
    """Where in a parameter what the optimizer has of it begins, by name; not there: at its first element."""
    finished = False
    """The last step is done, and the averaged weights are the model's."""

    def __init__(self, model: nn.Module, groups: list[Group], stage: StageSpec, device: torch.device):
        self.model, self.device, self.stage = model, device, stage
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.learning = [p for p in model.parameters() if p.requires_grad]
        self.norms: dict[str, float] = {}
        """Gradient norm by part of the last step, where the engine knows it."""
        self._parts: list[str] | None = None
        self._start(groups)

    def _start(self, groups: list[Group]) -> None:
        if self.world_size > 1:
            for parameter in self.learning:
                dist.broadcast(parameter.data, src=0)
        self.reduction = OverlappedSum(self.learning) if self.world_size > 1 else None
        self.optimizer: Any = build_optimizer(
            self.model, groups, self.stage.optimizer, master=self.learning[0].dtype != torch.float32
        )

    def __call__(self, **batch: Any) -> Any:
        return self.model(**batch)

    def set_rate_factor(self, factor: float) -> None:
        """Set every group's rate to its peak times ``factor``."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_rate"] * factor

    def rates(self) -> dict[str, float]:
        """Group name → its present rate."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; last: the optimizer step follows."""
        if last and self.reduction is not None:
            self.reduction.start()
        loss.backward()

    @torch.no_grad()
    def step(self) -> float:
        """Sum gradients over processes, clip, update. Returns the norm before clipping; when it is not finite, nothing
        is updated."""
        if self.reduction is not None:
            self.reduction.finish()
        for parameter in self.learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norms, scale = self._norms_and_scale()
        *each, value = norms.tolist()  # the one place where the update waits for the backward pass
        if math.isfinite(value):
            if isinstance(self.optimizer, OF_BF16):
                self.optimizer.step(scale)
            else:
                if self.stage.optimizer.max_grad_norm is not None:
                    torch._foreach_mul_([p.grad for p in self.learning if p.grad is not None], scale)  # type: ignore[attr-defined]
                self.optimizer.step()
            if self.stage.optimizer.ema is not None:
                update_average(self.optimizer, self.stage.optimizer.ema)
        for parameter in self.learning:
            parameter.grad = None
        self._part_norms(each)  # the GPU is busy with the update meanwhile
        return value

    def _norms_and_scale(self) -> tuple[Tensor, Tensor]:
        """Norms of each learning parameter's gradient and, last, of all; what clipping multiplies gradients with."""
        gradients = [p.grad for p in self.learning if p.grad is not None]
        return self._with_scale(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))  # type: ignore[attr-defined]

    def _with_scale(self, each: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(each)
        limit = self.stage.optimizer.max_grad_norm
        scale = torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
        return torch.cat([each, norm.view(1)]), scale

    def _part_norms(self, each: list[float]) -> None:
        if not hasattr(self.model, "part_of"):
            return
        if self._parts is None:
            self._parts = [self.model.part_of(self.names[id(p)]) for p in self.learning]  # type: ignore[operator]
        squares: dict[str, float] = {}
        for part, value in zip(self._parts, each):
            squares[part] = squares.get(part, 0.0) + value * value
        self.norms = {part: math.sqrt(value) for part, value in squares.items()}

    # State ---------------------------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        """What this process owns of the learning parameters' fp32 weights and optimizer state. Replicas share the
        work."""
        index = 0
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                if index % self.world_size == self.rank:
                    yield self._whole(name, parameter)
                index += 1

    def _whole(self, name: str, parameter: Tensor) -> Fragment:
        optimizer = self.optimizer
        compact = isinstance(optimizer, CompactAdamW)
        weights = optimizer.weights(parameter) if compact else parameter.detach()
        start = self.starts.get(name, 0)
        return Fragment(name, start, parameter.numel(), weights.reshape(-1), 0, optimizer.state[parameter], parameter)

    def load_fragments(self, read: Callable[[Fragment], None]) -> None:
        """Fill what this process holds: ``read`` fills one fragment in place."""
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                fragment = self._whole(name, parameter)
                if isinstance(self.optimizer, CompactAdamW):
                    self.optimizer.state_of(parameter)
                    read(fragment)
                    self.optimizer.put(parameter, fragment.flat)
                else:
                    read(fragment)
                    if not parameter.is_contiguous():  # as a convolution's with channels last: what was read is a copy
                        parameter.detach().copy_(fragment.flat.view_as(parameter))
        if isinstance(self.optimizer, OF_BF16):
            self.optimizer.restore_parameters()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """For the block, averaged weights stand in the model where they are kept and the stage is not finished."""
        swapped = self.stage.optimizer.ema is not None and not self.finished
        if swapped:
            swap_average(self.optimizer)
        try:
            yield
        finally:
            if swapped:
                swap_average(self.optimizer)

    def finish(self) -> None:
        """The last step is done: averaged weights, where they are kept, take the place of the last ones."""
        if self.stage.optimizer.ema is not None:
            take_average(self.optimizer)
        self.finished = True

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's state in copies on rank 0's CPU, an empty dict elsewhere; weights that are one tensor under two names have
        one copy. All processes must call it."""
        if self.rank != 0:
            return {}
        state = self.model.state_dict(keep_vars=True)
        copies = {id(tensor): tensor for tensor in state.values()}
        copies = {number: host_copy(tensor) for number, tensor in copies.items()}
        return {name: copies[id(tensor)] for name, tensor in state.items()}

    def close(self) -> None:
        """Free what the engine holds."""
        if self.reduction is not None:
            self.reduction.close()
            self.reduction = None
        self.optimizer = None
        free_memory()


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, also of what is there: a later step changes that."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
