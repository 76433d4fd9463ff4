"""Where does the language model inside the multimodal one come from, and who has a hand in it while it is built or read?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Maker(Protocol):
    """Takes the language model's weights while they come to be, as ZeRO-3 does to keep a share of each."""

    def building(self, vocabulary: int) -> AbstractContextManager[None]:
        """The decoder is built inside, or laid out on the meta device, with embeddings of so many rows."""
        ...

    def built(self, decoder: nn.Module) -> None:
        """It is there; its weights may be read later."""

    def reading(self) -> AbstractContextManager[None]:
        """A whole published language model is read inside, to the CPU: only what is kept goes to a device."""
        ...


_follows: ContextVar[bool] = ContextVar("_follows", default=False)
_maker: ContextVar[Maker | None] = ContextVar("_maker", default=None)


@contextmanager
def language_model_left_out() -> Iterator[None]:
    """Models built inside have a language model without memory: one with published weights is put in its place."""
    token = _follows.set(True)
    try:
        yield
    finally:
        _follows.reset(token)


def language_model_follows() -> bool:
    """Whether this is inside of `language_model_left_out`."""
    return _follows.get()


@contextmanager
def made_by(maker: Maker) -> Iterator[None]:
    """Language models built or read inside pass through the hands of ``maker``."""
    token = _maker.set(maker)
    try:
        yield
    finally:
        _maker.reset(token)


def build_language_model(build: Callable[[], nn.Module], *, vocabulary: int) -> Any:
    """What ``build`` builds, by the present rules.

    Args:
        build: builds a decoder.
        vocabulary: rows of its embedding.

    Returns:
        The decoder, on the meta device where its weights are read later.
    """
    maker = _maker.get()
    if maker is None:
        return _laid_out(build)
    with maker.building(vocabulary):
        decoder = _laid_out(build)
    maker.built(decoder)
    return decoder


def _laid_out(build: Callable[[], nn.Module]) -> nn.Module:
    if not _follows.get():
        return build()
    with torch.device("meta"):
        return build()


@contextmanager
def reading_language_model(device: torch.device) -> Iterator[torch.device]:
    """A published language model is read inside, to the device that this gives (``device``, unless a maker places it)."""
    maker = _maker.get()
    if maker is None:
        yield device
        return
    with maker.reading():
        yield torch.device("cpu")


def num_elements(parameter: Any) -> int:
    """Elements of a parameter, also of one of which this process holds a share only."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shape_of(tensor: Any) -> torch.Size:
    """Shape of a tensor, also of a parameter of which this process holds a share only."""
    return getattr(tensor, "ds_shape", tensor.shape)


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Shapes of what a module saves, by name."""
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    return {name: shape_of(value) for name, value in state.items()}
