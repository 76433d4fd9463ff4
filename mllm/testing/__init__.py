"""Which assertions must a component pass, ours or a plug-in's?"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from mllm.errors import UnknownName

# kind → its registry and its check, imported when first needed
_KINDS = {
    "encoder": ("mllm.encoders:ENCODERS", "mllm.testing.encoders:check_encoder"),
    "connector": ("mllm.connectors:CONNECTORS", "mllm.testing.connectors:check_connector"),
    "router": ("mllm.routers:ROUTERS", "mllm.testing.routers:check_router"),
    "visual tokenizer": (
        "mllm.visual_tokenizers:VISUAL_TOKENIZERS",
        "mllm.testing.visual_tokenizers:check_visual_tokenizer",
    ),
}


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def find_check(name: str) -> tuple[str, Callable[[], Any]]:
    """The kind of a registered component, or of a shipped encoder entry, and a function that runs its contract checks.

    Raises `UnknownName` when nothing goes by ``name``.
    """
    known: list[str] = []
    for kind, (registry, check) in _KINDS.items():
        names = _load(registry)
        if name in names:
            return kind, lambda check=check: _load(check)(name)
        known.extend(names)
    entries = _load("mllm.encoders.catalogue:catalogue")()
    if name in entries:
        return "encoder", lambda: _load("mllm.testing.encoders:check_encoder")(name)
    known.extend(entries)
    raise UnknownName("component", name, known)
