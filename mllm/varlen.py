"""How is torch's variable-length attention called, whose signature is another in every release?"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from mllm.errors import UnavailableError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover - before torch 2.10
    varlen_attn = None

_ARGUMENTS = frozenset() if varlen_attn is None else frozenset(inspect.signature(varlen_attn).parameters)
"""Read once and outside: compiled code would warn about a cache."""


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    *,
    scale: float | None = None,
    causal: bool,
    window: int | None = None,
) -> Tensor:
    """Attention within each segment of ``(T, heads, d)``, as one kernel on CUDA in half precision; key and value may have fewer heads.

    bounds: int32 ``(S + 1,)``, the segments' ends; longest: tokens of the longest; scale: of the scores (None: ``d ** -0.5``);
    window: tokens each one sees, itself counted. Raises `UnavailableError` for what this torch cannot do.
    """
    if varlen_attn is None:
        raise UnavailableError(f"torch {torch.__version__} has no variable-length attention; update to 2.10 or later")
    arguments: dict[str, Any] = {}
    if "window_size" in _ARGUMENTS:
        # The kernel's left extent counts keys before the query's own; transformers' window counts it too.
        left = window - 1 if window is not None and window < longest else -1
        arguments["window_size"] = (left, 0) if causal else (-1, -1)
    elif window is not None and window < longest:
        raise UnavailableError(
            f"torch {torch.__version__} has no sliding window in its variable-length attention; update to 2.12"
        )
    else:
        arguments["is_causal"] = causal
    grouped = query.shape[1] // key.shape[1]
    if grouped > 1 and "enable_gqa" in _ARGUMENTS:
        arguments["enable_gqa"] = True
    elif grouped > 1:
        key, value = (tensor.repeat_interleave(grouped, dim=1) for tensor in (key, value))
    default = query.shape[-1] ** -0.5
    if scale is not None and "scale" in _ARGUMENTS:
        arguments["scale"] = scale
    elif scale is not None and abs(scale - default) > 1e-9:
        query = query * (scale / default)
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, **arguments)
    assert isinstance(output, Tensor)
    return output
