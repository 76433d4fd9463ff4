"""Which buffers stay fp32 whatever precision a model is built in, moved to or loaded in?

A moving average takes steps of a hundredth of itself: in bfloat16, whose numbers stand 1/128 apart, most steps are lost without a word, and
half of torch's arithmetic refuses two dtypes with an error at the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Fp32Buffers(nn.Module):
    """A module whose buffers named in ``fp32_buffers`` are fp32: built under another default dtype, after ``.to(dtype)`` or ``.half()``
    (values are not rounded on the way), and after a loader put tensors of another dtype in their place (then rounded as they came)."""

    fp32_buffers: ClassVar[tuple[str, ...]] = ()

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As torch's; of ``fp32_buffers`` in fp32."""
        super().register_buffer(name, self._wide(name, tensor), persistent)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._wide(name, value))

    def _wide(self, name: str, value: Any) -> Any:
        averaged = name in self.fp32_buffers and isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        return value.float() if averaged and value.is_floating_point() else value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: self._buffers[name] for name in self.fp32_buffers if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != torch.float32:
                self._buffers[name] = new.float() if old.is_meta else old.to(new.device, torch.float32)
        return self
