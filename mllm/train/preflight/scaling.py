"""How fast would a stage train on GPUs that are not here?

A model of three terms, each with its constants below, from one and two H200s (``benchmarks/results/train_scaling_h200.txt``,
``train_real_h200.txt``, ``train_step_h200.txt``); four GPUs of one host check it:

step = operations / measured rate (× 1.23 not compiled, × 4/3 where layers are computed again) + the optimizer's update of what a
GPU owns + the part of communication that the backward pass does not hide.

Communication is counted as rings do it: an all-reduce of S bytes over n GPUs moves 2 S (n - 1) / n through each, a gather or a scatter
half of that, at the rate of the slowest place of the ring. That is NVLink within a machine, and between machines all ports of one
machine together, since NCCL sends a ring through each. All engines here exchange among all processes at once, ``sharded`` and ``fsdp2``
too: neither sums within a machine first nor keeps a copy of its shares in each, so what they gather passes the network between machines
whole, under ``fsdp2`` twice a micro-batch. What overlaps with the backward pass still slows it down.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from mllm.errors import ConfigError, did_you_mean

ENGINES = {"none": 0, "sharded": 0, "zero1": 1, "zero2": 2, "fsdp2": 0, "zero3": 3}
"""Engine → ZeRO stage of DeepSpeed's, 0 for those in plain torch; the one that shares least first."""
LADDER = ("none", "sharded", "fsdp2", "zero2", "zero3")
"""What ``engine: auto`` chooses from, in the order that two H200s measured, the fastest first: at 7B 0.974 of one GPU under ``sharded``,
0.940 under ``fsdp2``, 0.866 under ``zero2``; ``none`` (0.955) before all, since it is the fastest by far at 1.1B. ``zero1`` shares what
``sharded`` does and is slower, so it is not among them."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. rate: operations a second of forward and backward passes, compiled and packed; bus: bytes a second of
    a ring within its machine."""

    name: str
    peak: float
    memory: float
    bus: float
    measured: bool = False

    @property
    def rate(self) -> float:
        return _RATE_OF_PEAK * self.peak


_RATE_OF_PEAK = 0.596
"""A 7B's 2 × 4096 tokens in 595 ms (643 less the update's 48), attention counted: 589 of an H200's 989 TFLOP/s."""
GPUS = {
    "h200": Gpu("H200", 989e12, 141e9, 300e9, measured=True),
    "h100": Gpu("H100", 989e12, 80e9, 300e9),
    "a100": Gpu("A100", 312e12, 80e9, 200e9),
}
_EAGER = 1.23
_AGAIN = 4 / 3
_HIDDEN_COST = 0.57
"""What a second of communication beside the backward pass costs: 25 ms more at 7B on two GPUs, where it takes 44 ms alone."""
_BACKWARD = 2 / 3
_FUSED_UPDATE = 7.2e-12
"""Seconds a parameter (48.4 ms at 6.74 billion)."""
_ZERO_UPDATE = 37e-12
"""DeepSpeed's: from ZeRO-1 on two GPUs."""
_ZERO3_HOOKS = 1.46
"""Compute under ZeRO-3 beside what eager layers cost: from 1.1B on two GPUs, likely less for larger layers."""
_ONE_BY_ONE = 0.24e-3
"""Seconds that ``sharded`` takes for a large weight, its update and the start of its gather, however few its bytes are: 37.8 ms for 156 of
them at 1.1B on two GPUs, which says the 7B's step to 1 %. What of it takes so long was not timed by itself."""
_LARGE_A_LAYER = 7
"""Such weights of a layer: queries, keys, values, output, and three of the feed-forward network."""
_LINK = 0.9
"""Share of a port's rate that collectives reach."""
_HOP = 20e-6
"""Seconds a collective takes for each doubling of the GPUs, however small it is."""


