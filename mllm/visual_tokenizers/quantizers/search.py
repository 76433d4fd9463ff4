"""Which code is nearest, exactly, without holding all distances at once?"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MAX_SCORES = 2**24
"""Scores held at once (64 MiB of fp32): 512 positions against 32 768 codes."""
LARGEST_FUSED_DIM = 128
"""Channels up to which a GPU searches in one kernel, which holds whole vectors in registers."""


class Launch:
    """How the kernel is started on a GPU."""

    positions, codes, warps = 128, 128, 8
    """Positions of a program, codes that it compares at a time, and its warps."""
    programs = 1024
    """That many fill a GPU a few times over: with fewer positions, the codes are divided among more programs."""
    precision = "ieee" if torch.version.hip else "tf32x3"
    """Of the products: "ieee" (fp32), or "tf32x3" (three products of tensor cores, nearly fp32, and five times faster on an H200); the
    two best are compared in fp64 either way."""


@contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
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
    On a CUDA GPU more scores than that are made and compared in one kernel, which writes none of them to memory.
    """
    z, table = z.detach().float(), table.detach().float()
    if z.device.type == "mps":  # Apple's GPUs have no fp64
        return nearest_codes(z.cpu(), table.cpu(), max_scores=max_scores, refine=refine).to(z.device)
    num_positions, num_entries = z.shape[0], table.shape[0]
    first, second = (torch.zeros(num_positions, dtype=torch.int64, device=z.device) for _ in range(2))
    refine = refine and num_entries > 1
    bias = -0.5 * table.double().square().sum(1).float()
    rows = max(1, max_scores // num_entries)
    if num_positions > rows and _fused_search(z):
        first, second = best_two(z, table, bias)
        return _nearer(z, table, first, second) if refine else first
    with exact_matmul(z.device):
        for start in range(0, num_positions, rows):
            scores = torch.addmm(bias, z[start : start + rows], table.T)
            best = scores.argmax(1)
            first[start : start + rows] = best
            if refine:
                second[start : start + rows] = scores.scatter_(1, best[:, None], -torch.inf).argmax(1)
        return _nearer(z, table, first, second) if refine else first


def _fused_search(z: Tensor) -> bool:
    return (
        z.device.type == "cuda" and z.shape[1] <= LARGEST_FUSED_DIM and importlib.util.find_spec("triton") is not None
    )


def best_two(z: Tensor, table: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``table`` ``(K, D)`` with the largest and the second largest ``z·e + bias`` for every row of ``z`` ``(M, D)`` → two
    ``(M,)``; of equal ones those that stand first. By Triton, in fp32: parts of the codes are searched side by side, and their best ones
    compared at the end."""
    kernel = importlib.import_module("mllm.visual_tokenizers.quantizers.search_kernel").best_two_kernel
    (num_positions, dim), num_codes = z.shape, len(table)
    blocks = -(-num_positions // Launch.positions)
    parts = max(1, min(Launch.programs // blocks, num_codes // (4 * Launch.codes)))
    part = -(-num_codes // (parts * Launch.codes)) * Launch.codes
    parts = -(-num_codes // part)
    ids = torch.empty(num_positions, 2 * parts, dtype=torch.int64, device=z.device)
    scores = torch.empty(num_positions, 2 * parts, device=z.device)
    kernel[(blocks, parts)](
        z.contiguous(), table.contiguous(), bias.contiguous(), ids, scores, num_positions, num_codes, part,
        DIM=dim, WIDTH=max(16, 1 << (dim - 1).bit_length()),
        POSITIONS=Launch.positions, CODES=Launch.codes, PRECISION=Launch.precision, num_warps=Launch.warps,
    )  # fmt: skip

    def best() -> Tensor:
        return ids.masked_fill(scores < scores.amax(1, keepdim=True), len(table)).amin(1)

    first = best()
    scores.masked_fill_(ids == first[:, None], -torch.inf)
    return first, best()


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
