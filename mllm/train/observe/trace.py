"""By which kinds of work is a step's time divided, and how long is a GPU without any? Read from what a profiler recorded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
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
NETWORK, DATA, ENCODERS, UPDATE, OTHER = "network", "waiting for data", "encoders", "update", "other"
RANGES = {"mllm.data": DATA, "mllm.encoders": ENCODERS, "mllm.update": UPDATE}
"""What `torch.profiler.record_function` is told around a piece of code → the kind of all that is started in it."""
_BACKWARD = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Division:
    """Of one step, in milliseconds."""

    kinds: dict[str, float]
    whole: float
    """From the first kernel to the last, or of the steps' own clock; on a CPU without one the sum of all."""
    idle: float = 0.0
    """Of it, no kernel ran, and no batch was waited for."""
    gaps: tuple[tuple[float, str, str], ...] = ()
    """The longest times without a kernel, with the kernels before and after."""
    of_gpu: bool = False
    """By a GPU's kernels, not a CPU's operations."""

    def parts(self) -> dict[str, float]:
        """Kind → milliseconds, largest first, then the time without a kernel; what took none is left out."""
        parts = [*sorted(self.kinds.items(), key=lambda item: -item[1]), ("no kernel runs", self.idle)]
        return {kind: value for kind, value in parts if value > 0}

    def line(self) -> str:
        """``matrix products 459.8 ms (67 %), attention 62.6 ms (9 %), …``, largest first."""
        whole = max(self.whole, 1e-9)
        return ", ".join(f"{kind} {value:.1f} ms ({value / whole:.0%})" for kind, value in self.parts().items())


def of_kernels(events: Iterable[Mapping[str, Any]], steps: int, *, seconds: float | None = None) -> Division | None:
    """Of a GPU's kernels in a chrome trace of ``steps`` steps; None where there are none. Where kernels run at once, the time is that of
    the one that began first, and the network's only where nothing else runs. seconds: what the steps took by their own clock."""
    events = list(events)
    wanted = ("kernel", "gpu_memcpy", "gpu_memset")
    kernels = sorted((e for e in events if e.get("cat") in wanted), key=lambda e: e["ts"])
    if not kernels:
        return None
    owner, starts = _owners(events), _launches(events)
    spent, gaps = dict.fromkeys([*KERNELS, ENCODERS, DATA, OTHER], 0.0), list[tuple[float, str, str]]()
    end, computed, before = kernels[0]["ts"], kernels[0]["ts"], ""
    busy = 0.0
    for event in kernels:
        start, stop, name = event["ts"], event["ts"] + event["dur"], event["name"]
        kind = _kind(name, KERNELS)
        if kind != NETWORK:
            place = starts.get(event.get("args", {}).get("correlation"))
            kind = (owner(*place) if place else None) or kind
            spent[kind] += max(0.0, stop - max(start, computed)) / 1e3 / steps
            computed = max(computed, stop)
        busy += max(0.0, stop - max(start, end)) / 1e3 / steps
        if start > end:
            gaps.append(((start - end) / 1e3, before, name))
        if stop > end:
            end, before = stop, name
    spent[NETWORK] = max(0.0, busy - sum(spent.values()))
    gaps.sort(reverse=True)
    whole = (end - kernels[0]["ts"]) / 1e3 / steps if seconds is None else seconds * 1e3 / steps
    idle = max(0.0, whole - busy)
    spent[DATA] = min(idle, _lengths(events, "mllm.data") / 1e3 / steps)
    return Division(spent, whole, idle - spent[DATA], tuple(gaps[:12]), of_gpu=True)


def of_operations(events: Iterable[Mapping[str, Any]], steps: int, *, seconds: float | None = None) -> Division:
    """Of a CPU's operations in a chrome trace: each one's own time, without what it calls. seconds: as in `of_kernels`; what no operation
    took of them (Python) is counted with ``other``."""
    events = list(events)
    owner = _owners(events)
    spent = dict.fromkeys([*OPERATIONS, ENCODERS, DATA, OTHER], 0.0)
    for event, own in _own_times(events):
        kind = owner(event["tid"], event["ts"]) or _kind(event["name"], OPERATIONS)
        if kind != DATA:
            spent[kind] += own / 1e3 / steps
    spent[DATA] = _lengths(events, "mllm.data") / 1e3 / steps
    told = sum(spent.values())
    whole = told if seconds is None else max(told, seconds * 1e3 / steps)
    spent[OTHER] += whole - told
    return Division(spent, whole)


def _own_times(events: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Mapping[str, Any], float]]:
    """Each operation and its microseconds without those that it calls."""
    found = sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    own = [float(e["dur"]) for e in found]
    open_: list[int] = []
    for index, event in enumerate(found):
        while open_ and not _inside(event, found[open_[-1]]):
            open_.pop()
        if open_:
            own[open_[-1]] -= event["dur"]
        open_.append(index)
    return zip(found, own)


def _inside(event: Mapping[str, Any], outer: Mapping[str, Any]) -> bool:
    return event["tid"] == outer["tid"] and event["ts"] < outer["ts"] + outer["dur"]


def _lengths(events: Sequence[Mapping[str, Any]], mark: str) -> float:
    return sum(e["dur"] for e in events if e.get("cat") == "user_annotation" and e["name"] == mark)


def _launches(events: Sequence[Mapping[str, Any]]) -> dict[Any, tuple[Any, float]]:
    """A kernel's correlation → the thread that started it, and when."""
    calls = (e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    return {e.get("args", {}).get("correlation"): (e["tid"], e["ts"]) for e in calls}


def _owners(events: Sequence[Mapping[str, Any]]) -> Callable[[Any, float], str | None]:
    """(Thread, time) → the kind that all work started there belongs to, None where names tell it: within a marked range, and in the
    backward pass of what ran in one."""
    spans: dict[Any, list[tuple[float, float, str]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"] in RANGES:
            spans.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"], RANGES[event["name"]]))
    marked = _finder(spans)
    made: dict[
        int, Mapping[str, Any]
    ] = {}  # number of a backward function → the last operation that has it: the one that made it
    backward: list[Mapping[str, Any]] = []
    for event in events:
        number = event.get("args", {}).get("Sequence number") if event.get("cat") == "cpu_op" else None
        if number is None:
            continue
        if event["name"].startswith(_BACKWARD):
            backward.append(event)
        elif not event["args"].get("Fwd thread id") and event["tid"] in spans:
            made[number] = max(made.get(number, event), event, key=lambda e: e["ts"])
    for event in backward:
        source = made.get(event["args"]["Sequence number"])
        if source is not None and marked(source["tid"], source["ts"]) == ENCODERS:
            spans.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"], ENCODERS))
    return _finder(spans)


def _finder(spans: Mapping[Any, list[tuple[float, float, str]]]) -> Callable[[Any, float], str | None]:
    ordered = {thread: sorted(found) for thread, found in spans.items()}
    starts = {thread: [start for start, _, _ in found] for thread, found in ordered.items()}

    def find(thread: Any, time: float) -> str | None:
        place = bisect_right(starts.get(thread, []), time) - 1
        if place < 0:
            return None
        _, stop, kind = ordered[thread][place]
        return kind if time < stop else None

    return find


def _kind(name: str, kinds: Mapping[str, tuple[str, ...]]) -> str:
    low = name.lower()
    return next((kind for kind, marks in kinds.items() if any(mark in low for mark in marks)), OTHER)
