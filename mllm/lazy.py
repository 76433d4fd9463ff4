"""How do transformers' Auto classes learn of ours without ``import mllm`` loading torch, and how is its import kept short?

The one place that reaches into other packages while they are imported: Auto classes are wrapped once they are there,
transformers' assisted decoding gets scikit-learn at the first use instead of at every start (3 of 16 s of processor time), and
timm's log of its own training gets wandb likewise, which is most of timm's import.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

Loader = Callable[[ModuleType], None]

_ENTRANCES = {
    "transformers.models.auto.configuration_auto": "AutoConfig",
    "transformers.models.auto.processing_auto": "AutoProcessor",
    "transformers.models.auto.image_processing_auto": "AutoImageProcessor",
}
_ASSISTED = "transformers.generation.candidate_generator"
_TIMMS_LOG = "timm.utils.summary"


def arm() -> None:
    """Register our classes at the first ``from_pretrained`` of an Auto class: now is too early, since registering imports torch
    and every component."""
    waiting: dict[str, Callable[[Loader, ModuleType], None]] = {}
    for module, name in _ENTRANCES.items():
        if module in sys.modules:
            _wrap(getattr(sys.modules[module], name))
        else:
            waiting[module] = partial(_with_our_classes, name)
    if _ASSISTED not in sys.modules:
        waiting[_ASSISTED] = _without_sklearn
    if _TIMMS_LOG not in sys.modules:
        waiting[_TIMMS_LOG] = _without_wandb
    if waiting:
        sys.meta_path.insert(0, _DuringImport(waiting))


def _wrap(auto_class: Any) -> None:
    original = auto_class.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        auto_class.from_pretrained = original
        from mllm.models.registration import register

        register()
        return auto_class.from_pretrained(*args, **kwargs)

    from_pretrained.__doc__ = original.__doc__
    auto_class.from_pretrained = classmethod(from_pretrained)


def _with_our_classes(name: str, execute: Loader, module: ModuleType) -> None:
    execute(module)
    _wrap(getattr(module, name))


def _without_sklearn(execute: Loader, module: ModuleType) -> None:
    """Execute transformers' assisted decoding as if scikit-learn were absent, and hand it a ``roc_curve`` that imports it."""
    utils = sys.modules["transformers.utils"]
    installed = getattr(utils, "is_sklearn_available", None)
    if installed is None or not installed():
        execute(module)
        return
    utils.is_sklearn_available = lambda: False  # type: ignore[attr-defined]
    try:
        execute(module)
    finally:
        utils.is_sklearn_available = installed  # type: ignore[attr-defined]
    module.is_sklearn_available = installed  # type: ignore[attr-defined]
    module.roc_curve = _roc_curve  # type: ignore[attr-defined]


def _roc_curve(*arguments: Any, **options: Any) -> Any:
    from sklearn.metrics import roc_curve

    return roc_curve(*arguments, **options)


def _without_wandb(execute: Loader, module: ModuleType) -> None:
    """Execute timm's log as if wandb were absent, and hand it one that is imported when something is logged."""
    if "wandb" in sys.modules or importlib.util.find_spec("wandb") is None:
        execute(module)
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        execute(module)
    finally:
        del sys.modules["wandb"]
    module.wandb = SimpleNamespace(log=_log_to_wandb)  # type: ignore[attr-defined]


def _log_to_wandb(*arguments: Any, **options: Any) -> None:
    import wandb

    wandb.log(*arguments, **options)


class _DuringImport(importlib.abc.MetaPathFinder):
    """Finds the awaited modules as usual and lets each be executed by the function that waits for it."""

    def __init__(self, waiting: dict[str, Callable[[Loader, ModuleType], None]]):
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        work = self.waiting.pop(fullname, None)
        if work is None:
            return None
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        spec.loader.exec_module = partial(work, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec
