"""How is a parameter read of which ZeRO-3 left this process a share only?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def whole(parameters: Iterable[nn.Parameter], *, changed: bool = False) -> Iterator[None]:
    """Inside, parameters of which each process has a share are there whole, to be read; changed: to be written too, by every process alike.
    All processes must call it."""
    cut = [p for p in parameters if hasattr(p, "ds_id")]
    if not cut:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if changed else None):
        yield


def own_share(parameter: Any) -> tuple[torch.Tensor, int, int] | None:
    """(flat tensor, start, length) of this process's share of a parameter's elements; None for a parameter that is there whole."""
    if not hasattr(parameter, "ds_id"):
        return None
    size = int(parameter.partition_numel())
    start = min(int(parameter.ds_zero_partition_rank) * size, int(parameter.ds_numel))
    return parameter.ds_tensor, start, min(size, int(parameter.ds_numel) - start)
