"""Which bytes does one GPU keep while a stage is trained?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mllm.models.compilation import repeated_layers
from mllm.recipe import StageSpec
from mllm.train.engine.base import choose_engine
from mllm.train.engine.groups import Group
from mllm.train.engine.optim import state_bytes
from mllm.train.engine.reduce import IN_FLIGHT_BYTES
from mllm.train.preflight.scaling import ENGINES

PREFERENCE = ("dpo", "grpo")
"""Kinds of stages that TRL's trainers run."""
_MOST_LIVE = 10**9
"""Weights that DeepSpeed keeps gathered at once, where its json says nothing."""


@dataclass(frozen=True)
class Layers:
    """The decoder's layers, which fsdp2 shares: weights of all, those of them that learn, weights of the largest one."""

    weights: int = 0
    learned: int = 0
    largest: int = 0


def layers_of(decoder: nn.Module) -> Layers:
    """The numbers of a decoder as it learns now."""
    sizes = [{p: p.numel() for p in layer.parameters()} for layer in repeated_layers(decoder)]
    learned = sum(number for one in sizes for p, number in one.items() if p.requires_grad)
    each = [sum(one.values()) for one in sizes]
    return Layers(sum(each), learned, max(each, default=0))


_LAYERS_AT_ONCE = 6
"""Layers that fsdp2 holds whole beside its share: one that computes and the buffer it came in, the next one's buffer; in the backward pass
its gradient, a copy of that on its way, and room for the next."""


def memory_of(
    stage: StageSpec,
    total: int,
    learned: int,
    activations: int,
    *,
    engine: str,
    processes: int,
    encoders: int = 0,
    accumulates: bool = True,
    layers: Layers = Layers(),
) -> dict[str, int]:
    """Bytes on one GPU by what they are for. ``update``: buffers of the optimizer step, when activations are gone. What the stage's engine
    offloads is not there (`offloaded_by`).

    Args:
        stage: what is trained.
        total: weights of the model.
        learned: of those, the ones that learn.
        activations: their bytes, with the loss's.
        engine: a shipped one, by name.
        processes: how many these are.
        encoders: weights of encoders that do not learn, of the total.
        accumulates: gradients of several micro-batches are added up.
        layers: the decoder's.

    Returns:
        Bytes by name.
    """
    size = 2 if stage.dtype == "bfloat16" else 4
    if stage.kind in PREFERENCE:
        return _preference(stage, total, learned, activations, size)
    if engine == "fsdp2" and processes > 1:
        return _by_layers(stage, total, learned, activations, size, processes, layers)
    zero_stage = ENGINES[engine]
    sharded = engine == "sharded" and processes > 1
    share = processes if zero_stage or sharded else 1
    copies = (2 if stage.optimizer.master == "low_bits" else 4) if size == 2 or zero_stage else 0
    states = learned * (state_bytes(stage.optimizer) + copies + (4 if stage.optimizer.ema is not None else 0)) // share
    # The sharded engine frees gradients while it makes them, where it need not add them up.
    gradients = size * learned // (processes if zero_stage >= 2 or (sharded and not accumulates) else 1)
    update = (4 + size) * learned // share if zero_stage else min(learned // share, 1 << 28) * 4
    buckets = 2 * size * min(learned, 200_000_000) if zero_stage else 0
    if sharded:
        buckets = min(size * learned, 2 * IN_FLIGHT_BYTES)
    choice = choose_engine(stage)
    if choice.zero_stage == zero_stage and choice.offloaded("optimizer"):
        states = gradients = update = 0  # gradients follow the state; the buckets that they leave in are counted
    kept = encoders if zero_stage == 3 and stage.frozen_encoders == "whole" else 0
    weights = size * (total - kept) // (processes if zero_stage == 3 else 1)
    if choice.zero_stage == zero_stage and choice.offloaded("param"):
        zero = (choice.config or {})["zero_optimization"]
        weights = size * min(total - kept, zero.get("stage3_max_live_parameters", _MOST_LIVE))
    return {
        "weights": weights + size * kept,
        "gradients": gradients,
        "optimizer states": states,
        "communication": buckets,
        "activations and loss": activations,
        "update": update,
    }


def _by_layers(
    stage: StageSpec, total: int, learned: int, activations: int, size: int, processes: int, layers: Layers
) -> dict[str, int]:
    spec = stage.optimizer
    own = learned - layers.learned + layers.learned // processes
    each = state_bytes(spec) + (4 if spec.ema is not None else 0)
    each += (2 if spec.master == "low_bits" else 4) if size == 2 else 0
    return {
        "weights": size * (total - layers.weights + layers.weights // processes),
        "gradients": size * own,
        "optimizer states": each * own,
        "communication": size * _LAYERS_AT_ONCE * layers.largest,
        "activations and loss": activations,
        "update": min(own, 1 << 28) * 4,
    }


def frozen_encoders(frozen: dict[str, int], groups: Iterable[Group]) -> int:
    """Weights of encoders of which nothing learns. frozen: part → weights that do not."""
    learning = {group.part for group in groups}
    return sum(number for part, number in frozen.items() if part.startswith("encoders.") and part not in learning)


def offloaded_by(stage: StageSpec, total: int, learned: int, *, processes: int) -> dict[str, int]:
    """Bytes that one process of the stage's engine keeps outside its GPU, by where they are and what for; empty for most engines.

    Args:
        stage: what is trained.
        total: weights of the model.
        learned: of those, the ones that learn.
        processes: how many share them.

    Returns:
        Bytes by name; DeepSpeed's buffers, of some gigabytes, come on top.
    """
    choice, size = choose_engine(stage), 2 if stage.dtype == "bfloat16" else 4
    places, found = {"cpu": "main memory", "nvme": "NVMe"}, {}
    if place := places.get(choice.offloaded("optimizer")):
        state = state_bytes(stage.optimizer) + 4 + 4  # float32 copies, and gradients in float32
        found[f"{place}: optimizer states and gradients"] = state * learned // processes
    if place := places.get(choice.offloaded("param")):
        found[f"{place}: weights"] = size * total // processes
    return found


def _preference(stage: StageSpec, total: int, learned: int, activations: int, size: int) -> dict[str, int]:
    """Weights that learn stay float32, without a second copy; the model that answers are held to is float32, too."""
    pairs = stage.kind == "dpo"
    return {
        "weights": 4 * learned + size * (total - learned),
        "reference": 4 * total if pairs or stage.options.get("beta") else 0,
        "gradients": 4 * learned,
        "optimizer states": state_bytes(stage.optimizer) * learned,
        "activations and loss": activations * (2 if pairs else 1),  # both answers of a pair
        "update": 0,
    }


def answers_each(stage: StageSpec) -> int:
    """How many rows of a step one sample of the data gives.

    Args:
        stage: what is trained.

    Returns:
        The answers that are drawn to it by a grpo stage, 1 in others.
    """
    return int(stage.options.get("num_generations", 8)) if stage.kind == "grpo" else 1
