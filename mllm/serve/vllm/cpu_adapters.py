"""Do rows without an adapter stay without one on a CPU?

vLLM marks them with index -1, and its LoRA products in plain torch take the weights of that index: those of the last slot. In a step
that holds requests with and without adapters, the latter would be answered by another adapter, without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

EXPANSIONS = ("bgmv_expand", "bgmv_expand_slice")
"""What adds an adapter's part to a layer's output. Every product ends in one of them."""
_MODULES = ("vllm.lora.ops.torch_ops.lora_ops", "vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper.punica_cpu")


def keep_rows_without_adapters() -> None:
    """Let the products in plain torch add nothing to rows of index -1; cheap and safe to repeat."""
    for module in map(import_module, _MODULES):
        for name in EXPANSIONS:
            if not hasattr(found := getattr(module, name), "__wrapped__"):
                setattr(module, name, _masked(found))


def _masked(expand: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(expand)

    @wraps(expand)
    def masked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        has_adapter = given.arguments["lora_indices_tensor"].ge(0)
        given.arguments["inputs"] = given.arguments["inputs"] * has_adapter[:, None]
        return expand(*given.args, **given.kwargs)

    return masked
