"""What does one optimizer step cost and yield? Counts, times, rates and shares of the peak."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mllm import distributed
from mllm.heads.base import count_targets
from mllm.train.observe.flops import FlopModel


class Meter:
    """Sums counts over the steps since the last report and turns them into rates over all processes."""

    def __init__(self, flops: FlopModel | None, peak: float | None, device: torch.device):
        self.flops, self.peak, self.device = flops, peak, device
        self.reset()

    def reset(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.steps = 0
        self.counts = {"tokens": 0.0, "slots": 0.0, "supervised": 0.0, "samples": 0.0, "images": 0.0}
        self.model_flops = self.total_flops = 0.0

    def add(self, counts: dict[str, float], flops: tuple[float, float], waited: float) -> None:
        """Add one step. counts and flops: over all processes; waited: seconds this process waited for data."""
        for key in self.counts:
            self.counts[key] += counts[key]
        self.model_flops += flops[0]
        self.total_flops += flops[1]
        self.waited += waited
        self.steps += 1

    def report(self) -> dict[str, Any]:
        """Rates since the last report, over whole wall time (saving, logging and waiting included); starts anew."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        processes = distributed.world_size()
        record: dict[str, Any] = {
            "seconds": seconds / max(self.steps, 1),
            "tokens_per_second": self.counts["tokens"] / seconds,
            "supervised_per_second": self.counts["supervised"] / seconds,
            "samples_per_second": self.counts["samples"] / seconds,
            "images_per_second": self.counts["images"] / seconds,
            "fill": self.counts["tokens"] / max(self.counts["slots"], 1),
            "data_wait": min(self.waited / seconds, 1.0),
        }
        if self.flops is not None:
            record["tflops"] = {
                "language_model": self.model_flops / seconds / processes / 1e12,
                "total": self.total_flops / seconds / processes / 1e12,
            }
        if self.flops is not None and self.peak is not None:
            available = seconds * processes * self.peak
            record["mfu"] = {"language_model": self.model_flops / available, "total": self.total_flops / available}
        if self.device.type == "cuda":
            record["memory_gb"] = torch.cuda.max_memory_reserved(self.device) / 1e9
        self.reset()
        return record


def mean_losses(
    found: Sequence[Mapping[str, torch.Tensor] | None], micro: Sequence[Any], model: nn.Module, *, everywhere: bool
) -> dict[str, float]:
    """What the micro-batches of a step report, by name, as one batch of all of them would report it.

    A part's value is a mean over its micro-batch, so each counts with what it is a mean over: ``<head>/<part>`` with what teaches that
    head (`Head.count`), all else with supervised tokens, as both do in the loss. A part that leaves some of it out (a camera that is not
    known) counts with all of it.

    Args:
        found: name → value, of each micro-batch that counts; None where nothing was to be answered.
        micro: these micro-batches.
        model: whose heads say what teaches them.
        everywhere: the mean is over all processes, each of which must call it; else over this one.
    """
    own = []
    for losses, batch in zip(found, micro, strict=True):
        taught = count_targets(model, [batch.inputs]) if losses else {}
        weights = {name: taught.get(name.split("/")[0], float(batch.num_supervised)) for name in losses or {}}
        own.append({name: (float(value), weights[name]) for name, value in (losses or {}).items()})
    told = [losses for process in distributed.gather_objects(own) for losses in process] if everywhere else own
    values: dict[str, list[tuple[float, float]]] = {}
    for losses in told:
        for name, value in losses.items():
            values.setdefault(name, []).append(value)
    return {name: _weighted(each) for name, each in values.items()}


def _weighted(each: Sequence[tuple[float, float]]) -> float:
    """The mean of (value, weight); the plain one where nothing weighs anything."""
    whole = sum(weight for _, weight in each)
    return sum(value * weight for value, weight in each) / whole if whole else sum(v for v, _ in each) / len(each)


def count_batches(batches: Sequence[Any], flops: FlopModel | None) -> dict[str, float]:
    """What this process's micro-batches of one step hold, and a checksum of their samples' ids."""
    tokens = sum(length for batch in batches for row in batch.lengths for length in row)
    squares = sum(length * length for batch in batches for row in batch.lengths for length in row)
    supervised = sum(batch.num_supervised for batch in batches)
    images = sum(int(batch.num_images.sum()) for batch in batches)
    views = sum(batch.num_views for batch in batches)
    step = flops.step(tokens=tokens, squares=squares, supervised=supervised, views=views) if flops else None
    return {
        "tokens": tokens,
        "slots": sum(batch.inputs["input_ids"].numel() for batch in batches),
        "supervised": supervised,
        "samples": sum(len(batch.ids) for batch in batches),
        "images": images,
        "model_flops": step.language_model if step else 0.0,
        "total_flops": step.total if step else 0.0,
        "data": sum(zlib.crc32(f"{name}/{key}".encode()) for b in batches for name, key in zip(b.datasets, b.ids)),
    }
