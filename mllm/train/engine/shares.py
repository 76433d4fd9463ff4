"""How is a parameter read of which ZeRO-3 or fsdp2 left this process a share only?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_cut(parameter: Any) -> bool:
    """Whether fsdp2 left this process some rows of it only."""
    return hasattr(parameter, "device_mesh")


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


@contextmanager
def read_whole(parameter: nn.Parameter) -> Iterator[Tensor]:
    """The values of a parameter, of which each process may have a share. All processes must call it."""
    if is_cut(parameter):
        yield parameter.detach().full_tensor()  # type: ignore[operator]
        return
    with whole([parameter]):
        yield parameter.detach()


def own_rows(parameter: Any) -> tuple[Tensor, int]:
    """Of a parameter that is cut by rows, this process's rows, in the parameter's memory, and the place of their first element in the
    flattened parameter."""
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    first = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return parameter.detach().to_local(), first * math.prod(parameter.shape[1:])


def own_share(parameter: Any) -> tuple[torch.Tensor, int, int] | None:
    """(flat tensor, start, length) of this process's share of a parameter's elements; None for a parameter that is there whole."""
    if is_cut(parameter):
        own, start = own_rows(parameter)
        return own.view(-1), start, own.numel()
    if not hasattr(parameter, "ds_id"):
        return None
    size = int(parameter.partition_numel())
    start = min(int(parameter.ds_zero_partition_rank) * size, int(parameter.ds_numel))
    return parameter.ds_tensor, start, min(size, int(parameter.ds_numel) - start)
