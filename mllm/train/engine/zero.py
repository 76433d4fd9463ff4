"""How do several processes share one model's gradients and optimizer state? DeepSpeed's ZeRO, imported here only.

Micro-batch sizes, clipping and precision are always written out for DeepSpeed, whose own defaults (clipping at 1.0) are not
the stage's.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mllm import distributed
from mllm.errors import ConfigError, UnavailableError
from mllm.heads.base import heads_of
from mllm.install import install_hint
from mllm.models.compilation import repeated_layers
from mllm.models.making import num_elements
from mllm.noise import hush
from mllm.recipe import StageSpec
from mllm.train.engine import zero3
from mllm.train.engine.base import Engine, EngineChoice, Fragment
from mllm.train.engine.deepspeed_private import GradientOrder, KeptWhole, check_private, leave_shared_memory_op, slices
from mllm.train.engine.groups import Group
from mllm.train.engine.optim import build_optimizer
from mllm.train.prepare import BATCH_NORMS


class ZeroEngine(Engine):
    """DeepSpeed ZeRO with our own AdamW, explicit clipping and explicit batch sizes."""

    def __init__(
        self, model: nn.Module, groups: list[Group], stage: StageSpec, device: torch.device, choice: EngineChoice
    ):
        self.choice, self.zero_stage, self.shares_weights = choice, choice.zero_stage, choice.shares_weights
        super().__init__(model, groups, stage, device)

    def _start(self, groups: list[Group]) -> None:
        self._lent = ExitStack()
        self._lent.enter_context(lent_local_rank())  # DeepSpeed asks for it while it trains, process group or not
        try:
            self._start_deepspeed(groups)
        except BaseException:
            self._lent.close()
            raise

    def _start_deepspeed(self, groups: list[Group]) -> None:
        deepspeed = import_deepspeed()
        _check_nvme(self.choice, self.stage.name)
        optimizer = build_optimizer(self.model, groups, self.stage.optimizer)
        visual: list[nn.Module] = []
        kept = KeptWhole(self.model if self.zero_stage == 3 and self.stage.frozen_encoders == "whole" else None)
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
        with kept.hidden():
            self.engine: Any = deepspeed.initialize(
                model=self.model,
                optimizer=optimizer,
                config=deepspeed_config(self.stage, self.choice, self.device, self.learning),
                dist_init_required=False,
            )[0]
        kept.stay_with(self.engine.optimizer, self.device)
        zero3.close_after(visual)
        for name, value in buffers.items():
            module_name, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(module_name)
            module._buffers[leaf] = value.to(self.device)
        self.optimizer = optimizer
        self.zero: Any = self.engine.optimizer
        check_private(self.zero, self.zero_stage)
        if self.zero_stage < 3:
            GradientOrder(self.zero, self.learning)

    def _visual_modules(self) -> list[nn.Module]:
        """Every module outside the language model: those hand our dataclasses to each other."""
        decoder = getattr(self.model, "get_decoder", lambda: None)()
        inside = {id(m) for m in decoder.modules()} if decoder is not None else set()
        return [m for m in self.model.modules() if id(m) not in inside and m is not self.model]

    def _mark_leaves(self, deepspeed: Any) -> None:
        """Each decoder layer, and each head, is gathered and let go whole: hooks run once a layer, not once a module, and its weights
        travel together. Of a head, which may do other things on each process, the gradients are then summed together too. Not encoder
        blocks, which may run on some processes only."""
        decoder = getattr(self.model, "get_decoder", lambda: None)()
        leaves = {type(layer) for layer in repeated_layers(decoder)} if decoder is not None else set()
        leaves |= {type(head) for head in heads_of(self.model).values()}
        if leaves:
            deepspeed.utils.set_z3_leaf_modules(self.model, list(leaves))

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

    def fragments(self, *, changed: bool = False) -> Iterator[Fragment]:
        """See `Engine.fragments`. changed: what is done to them is kept where the optimizer's state lies on disk."""
        for part in slices(self.zero, self.zero_stage, self.rank, changed=changed):
            name, state = self.names[id(part.parameter)], self.optimizer.state[part.flat]
            yield Fragment(name, part.start, part.length, part.flat.detach(), part.offset, state, part.flat)

    def load_fragments(self, read: Callable[[Fragment], None]) -> None:
        for fragment in self.fragments(changed=True):
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
        self._lent.close()
        super().close()


def deepspeed_config(
    stage: StageSpec, choice: EngineChoice, device: torch.device, learning: Sequence[nn.Parameter] = ()
) -> dict[str, Any]:
    """What DeepSpeed is told: the engine's own config with everything that the stage fixes. learning: what learns, once it is known."""
    config = json.loads(json.dumps(choice.config))
    zero = config["zero_optimization"]
    if learning:
        learned = sum(num_elements(p) for p in learning)
        for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
            if isinstance(zero.get(key), int):
                # DeepSpeed allocates whole buckets, on a small model too; it wants even sizes.
                zero[key] = min(zero[key], -(-max(learned, 1) // 1024) * 1024)
    if device.type == "cpu":
        zero["overlap_comm"] = False
        if isinstance(zero.get("offload_optimizer"), dict):
            zero["offload_optimizer"]["pin_memory"] = False
    config.update(
        train_micro_batch_size_per_gpu=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        train_batch_size=stage.batch_size * stage.gradient_accumulation * distributed.world_size(),
        gradient_clipping=stage.optimizer.max_grad_norm or 0.0,
        bf16={**config.get("bf16", {}), "enabled": stage.dtype == "bfloat16"},
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    config.setdefault("steps_per_print", 10**9)
    config.setdefault("wall_clock_breakdown", False)
    return config


def _check_nvme(choice: EngineChoice, stage: str) -> None:
    """Raises `UnavailableError` where something is to go to NVMe and DeepSpeed cannot write there: it would say so after minutes of
    compiling, in many lines."""
    key = next((f"offload_{what}" for what in ("optimizer", "param") if choice.offloaded(what) == "nvme"), None)
    if key is None:
        return
    folder = (choice.config or {})["zero_optimization"][key]["nvme_path"]
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"stages.{stage}.engine: {key}.nvme_path is {folder}; a folder of this machine that can be written to is expected"
        )
    builders: Any = importlib.import_module("deepspeed.ops.op_builder")
    if not builders.AsyncIOBuilder().is_compatible(verbose=False):
        raise UnavailableError(
            f"stages.{stage}.engine: {key}.device nvme needs the library libaio and its headers, which this machine lacks: "
            "apt install libaio-dev, or use device: cpu"
        )


@contextmanager
def lent_local_rank() -> Iterator[None]:
    """``LOCAL_RANK`` is there inside. One left behind makes accelerate (and `transformers.Trainer`) wait for other processes."""
    lent = "LOCAL_RANK" not in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        if lent:
            os.environ.pop("LOCAL_RANK", None)


def import_deepspeed() -> Any:
    """DeepSpeed, told not to compile anything. Raises `UnavailableError` when it is not installed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    try:
        import deepspeed
        import deepspeed.comm
        import deepspeed.ops
    except ImportError:
        raise UnavailableError(
            f"engines zero1, zero2, zero3 need DeepSpeed: {install_hint('train')}, or use engine: none, sharded or fsdp2"
        ) from None
    leave_shared_memory_op(deepspeed)
    # DeepSpeed calls collectives by names that torch is giving up; its users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    hush()
    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
        )
    distributed.end_group_with(deepspeed.comm.destroy_process_group)
    return deepspeed
