"""What does one optimizer step cost and yield? Counts, times, rates and shares of the peak."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mllm import distributed
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


def mean_losses(found: Sequence[Mapping[str, torch.Tensor] | None], *, everywhere: bool) -> dict[str, float]:
    """What the micro-batches of a step report, by name: the mean over those that have it, of all processes where ``everywhere`` (each must
    call it then), else of this one."""
    own = [{name: float(value) for name, value in losses.items()} for losses in found if losses]
    told = [losses for process in distributed.gather_objects(own) for losses in process] if everywhere else own
    values: dict[str, list[float]] = {}
    for losses in told:
        for name, value in losses.items():
            values.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}


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
