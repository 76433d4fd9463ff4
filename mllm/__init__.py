"""mllm: multimodal LLMs with pluggable vision encoders.

``import mllm`` loads no torch. The model classes come when first asked for: by name (``mllm.MllmForConditionalGeneration``) or
through transformers' Auto classes.
"""

from __future__ import annotations

import importlib
from typing import Any

from mllm.lazy import arm

_LAZY = {
    "MllmConfig": "mllm.models.configuration_mllm",
    "MllmModel": "mllm.models.modeling_mllm",
    "MllmForConditionalGeneration": "mllm.models.modeling_mllm",
    "MllmProcessor": "mllm.processing.processor",
    "MllmImageProcessor": "mllm.processing.image_processor",
    "ChatSession": "mllm.models.chat",
    "load_recipe": "mllm.recipe",
    "use_plugins": "mllm.plugins",
}
__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from mllm.install import installed_version

        return installed_version()
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mllm' has no attribute {name!r}")


arm()
