"""How does ZeRO-3 come to see the tensors inside our dataclasses?

It gathers a module's parameters for the backward pass through hooks on the tensors that the module took and gave, and
looks for them in tensors, tuples, lists and dicts only. Encoders give `VisionFeatures`, routers `Routing`. Hooks set
before DeepSpeed's turn such objects into dicts, hooks set after its own turn them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn


class _Opened(dict[str, Any]):
    """The fields of a dataclass object, and its class."""

    def __init__(self, content: dict[str, Any], kind: Any):
        super().__init__(content)
        self.kind = kind


def open_before(modules: Iterable[nn.Module]) -> None:
    """To be called before `deepspeed.initialize`."""
    for module in modules:
        module.register_forward_pre_hook(lambda _, inputs: _open(inputs))
        module.register_forward_hook(lambda _, __, output: _open(output))


def close_after(modules: Iterable[nn.Module]) -> None:
    """To be called after `deepspeed.initialize`."""
    for module in modules:
        module.register_forward_pre_hook(lambda _, inputs: _close(inputs))
        module.register_forward_hook(lambda _, __, output: _close(output))


def _open(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, (dict, type)):  # transformers' outputs are dicts already
        instance: Any = value
        return _Opened({f.name: _open(getattr(instance, f.name)) for f in fields(instance)}, type(instance))
    return _each(value, _open)


def _close(value: Any) -> Any:
    if isinstance(value, _Opened):
        return value.kind(**{key: _close(item) for key, item in value.items()})
    return _each(value, _close)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """``change`` applied to the items of a plain tuple, list or dict; anything else as it is."""
    if type(value) in (tuple, list):
        return type(value)(change(item) for item in value)
    if type(value) is dict:
        return {key: change(item) for key, item in value.items()}
    return value
