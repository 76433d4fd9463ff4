"""How do gradients of several processes become one update? Plain torch, or DeepSpeed's ZeRO (imported here only).

Every engine is given losses that are already divided by the supervised tokens of the whole optimizer step, over
micro-batches and processes; gradients are summed, never averaged, so a process with few tokens weighs little. Every
learning parameter has a gradient at every step, a zero one where nothing was used: that is what ZeRO-1/2 need, and
`none` does the same, so engines agree. Groups are formed by parameter names; ZeRO-3's parameters have one dimension
only.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mllm import assets
from mllm.errors import ConfigError, UnavailableError, did_you_mean
from mllm.recipe import StageSpec
from mllm.train import zero3
from mllm.train.groups import Group
from mllm.train.optim import MasterWeights, build_optimizer, check_engine, take_average, update_average
from mllm.train.prepare import BATCH_NORMS

SHIPPED = ("none", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class EngineChoice:
    """What ``engine:`` of a stage means. zero_stage: 0 without DeepSpeed; config: DeepSpeed's, without what the stage
    fixes."""

    name: str
    zero_stage: int
    config: dict[str, Any] | None = None


def choose_engine(stage: StageSpec) -> EngineChoice:
    """Resolve ``stage.engine``: a name, a DeepSpeed json file, or its content. Raises `ConfigError`."""
    where = f"stages.{stage.name}.engine"
    if stage.engine == "none":
        return EngineChoice("none", 0)
    if isinstance(stage.engine, dict):
        config, name = dict(stage.engine), "deepspeed"
    elif stage.engine in SHIPPED:
        config, name = json.loads(assets.shipped_text(f"recipes/deepspeed/{stage.engine}.json")), stage.engine
    elif stage.engine.endswith(".json"):
        config, name = _read_json(stage.engine, where), stage.engine
    else:
        raise ConfigError(
            f"{where}: unknown engine {stage.engine!r}{did_you_mean(stage.engine, SHIPPED)}. "
            f"Known: {', '.join(SHIPPED)}, or a DeepSpeed json file"
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
        raise ConfigError(f"{where}: the json enables fp16; this toolkit trains in bf16 or fp32 (stage key precision)")
    check_engine(stage.optimizer, stage.name, zero_stage)
    return EngineChoice(name, zero_stage, config)


def _read_json(path: str, where: str) -> dict[str, Any]:
    for candidate in (Path(path).expanduser(), *(root / path for root in assets.roots())):
        if candidate.is_file():
            try:
                config = json.loads(candidate.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{where}: {candidate} is not valid JSON: {error}") from None
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
    """One process: forward is the model's own; gradients of several processes are summed before the update."""

    zero_stage = 0

    def __init__(self, model: nn.Module, groups: list[Group], stage: StageSpec, device: torch.device):
        self.model, self.device, self.stage = model, device, stage
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.learning = [p for p in model.parameters() if p.requires_grad]
        self.norms: dict[str, float] = {}
        """Gradient norm by part of the last step, where the engine knows it."""
        self._start(groups)

    def _start(self, groups: list[Group]) -> None:
        if self.world_size > 1:
            for parameter in self.learning:
                dist.broadcast(parameter.data, src=0)
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
        loss.backward()

    @torch.no_grad()
    def step(self) -> float:
        """Sum gradients over processes, clip, update. Returns the norm before clipping; when it is not finite, nothing
        is updated."""
        for parameter in self.learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world_size > 1:
            self._sum_gradients()
        norm, scale = self._norm_and_scale()
        value = float(norm)
        if math.isfinite(value):
            if isinstance(self.optimizer, MasterWeights):
                self.optimizer.step(scale)
            else:
                if self.stage.optimizer.max_grad_norm is not None:
                    for parameter in self.learning:
                        if parameter.grad is not None:
                            parameter.grad.mul_(scale)
                self.optimizer.step()
            if self.stage.optimizer.ema is not None:
                update_average(self.optimizer, self.stage.optimizer.ema)
        for parameter in self.learning:
            parameter.grad = None
        return value

    def _norm_and_scale(self) -> tuple[Tensor, Tensor]:
        gradients = [p.grad for p in self.learning if p.grad is not None]
        each = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
        norm = torch.linalg.vector_norm(each)
        limit = self.stage.optimizer.max_grad_norm
        scale = torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
        self._part_norms(each)
        return norm, scale

    def _part_norms(self, each: Tensor) -> None:
        if not hasattr(self.model, "part_of"):
            return
        squares: dict[str, float] = {}
        for parameter, value in zip(self.learning, each.tolist()):
            part = self.model.part_of(self.names[id(parameter)])  # type: ignore[operator]
            squares[part] = squares.get(part, 0.0) + value * value
        self.norms = {part: math.sqrt(value) for part, value in squares.items()}

    def _sum_gradients(self, bucket_size: int = 1 << 25) -> None:
        """All-reduce in fp32, a few large buckets instead of one message a parameter."""
        bucket: list[Tensor] = []
        size = 0
        gradients = [p.grad for p in self.learning if p.grad is not None]
        for index, gradient in enumerate(gradients):
            bucket.append(gradient)
            size += gradient.numel()
            if size >= bucket_size or index == len(gradients) - 1:
                flat = torch.cat([g.flatten().float() for g in bucket])
                dist.all_reduce(flat)
                for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                    gradient.copy_(part.view_as(gradient))
                bucket, size = [], 0

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
        return Fragment(
            name, 0, parameter.numel(), parameter.detach().view(-1), 0, self.optimizer.state[parameter], parameter
        )

    def load_fragments(self, read: Callable[[Fragment], None]) -> None:
        """Fill what this process holds: ``read`` fills one fragment in place."""
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"]):
                read(self._whole(name, parameter))
        if isinstance(self.optimizer, MasterWeights):
            self.optimizer.restore_parameters()

    def finish(self) -> None:
        """The last step is done: averaged weights, where they are kept, take the place of the last ones."""
        if self.stage.optimizer.ema is not None:
            take_average(self.optimizer)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's state on rank 0's CPU, an empty dict elsewhere. All processes must call it."""
        if self.rank != 0:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}

    def close(self) -> None:
        """Free what the engine holds."""
        self.optimizer = None
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class ZeroEngine(Engine):
    """DeepSpeed ZeRO with our own AdamW, explicit clipping and explicit batch sizes."""

    def __init__(
        self, model: nn.Module, groups: list[Group], stage: StageSpec, device: torch.device, choice: EngineChoice
    ):
        self.choice, self.zero_stage = choice, choice.zero_stage
        super().__init__(model, groups, stage, device)

    def _start(self, groups: list[Group]) -> None:
        self._lent_local_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it while it trains, process group or not
        try:
            self._start_deepspeed(groups)
        except BaseException:
            self._take_back_local_rank()
            raise

    def _take_back_local_rank(self) -> None:
        """A ``LOCAL_RANK`` left behind makes accelerate (and `transformers.Trainer`) wait for other processes."""
        if self._lent_local_rank:
            os.environ.pop("LOCAL_RANK", None)
            self._lent_local_rank = False

    def _start_deepspeed(self, groups: list[Group]) -> None:
        deepspeed = import_deepspeed()
        optimizer = build_optimizer(self.model, groups, self.stage.optimizer)
        visual: list[nn.Module] = []
        if self.zero_stage == 3:
            self._mark_leaves(deepspeed)
            visual = self._visual_modules()
            zero3.open_before(visual)
        # DeepSpeed casts buffers too, and rotary tables in bf16 place distant tokens wrongly: put the exact ones back.
        norms = {id(b) for m in self.model.modules() if isinstance(m, BATCH_NORMS) for b in m.buffers()}
        buffers = {
            name: b.detach().clone()
            for name, b in self.model.named_buffers()
            if b.is_floating_point() and id(b) not in norms
        }
        self.engine: Any = deepspeed.initialize(
            model=self.model,
            optimizer=optimizer,
            config=self._config(),
            dist_init_required=False,
        )[0]
        zero3.close_after(visual)
        for name, value in buffers.items():
            module_name, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(module_name)
            module._buffers[leaf] = value.to(self.device)
        self.optimizer = optimizer
        self.zero: Any = self.engine.optimizer

    def _visual_modules(self) -> list[nn.Module]:
        """Every module outside the language model: those hand our dataclasses to each other."""
        decoder = getattr(self.model, "get_decoder", lambda: None)()
        inside = {id(m) for m in decoder.modules()} if decoder is not None else set()
        return [m for m in self.model.modules() if id(m) not in inside and m is not self.model]

    def _mark_leaves(self, deepspeed: Any) -> None:
        """Modules whose submodules run on some processes only are gathered whole (attribute ``gathers_whole``)."""
        leaves = {type(m) for m in self.model.modules() if getattr(m, "gathers_whole", False)}
        if leaves:
            deepspeed.utils.set_z3_leaf_modules(self.model, list(leaves))

    def _config(self) -> dict[str, Any]:
        stage, config = self.stage, json.loads(json.dumps(self.choice.config))
        learned = sum(p.numel() for p in self.learning)
        zero = config["zero_optimization"]
        for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
            if isinstance(zero.get(key), int):
                zero[key] = min(
                    zero[key], max(learned, 1 << 10)
                )  # DeepSpeed allocates whole buckets, on a small model too
        if self.device.type == "cpu":
            zero["overlap_comm"] = False
            if isinstance(zero.get("offload_optimizer"), dict):
                zero["offload_optimizer"]["pin_memory"] = False
        config.update(
            train_micro_batch_size_per_gpu=stage.batch_size,
            gradient_accumulation_steps=stage.gradient_accumulation,
            train_batch_size=stage.batch_size * stage.gradient_accumulation * self.world_size,
            gradient_clipping=stage.optimizer.max_grad_norm or 0.0,
            bf16={**config.get("bf16", {}), "enabled": stage.precision == "bf16"},
            zero_allow_untested_optimizer=True,
            zero_force_ds_cpu_optimizer=False,
        )
        config.setdefault("steps_per_print", 10**9)
        config.setdefault("wall_clock_breakdown", False)
        return config

    def __call__(self, **batch: Any) -> Any:
        return self.engine(**batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # DeepSpeed averages over processes: undo it. Its own division by the accumulation steps is off, and so is its
        # count of
        # them, because a stage's last step may have fewer.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> float:
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else math.nan

    # State ---------------------------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        return self._zero3_fragments() if self.zero_stage == 3 else self._zero12_fragments()

    def _zero12_fragments(self) -> Iterator[Fragment]:
        """ZeRO-1/2 lay a group's parameters end to end and give each process one equal slice of that."""
        for index, parameters in enumerate(self.zero.round_robin_bit16_groups):
            flat = self.zero.single_partition_of_fp32_groups[index]
            low = self.rank * int(self.zero.partition_size[index])
            high = low + int(self.zero.partition_size[index])
            for parameter, offset in zip(parameters, self.zero.round_robin_bit16_offsets[index]):
                begin, end = max(offset, low), min(offset + parameter.numel(), high)
                if begin < end:
                    name, state = self.names[id(parameter)], self.optimizer.state[flat]
                    yield Fragment(name, begin - offset, end - begin, flat.detach(), begin - low, state, flat)

    def _zero3_fragments(self) -> Iterator[Fragment]:
        """ZeRO-3 gives each process one equal slice of every parameter, and lays those end to end."""
        for parameters, flat in zip(self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat):
            offset = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start = self.rank * size
                length = min(size, parameter.ds_numel - start)
                if length > 0:
                    name, state = self.names[id(parameter)], self.optimizer.state[flat]
                    yield Fragment(name, start, length, flat.detach(), offset, state, flat)
                offset += size

    def load_fragments(self, read: Callable[[Fragment], None]) -> None:
        for fragment in self.fragments():
            read(fragment)
        # The low-precision copies were loaded into the model before the engine was built; in fp32 they are the same
        # numbers.

    def state_dict(self) -> dict[str, Tensor]:
        if self.zero_stage != 3:
            return super().state_dict()
        import deepspeed

        state: dict[str, Tensor] = {}
        seen: dict[int, Tensor] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.rank == 0:
                    if id(parameter) not in seen:
                        seen[id(parameter)] = parameter.detach().cpu().clone()
                    state[name] = seen[id(parameter)]
        if self.rank == 0:
            persistent = set(self.model.state_dict())
            for name, buffer in self.model.named_buffers():
                if name in persistent:
                    state[name] = buffer.detach().cpu().clone()
        return state

    def close(self) -> None:
        if self.engine is not None:
            self.engine.destroy()
        self.engine = self.zero = None
        self._take_back_local_rank()
        super().close()


def import_deepspeed() -> Any:
    """DeepSpeed, told not to compile anything. Raises `UnavailableError` when it is not installed.

    On a CPU it would build its shared-memory communication op at the first start, minutes of it; gloo does without.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    try:
        import deepspeed
        import deepspeed.comm
        import deepspeed.ops
    except ImportError:
        raise UnavailableError(
            "engines zero1, zero2, zero3 need DeepSpeed: pip install 'mllm[train]', or use engine: none"
        ) from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that torch is giving up; its users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
        )
    return deepspeed


def build_engine(model: nn.Module, groups: list[Group], stage: StageSpec, device: torch.device) -> Engine:
    """The engine a stage asks for. The model is on ``device`` and in the stage's precision already."""
    choice = choose_engine(stage)
    if choice.zero_stage == 0:
        return Engine(model, groups, stage, device)
    return ZeroEngine(model, groups, stage, device, choice)
