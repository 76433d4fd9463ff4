"""How much of this process's GPU may a run have, and what is said when that is not enough?"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mllm.distributed import local_device
from mllm.errors import GpuFull

BUSY_SHARE = 0.9
"""Of a GPU with less free, other programs hold much."""


def usable_memory() -> int:
    """Bytes of this process's GPU that a run can count on: all, but where other programs hold much of it what they leave."""
    device = local_device()
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    return total if free >= BUSY_SHARE * total else free


def tell_busy_gpu() -> None:
    """A line when other programs hold much of this process's GPU: the plan's memory is then not there."""
    if not torch.cuda.is_available():
        return
    device = local_device()
    free, total = torch.cuda.mem_get_info(device)
    if free < BUSY_SHARE * total:
        sys.stderr.write(
            f"! GPU {device.index} of {socket.gethostname()}: other programs hold {(total - free) / 1e9:.0f} of "
            f"{total / 1e9:.0f} GB; end them (nvidia-smi shows which), or choose other GPUs with CUDA_VISIBLE_DEVICES\n"
        )


@contextmanager
def naming_a_full_gpu() -> Iterator[None]:
    """A GPU without memory left as `GpuFull`, in one line."""
    try:
        yield
    except (
        RuntimeError
    ) as error:  # torch.OutOfMemoryError is one; so is what CUDA says where not even its own state fits
        if not isinstance(error, torch.OutOfMemoryError) and "CUDA error: out of memory" not in str(error):
            raise
        raise GpuFull(_why_full()) from error


def _why_full() -> str:
    device = local_device()
    who = f"GPU {device.index} of {socket.gethostname()} is full"
    go_on = "Checkpoints are complete: --resume goes on from the last, also with another max_tokens_per_batch"
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # not even what asks has room
        return f"{who}: other programs hold it. End them (nvidia-smi shows which) or choose other GPUs. {go_on}"
    own = torch.cuda.memory_reserved(device)
    others = max(0, total - free - own)
    cure = (
        "End them (nvidia-smi shows which) or choose other GPUs with CUDA_VISIBLE_DEVICES"
        if others > (1 - BUSY_SHARE) * total
        else "max_tokens_per_batch, gradient_checkpointing: true, a smaller batch_size or max_length, and engine: auto take less; `mllm "
        "plan` says what fits"
    )
    held = f"this process holds {own / 1e9:.1f} of {total / 1e9:.0f} GB, other programs {others / 1e9:.1f}"
    return f"{who}: {held}. {cure}. {go_on}"
