"""What shapes does a network's pass have, when nothing is to be computed?

On the meta device torch runs norms, activations and initialisers in Python, milliseconds each, only to find the shape that it was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

KEEP_SHAPE = frozenset(
    {
        *(functional.layer_norm, functional.batch_norm, functional.group_norm, functional.rms_norm, torch.layer_norm),
        *(functional.gelu, functional.silu, functional.relu, functional.hardswish, functional.dropout, torch.sigmoid),
        *(Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_, Tensor.mul_, Tensor.add_, Tensor.zero_),
        *(nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_, nn.init.kaiming_uniform_, nn.init.xavier_uniform_),
        *(nn.init.zeros_, nn.init.ones_, nn.init.constant_, Tensor.fill_, Tensor.copy_),
    }
)
"""Functions whose result has shape and dtype of their first argument, and hold no matrix product: counts stay what they are."""


class OnlyShapes(TorchFunctionMode):
    """Within it these functions hand back a meta tensor as they got it; whatever has values is computed as ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in KEEP_SHAPE:
            first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
            if isinstance(first, Tensor) and first.is_meta:
                return first
        elif func is Tensor.__setitem__ and args[0].is_meta:
            return None
        return func(*args, **kwargs)
