"""On which device, in which type and how far along is a tokenizer's work?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mllm.errors import ConfigError, UnavailableError
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.images import ImageSource

_METHODS = ("encode", "embed", "decode", "forward", "semantic_features", "semantic_tokens")


def choose_device(name: str = "auto") -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1``, ``mps`` … or ``auto``: CUDA where there is one, else the CPU.

    Raises `ConfigError` for a name that means no device, `UnavailableError` for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: give auto, cpu, cuda, cuda:1 … or mps") from error
    if device.type == "cuda":
        number = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= number:
            there = f"cuda:0 to cuda:{number - 1}" if number > 1 else "cuda:0" if number else "no CUDA device"
            raise UnavailableError(f"device {name}: this machine has {there}; give auto or cpu")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UnavailableError("device mps: there is no Apple GPU, or PyTorch cannot use it; give auto or cpu")
    elif device.type != "cpu":
        raise ConfigError(f"device {name!r}: give auto, cpu, cuda, cuda:1 … or mps")
    return device


def run_in_bfloat16(tokenizer: VisualTokenizer) -> VisualTokenizer:
    """The same tokenizer, whose networks compute in bfloat16 from now on, as in training with ``dtype: bfloat16``. The
    weights, the codebooks and the search for the nearest code stay in fp32."""
    kind = tokenizer.last_layer().device.type
    for name in _METHODS:
        if hasattr(tokenizer, name):
            method = torch.autocast(kind, dtype=torch.bfloat16)(getattr(tokenizer, name))
            setattr(tokenizer, name, method)
    tokenizer.compute_dtype = "bfloat16"
    return tokenizer


class WatchedImages(ImageSource):
    """Another source's images; ``advance`` is told how many were read each time."""

    def __init__(self, images: ImageSource, advance: Callable[[int], object]):
        super().__init__(images.options, images.size, images.split)
        self.labels, self.classes = images.labels, images.classes
        self._images, self._advance = images, advance

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        found = self._images.batch(indices)
        self._advance(len(indices))
        return found

    def contents(self, indices: Sequence[int]) -> list[str]:
        return self._images.contents(indices)

    def describe(self, index: int) -> str:
        return self._images.describe(index)


@contextmanager
def watched(
    title: str, *sources: ImageSource, total: int | None = None, done: int = 0
) -> Iterator[tuple[ImageSource, ...]]:
    """``sources`` with one bar on stderr that moves as they are read; as they are when stderr is no terminal. total: how
    many images will be read, all of them once if not given; done: how many need not be."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield sources
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=sum(map(len, sources)) if total is None else total, completed=done)
        yield tuple(WatchedImages(source, lambda number: bar.advance(task, number)) for source in sources)