@dataclass(frozen=True)
class Cluster:
    """``gpus`` in ``nodes`` machines; port_bytes: bytes a second of all network ports of one machine."""

    gpu: Gpu
    gpus: int
    nodes: int = 1
    port_bytes: float = math.inf

    @property
    def bus(self) -> float:
        return self.gpu.bus if self.nodes == 1 else min(self.gpu.bus, _LINK * self.port_bytes)


@dataclass(frozen=True)
class Load:
    """What one optimizer step is on one GPU. operations: of all its micro-steps; learned, weights: parameters; size: bytes of one."""

    operations: float
    learned: int
    weights: int
    size: int = 2
    micro_steps: int = 1
    collectives: int = 32
    compiled: bool = True
    again: bool = False


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    update: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.exposed


def step_time(load: Load, engine: str, cluster: Cluster, *, rate: float | None = None) -> StepTime:
    """What the model above says. rate: of one GPU, where another was measured."""
    stage, n = ENGINES[engine], cluster.gpus
    compute = load.operations / (rate or cluster.gpu.rate)
    compute *= _EAGER if not load.compiled or stage == 3 else 1.0
    compute *= (_AGAIN if load.again else 1.0) * (_ZERO3_HOOKS if stage == 3 else 1.0)
    shared, by_layers = engine == "sharded", engine == "fsdp2"
    update = load.learned * (_FUSED_UPDATE / (n if shared or by_layers else 1) if stage == 0 else _ZERO_UPDATE / n)
    if n == 1:
        return StepTime(compute, update, 0.0)
    half = (n - 1) / n / cluster.bus
    latency = load.collectives * _HOP * math.log2(n)
    scatter = load.learned * load.size * half + latency
    gather = load.weights * load.size * half + latency
    one_backward = _BACKWARD * compute / load.micro_steps
    if shared:  # a weight is gathered beside the update of the next
        gathered = _beside(load.learned * load.size * half + latency, update)
        started = _ONE_BY_ONE * _LARGE_A_LAYER * load.collectives - update
        exposed = _beside(scatter, one_backward) + max(gathered, started)
    elif stage == 0 and not by_layers:
        exposed = _beside(2 * load.learned * load.size * half + latency, one_backward)
    elif stage == 3 or by_layers:
        forward = compute / load.micro_steps - one_backward
        each = _beside(gather, forward) + _beside(gather + scatter, one_backward)
        exposed = load.micro_steps * each
    else:
        times = load.micro_steps if stage == 2 else 1
        exposed = times * _beside(scatter, one_backward) + load.learned * load.size * half
    return StepTime(compute, update, exposed)


def _beside(communication: float, computing: float) -> float:
    """Seconds that communication adds to a pass it runs beside: what it slows, or what is left when the pass is over."""
    return max(_HIDDEN_COST * communication, communication - computing)


def parse_network(text: str, gpus_per_node: int) -> float:
    """Bytes a second of one machine's ports: ``400Gb`` is a port of 400 Gb/s for each of its GPUs, ``2x200Gb`` two ports a machine.

    Raises `ConfigError`.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[x×]\s*)?(\d+(?:\.\d+)?)\s*Gb(?:/s|ps|it/s)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[2]) <= 0 or match[1] == "0":
        raise ConfigError(
            f"--network is {text!r}; expected the rate of each GPU's port, as 400Gb, or ports of one machine, as 2x200Gb"
        )
    return int(match[1] or gpus_per_node) * float(match[2]) * 1e9 / 8


def find_gpu(name: str) -> Gpu:
    """Raises `ConfigError` for one that is not known."""
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu: unknown {name!r}{did_you_mean(name.lower(), GPUS)}. Known: {', '.join(GPUS)}")
    return GPUS[name.lower()]


def fastest_that_fits(memory: Callable[[str], float], limit: float, engines: Collection[str] = LADDER) -> str:
    """The first of `LADDER`, among ``engines``, whose memory (by its name, in bytes) stays below ``limit``; where none does, the one that
    takes least."""
    known = {engine: memory(engine) for engine in LADDER if engine in engines}
    return next((engine for engine, taken in known.items() if taken <= limit), min(known, key=lambda e: known[e]))
