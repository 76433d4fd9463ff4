"""By which kinds of work is a step's time divided, and how long is a GPU without any? Read from what a profiler recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KERNELS = {
    "network": ("nccl",),
    "attention": ("flash", "fmha", "attn", "sdpa", "cudnn_generated"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk"),
    "update": ("update_kernel", "adam"),
    "compiled elementwise": ("triton_",),
    "copies": ("memcpy", "memset", "copy"),
}
"""Kind → what the names of its kernels hold, the first that fits."""
OPERATIONS = {
    "network": ("gloo", "c10d"),
    "attention": ("attention", "softmax"),
    "matrix products": ("mm", "linear", "conv", "matmul"),
    "update": ("_foreach_", "optimizer"),
    "copies": ("copy", "_to_copy", "clone", "cat"),
}
OTHER = "other"


@dataclass(frozen=True)
class Division:
    """Of one step, in milliseconds."""

    kinds: dict[str, float]
    whole: float
    """From the first kernel to the last; on a CPU the sum of all."""
    idle: float = 0.0
    """Of it, no kernel ran."""
    gaps: tuple[tuple[float, str, str], ...] = ()
    """The longest times without a kernel, with the kernels before and after."""

    def line(self) -> str:
        """``matrix products 459.8 ms (67 %), attention 62.6 ms (9 %), …``, largest first."""
        parts = [*sorted(self.kinds.items(), key=lambda item: -item[1]), ("no kernel runs", self.idle)]
        whole = max(self.whole, 1e-9)
        return ", ".join(f"{kind} {value:.1f} ms ({value / whole:.0%})" for kind, value in parts if value > 0)


def of_kernels(events: Iterable[Mapping[str, Any]], steps: int) -> Division | None:
    """Of a GPU's kernels in a chrome trace of ``steps`` steps; None where there are none. Kernels on several streams at once count
    in their kinds each, so that kinds may sum to more than the whole."""
    wanted = ("kernel", "gpu_memcpy", "gpu_memset")
    kernels = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in wanted)
    if not kernels:
        return None
    spent, gaps, end, before = dict.fromkeys([*KERNELS, OTHER], 0.0), list[tuple[float, str, str]](), kernels[0][0], ""
    for start, stop, name in kernels:
        spent[_kind(name, KERNELS)] += (stop - start) / 1e3 / steps
        if start > end:
            gaps.append(((start - end) / 1e3, before, name))
        if stop > end:
            end, before = stop, name
    gaps.sort(reverse=True)
    whole = (end - kernels[0][0]) / 1e3 / steps
    return Division(spent, whole, sum(gap for gap, _, _ in gaps) / steps, tuple(gaps[:12]))


def of_operations(averages: Iterable[Any], steps: int) -> Division:
    """Of a CPU's operations, from the profiler's averages: each one's own time, without what it calls."""
    spent = dict.fromkeys([*OPERATIONS, OTHER], 0.0)
    for event in averages:
        spent[_kind(event.key, OPERATIONS)] += event.self_cpu_time_total / 1e3 / steps
    return Division(spent, sum(spent.values()))


def _kind(name: str, kinds: Mapping[str, tuple[str, ...]]) -> str:
    low = name.lower()
    return next((kind for kind, marks in kinds.items() if any(mark in low for mark in marks)), OTHER)
