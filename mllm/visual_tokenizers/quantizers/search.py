"""Which code is nearest, exactly, without holding all distances at once?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MAX_SCORES = 2**24
"""Scores held at once (64 MiB of fp32): 512 positions against 32 768 codes."""


@contextmanager
def _exact_matmul(device: torch.device) -> Iterator[None]:
    """Full fp32 products: no autocast, and no TF32 on CUDA (rounded inputs flip near ties)."""
    if device.type == "meta":  # shapes alone; autocast refuses the device
        yield
        return
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:  # the caller uses torch's newer setting, which the older one refuses to report
            settings = torch.backends.cuda.matmul
            before, settings.fp32_precision = settings.fp32_precision, "ieee"
            try:
                yield
            finally:
                settings.fp32_precision = before
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@torch.no_grad()
def nearest_codes(z: Tensor, table: Tensor, *, max_scores: int = MAX_SCORES, refine: bool = True) -> Tensor:
    """Index of the nearest row of ``table`` ``(K, D)`` by Euclidean distance for every row of ``z`` ``(M, D)`` →
    ``(M,)``.

    ``argmin |z - e|² = argmax z·e - ½|e|²``: no square roots and no ``|z|²``. At most ``max_scores`` scores exist
    at a time. refine: the two best candidates are compared again by their direct fp64 distance, so the answer is
    the nearest code also where fp32 products cannot tell them apart; equal distances give the lowest index.
    """
    z, table = z.detach().float(), table.detach().float()
    if z.device.type == "mps":  # Apple's GPUs have no fp64
        return nearest_codes(z.cpu(), table.cpu(), max_scores=max_scores, refine=refine).to(z.device)
    num_positions, num_entries = z.shape[0], table.shape[0]
    first, second = (torch.zeros(num_positions, dtype=torch.int64, device=z.device) for _ in range(2))
    refine = refine and num_entries > 1
    bias = -0.5 * table.double().square().sum(1).float()
    rows = max(1, max_scores // num_entries)
    with _exact_matmul(z.device):
        for start in range(0, num_positions, rows):
            scores = torch.addmm(bias, z[start : start + rows], table.T)
            best = scores.argmax(1)
            first[start : start + rows] = best
            if refine:
                second[start : start + rows] = scores.scatter_(1, best[:, None], -torch.inf).argmax(1)
        return _nearer(z, table, first, second) if refine else first


def _nearer(z: Tensor, table: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Of two candidates per position the one whose direct fp64 distance is smaller, the lower index where they are equal."""
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    chosen = torch.empty_like(low)
    rows = max(1, MAX_SCORES // (2 * z.shape[1]))  # fp64 copies of as many numbers as the search itself holds
    for start in range(0, len(z), rows):
        part = slice(start, start + rows)
        own = z[part].double()
        to_low, to_high = ((own - table[ids[part]].double()).square().sum(1) for ids in (low, high))
        chosen[part] = torch.where(to_high < to_low, high[part], low[part])
    return chosen


def squared_distances(z: Tensor, table: Tensor) -> Tensor:
    """All squared distances ``(M, K)`` with gradient, for losses that need them (entropy)."""
    return z.square().sum(1, keepdim=True) - 2 * z @ table.T + table.square().sum(1)
