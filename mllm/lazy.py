"""How do transformers' Auto classes learn of ours without ``import mllm`` loading torch?"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_ENTRANCES = {
    "transformers.models.auto.configuration_auto": "AutoConfig",
    "transformers.models.auto.processing_auto": "AutoProcessor",
    "transformers.models.auto.image_processing_auto": "AutoImageProcessor",
}


def arm() -> None:
    """Register our classes at the first ``from_pretrained`` of an Auto class: now is too early, since registering imports torch
    and every component."""
    waiting: dict[str, str] = {}
    for module, name in _ENTRANCES.items():
        if module in sys.modules:
            _wrap(getattr(sys.modules[module], name))
        else:
            waiting[module] = name
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


def _wrap(auto_class: Any) -> None:
    original = auto_class.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        auto_class.from_pretrained = original
        from mllm.models.registration import register

        register()
        return auto_class.from_pretrained(*args, **kwargs)

    from_pretrained.__doc__ = original.__doc__
    auto_class.from_pretrained = classmethod(from_pretrained)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the awaited modules as usual and wraps their Auto class once they have been executed."""

    def __init__(self, waiting: dict[str, str]):
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        name = self.waiting.pop(fullname, None)
        if name is None:
            return None
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute: Callable[[ModuleType], None] = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _wrap(getattr(module, name))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
