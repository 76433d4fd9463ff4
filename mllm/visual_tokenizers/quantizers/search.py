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
    num_positions, num_entries = z.shape[0], table.shape[0]
    ids = torch.empty(num_positions, dtype=torch.int64, device=z.device)
    if num_positions == 0:
        return ids
    bias = -0.5 * table.double().square().sum(1).float()
    rows = max(1, max_scores // num_entries)
    with _exact_matmul(z.device):
        for start in range(0, num_positions, rows):
            block = z[start : start + rows]
            scores = torch.addmm(bias, block, table.T)
            best = scores.argmax(1)
            if refine and num_entries > 1:
                scores.scatter_(1, best[:, None], -torch.inf)
                candidates = torch.stack([best, scores.argmax(1)], 1).sort(1).values
                distance = (block[:, None].double() - table[candidates].double()).square().sum(-1)
                best = torch.where(distance[:, 1] < distance[:, 0], candidates[:, 1], candidates[:, 0])
            ids[start : start + rows] = best
    return ids


def squared_distances(z: Tensor, table: Tensor) -> Tensor:
    """All squared distances ``(M, K)`` with gradient, for losses that need them (entropy)."""
    return z.square().sum(1, keepdim=True) - 2 * z @ table.T + table.square().sum(1)
