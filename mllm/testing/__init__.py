"""Which assertions must a component pass, ours or a plug-in's?"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from mllm.errors import ConfigError, UnknownName

# kind → its registry and its check, imported when first needed
_KINDS = {
    "encoder": ("mllm.encoders:ENCODERS", "mllm.testing.encoders:check_encoder"),
    "connector": ("mllm.connectors:CONNECTORS", "mllm.testing.connectors:check_connector"),
    "router": ("mllm.routers:ROUTERS", "mllm.testing.routers:check_router"),
    "visual-tokenizer": (
        "mllm.visual_tokenizers:VISUAL_TOKENIZERS",
        "mllm.testing.visual_tokenizers:check_visual_tokenizer",
    ),
    "branch": (
        "mllm.visual_tokenizers.diffusion.branches:CONDITIONING_BRANCHES",
        "mllm.testing.branches:check_branch",
    ),
    "head": ("mllm.heads:HEADS", "mllm.testing.heads:check_head"),
    "metric": ("mllm.eval.metrics:METRICS", "mllm.testing.metrics:check_metric"),
    "generator": ("mllm.eval.generators:GENERATORS", "mllm.testing.generators:check_generator"),
    "format": ("mllm.data.spec:SOURCES", "mllm.testing.formats:check_format"),
}


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def find_check(name: str, *, kind: str | None = None, checkpoint: str | None = None) -> tuple[str, Callable[[], Any]]:
    """The kind of a registered component, or of a shipped encoder entry, and a function that runs its contract checks.

    kind: look among these only; else the first kind that knows the name. checkpoint: what a generator is opened on. Raises
    `UnknownName` when nothing goes by ``name``, `ConfigError` for an unknown kind.
    """
    if kind is not None and kind not in _KINDS:
        raise UnknownName("kind of component", kind, _KINDS)
    if checkpoint is not None:
        kind = kind or "generator"
        if kind != "generator":
            raise ConfigError(f"--checkpoint is for generators, not for a {kind}")
    options = {} if checkpoint is None else {"checkpoint": checkpoint}
    known: list[str] = []
    for each in [kind] if kind is not None else _KINDS:
        registry, check = _KINDS[each]
        names = _load(registry)
        if name in names:
            return each, lambda check=check: _load(check)(name, **options)
        known.extend(names)
    if kind in (None, "encoder"):
        entries = _load("mllm.encoders.catalogue:catalogue")()
        if name in entries:
            return "encoder", lambda: _load("mllm.testing.encoders:check_encoder")(name)
        known.extend(entries)
    raise UnknownName(kind or "component", name, known)
