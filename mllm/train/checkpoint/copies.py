"""Where do copies of tensors lie that are written while training goes on, and how do they get there fast?"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_CHUNK = 1 << 30  # a power of two: torch rounds page-locked memory up to one
_ALIGNED = 64


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in this process's memory, made when this returns."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


class HostCopies:
    """Copies in memory that is kept from one checkpoint to the next; page-locked for a GPU, whose copies then run at the rate of the bus
    and wait for each other only at the end. Between `begin` and `wait` nothing that was copied may change.

    Args:
        device: Whose tensors are copied. Tensors that are in host memory already are copied there as `host_copy` does.
        allocate: Bytes → memory; default: page-locked where the device is CUDA, and none (`host_copy` for all) elsewhere.
    """

    def __init__(self, device: torch.device, allocate: Callable[[int], Tensor] | None = None):
        self.device = device
        self._allocate = allocate or (_page_locked if device.type == "cuda" else None)
        self._chunks: list[Tensor] = []
        self._chunk = self._used = 0

    def begin(self) -> None:
        """Give all places free: the copies made before are written."""
        self._chunk = self._used = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor, complete after `wait`."""
        if self._allocate is None or tensor.device.type != self.device.type or not tensor.numel():
            return host_copy(tensor)
        place = self._place(tensor.numel() * tensor.element_size())
        if place is None:
            return host_copy(tensor)
        copy = place.view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor.detach(), non_blocking=True)

    def wait(self) -> None:
        """Until all copies are complete."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _place(self, size: int) -> Tensor | None:
        """So many bytes that nothing else has; None where the system grants no more of such memory."""
        while self._chunk < len(self._chunks):
            chunk = self._chunks[self._chunk]
            if self._used + size <= len(chunk):
                start = self._used
                self._used += math.ceil(size / _ALIGNED) * _ALIGNED
                return chunk[start : start + size]
            self._chunk, self._used = self._chunk + 1, 0
        assert self._allocate is not None
        try:
            self._chunks.append(self._allocate(max(size, _CHUNK)))
        except RuntimeError as error:
            _log.warning(
                "no more page-locked memory for checkpoints that are written in the background (%s): copies are slower; `ulimit -l` "
                "says how much is allowed",
                str(error).partition("\n")[0],
            )
            self._allocate = None
            return None
        return self._place(size)


def _page_locked(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
