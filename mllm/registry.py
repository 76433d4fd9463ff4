"""Which class has this name? One registry class for every kind of component."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from mllm.errors import ConfigError, UnknownName
from mllm.plugins import load_plugins

T = TypeVar("T")


class Registry(Generic[T]):
    """Name → class. Built-ins are ``"module:Class"`` strings, imported when first asked for, so listing needs no torch.

    A name has one owner: registering it twice raises. Plug-ins are imported when a name is not known without them, or when
    all names are asked for.
    """

    def __init__(self, kind: str, builtins: Mapping[str, str] | None = None):
        self.kind = kind
        self._lazy: dict[str, str] = dict(builtins or {})
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator that puts the class under ``name`` and sets its ``name`` attribute, unless that is a property."""

        def decorate(cls: type) -> type:
            target = f"{cls.__module__}:{cls.__qualname__}"
            owner = self._lazy.get(name) or (
                f"{self._classes[name].__module__}:{self._classes[name].__qualname__}"
                if name in self._classes
                else None
            )
            if owner is not None and owner != target:
                raise ConfigError(
                    f"{self.kind} {name!r} is already registered by {owner}; choose another name for {target}"
                )
            self._classes[name] = cls
            if not isinstance(getattr(cls, "name", None), property):  # a source's name is its dataset's
                cls.name = name  # type: ignore[attr-defined]
            return cls

        return decorate

    def get(self, name: str) -> type[T]:
        """The class registered under ``name``. Raises `UnknownName`."""
        if name not in self._classes:
            if name not in self:
                raise UnknownName(self.kind, name, self)
            if name in self._lazy:
                module, _, attribute = self._lazy[name].partition(":")
                cls = getattr(importlib.import_module(module), attribute)
                self._classes.setdefault(name, cls)
        return self._classes[name]

    def where(self, name: str) -> str:
        """``module:Class`` of a name, without importing a built-in."""
        if name in self._lazy:
            return self._lazy[name]
        cls: Any = self.get(name)
        return f"{cls.__module__}:{cls.__qualname__}"

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(sorted({*self._lazy, *self._classes}))

    def __contains__(self, name: object) -> bool:
        if name not in self._lazy and name not in self._classes:
            load_plugins()
        return name in self._lazy or name in self._classes

    def __len__(self) -> int:
        load_plugins()
        return len({*self._lazy, *self._classes})
