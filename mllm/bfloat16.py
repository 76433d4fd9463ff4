"""Has this machine units that multiply bfloat16, or does a CPU emulate them?"""

from __future__ import annotations

import platform

import torch


def fast_on_cpu() -> bool:
    """Whether products of bfloat16 take this CPU no longer than those of float32: with AVX512-BF16 or AMX; on an x86-64 CPU without, they
    take three to four times as long. Of other CPUs nothing is known here, and True is said."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    known = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check is None or check() for check in known)
