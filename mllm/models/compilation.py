"""Which parts of a model are worth compiling, and how? Each repeated layer on its own, so that one graph serves them all."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from mllm.heads.base import MultimodalModel

_LEAST = 4
"""Parts that a layer has at least: of a convolution with its norm a graph makes nothing faster, and each would be one of its own."""


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """Layers that occur in a row of two or more of one class (decoder layers, encoder blocks), outermost rows only."""
    found: list[nn.Module] = []

    def walk(parent: nn.Module) -> None:
        for child in parent.children():
            rows = list(child.children()) if isinstance(child, (nn.ModuleList, nn.Sequential)) else []
            # Lists are never called, and of a bare `nn.Sequential` torch compiles nothing: look inside.
            is_list = any(isinstance(row, (nn.ModuleList, nn.ModuleDict)) or type(row) is nn.Sequential for row in rows)
            if (
                len(rows) >= 2
                and not is_list
                and len({type(layer) for layer in rows}) == 1
                and sum(1 for part in rows[0].modules() if not any(True for _ in part.children())) >= _LEAST
            ):
                found.extend(rows)
            else:
                walk(child)

    walk(module)
    return found


_WAYS = 4
"""Graphs that one layer may need: with and without gradients, each for its first size and for any."""


def allow_graphs(layers: Iterable[nn.Module]) -> None:
    """Raise torch's limit of graphs for one piece of code where these layers need more: a pyramid's blocks are one code in as many
    widths as it has stages, and what comes after the limit would run uncompiled without a word."""
    shapes: dict[type, set[tuple]] = defaultdict(set)
    for layer in layers:
        shapes[type(layer)].add(tuple(tuple(p.shape) for p in layer.parameters()))
    needed = _WAYS * max((len(found) for found in shapes.values()), default=0)
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, needed)


class _TellsLimit(logging.Handler):
    """Hears torch say that it compiles a piece of code for no further shapes."""

    def __init__(self, tell: Callable[[str], object]):
        super().__init__(logging.WARNING)
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if (
            isinstance(record.msg, str)
            and record.msg.startswith("torch._dynamo hit config.")
            and isinstance(record.args, tuple)
        ):
            _, limit, function, reason, *_ = record.args
            self.tell(
                f"{function} has met more shapes than torch compiles it for ({limit}) and runs uncompiled for new ones, slower "
                f"(the last: {str(reason).splitlines()[0][:160]}); rows of one length (packing: true) need one"
            )


def tell_uncompiled(tell: Callable[[str], object]) -> None:
    """From now on tell, in a line each, which compiled code falls back to running uncompiled: torch says so in its own log alone. Only the
    last caller's ``tell`` is used."""
    logger = logging.getLogger("torch._dynamo.convert_frame")
    for handler in [h for h in logger.handlers if isinstance(h, _TellsLimit)]:
        logger.removeHandler(handler)
    logger.addHandler(_TellsLimit(tell))


def compile_layers(
    model: MultimodalModel,
    *,
    language_model: bool = True,
    encoders: bool = True,
    fixed_length: bool = True,
    hooks_outside: bool = False,
) -> int:
    """Compile every repeated layer of the language model and the encoders in place; returns how many.

    fixed_length: every batch has the same rows and tokens (packing), so the language model is compiled for that shape
    alone. Otherwise, and in encoders, whose number of images differs from batch to batch, torch compiles for any size
    once it has seen a second one; a compilation for each would soon reach its limit, and the rest would run uncompiled. hooks_outside:
    what is hooked to a layer of the language model is not compiled with it (`fully_shard` gathers its weights there).

    ``layer.compile()`` keeps names and state dict as they are and sits below gradient checkpointing. Worth it on CUDA: one
    H200 gained 1.23 times from it on a 7B model. Masks, placeholder checks and merging stay outside compiled code.
    """
    count = 0
    text: list[nn.Module] = [model.get_decoder()] if language_model else []
    parts: list[tuple[nn.Module, bool | None]] = [(part, False if fixed_length else None) for part in text]
    tower = getattr(getattr(model, "model", model), "vision_tower", None)
    if encoders and tower is not None:
        parts.extend((encoder, None) for encoder in tower.encoders.values())
    for part, dynamic in parts:
        layers = repeated_layers(part)
        allow_graphs(layers)
        for layer in layers:
            if hooks_outside and part in text:
                layer.forward = torch.compile(layer.forward, dynamic=dynamic)
            else:
                layer.compile(dynamic=dynamic)
        count += len(layers)
    return count
