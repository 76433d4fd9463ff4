"""Which parts of a model are worth compiling, and how? Each repeated layer on its own, so that one graph serves them all; an encoder whose
layers are all unlike, as a convolution network's are, as a whole."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from mllm.heads.base import MultimodalModel
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.networks.convolution import ConvolutionalDecoder, ConvolutionalEncoder

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


_WAYS = 6
"""Graphs that one layer may need: with and without gradients, each for its first size, for any, and for one picture, which torch takes
for a case of its own."""


def allow_graphs(layers: Iterable[nn.Module]) -> None:
    """Raise torch's limit of graphs for one piece of code where these layers need more: a pyramid's blocks are one code in as many
    widths as it has stages, and what comes after the limit would run uncompiled without a word."""
    shapes: dict[Callable[..., object], set[tuple]] = defaultdict(set)
    for layer in layers:
        shapes[type(layer).forward].add(_shapes(layer))
    # A stage's first block is given its maps in the layout of the layer that made them smaller, the others in their own.
    needed = _WAYS * max((2 * len(found) if len(found) > 1 else 1 for found in shapes.values()), default=0)
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, needed)


def _shapes(layer: nn.Module) -> tuple:
    return tuple(tuple(p.shape) for p in layer.parameters())


def best_whole(encoder: nn.Module) -> bool:
    """Whether an encoder is better one graph than a graph for each kind of its repeated layers: it has none, or at least half of them
    differ in their sizes. Such are convolution networks, where most of the time goes into norms and activations that a graph joins."""
    layers = repeated_layers(encoder)
    kinds = {(type(layer), _shapes(layer)) for layer in layers}
    some_weights = next(encoder.parameters(), None) is not None
    return some_weights and len(kinds) != 1 and 2 * len(kinds) >= len(layers)


class WholeEncoder:
    """An encoder as one graph, in front of its call: names, weights, hooks and modes stay as they are, and copies of the encoder have none.

    Pictures are compiled for the number that comes first and, once another has come, for any; ``varies``: for any at once. What cannot
    be compiled without a break, or is asked for more than features of pixels, runs by its layers from then on, and ``tell`` has a line.
    """

    def __init__(self, name: str, encoder: nn.Module, *, varies: bool, tell: Callable[[str], object]):
        self.name, self.encoder, self.varies, self.tell = name, encoder, varies, tell
        encoder.compile(fullgraph=True)
        self.compiled: Callable[..., Any] | None = encoder._compiled_call_impl  # pyright: ignore[reportAttributeAccessIssue]
        encoder._compiled_call_impl = self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, pixels: Tensor, **options: Any) -> Any:
        asked = [key for key, value in options.items() if value is not None and value is not False]
        if self.compiled is not None and asked:
            self._by_layers(f"is called with {', '.join(asked)} and is not compiled as a whole")
        if self.compiled is None or not len(pixels):
            return self.encoder._call_impl(pixels, **options)
        if self.varies and len(pixels) > 1:
            torch._dynamo.maybe_mark_dynamic(pixels, 0)
        try:
            return self.compiled(pixels)
        except TorchDynamoException as error:
            self._by_layers(f"cannot be compiled as a whole ({_first_line(error)})")
        return self.encoder._call_impl(pixels)

    def _by_layers(self, why: str) -> None:
        self.compiled = None
        layers = _compile_each(self.encoder, dynamic=None)
        rest = f"its {len(layers)} repeated layers are compiled" if layers else "it runs uncompiled, slower"
        self.tell(f"encoder {self.name} {why}; {rest}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:160]


def _compile_each(part: nn.Module, *, dynamic: bool | None, hooks_outside: bool = False) -> list[nn.Module]:
    layers = repeated_layers(part)
    allow_graphs(layers)
    for layer in layers:
        if hooks_outside:
            layer.forward = torch.compile(layer.forward, dynamic=dynamic)
        else:
            layer.compile(dynamic=dynamic)
    return layers


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
    tell: Callable[[str], object] = print,
) -> int:
    """Compile every repeated layer of the language model and the encoders in place, and encoders without such as a whole
    (`best_whole`); returns how many.

    fixed_length: every batch has the same rows and tokens (packing), so the language model is compiled for that shape
    alone. Otherwise, and in encoders, whose number of images differs from batch to batch, torch compiles for any size
    once it has seen a second one; a compilation for each would soon reach its limit, and the rest would run uncompiled. hooks_outside:
    what is hooked to a layer of the language model is not compiled with it (`fully_shard` gathers its weights there). tell: is given a
    line for an encoder that cannot be compiled as a whole, when it first runs.

    ``layer.compile()`` keeps names and state dict as they are and sits below gradient checkpointing. Worth it on CUDA: one
    H200 gained 1.23 times from it on a 7B model. Masks, placeholder checks and merging stay outside compiled code.
    """
    count, text = 0, False if fixed_length else None
    if language_model:
        count = len(_compile_each(model.get_decoder(), dynamic=text, hooks_outside=hooks_outside))
    tower = getattr(getattr(model, "model", model), "vision_tower", None)
    if not encoders or tower is None:
        return count
    whole = {name: encoder for name, encoder in tower.encoders.items() if best_whole(encoder)}
    allow_graphs(whole.values())
    for name, encoder in tower.encoders.items():
        if name in whole:  # packed rows hold another number of pictures each time, and so does what a router chooses
            WholeEncoder(name, encoder, varies=fixed_length or name in getattr(tower, "experts", ()), tell=tell)
        count += 1 if name in whole else len(_compile_each(encoder, dynamic=None))
    return count


def compile_tokenizer(tokenizer: VisualTokenizer) -> int:
    """Compile a visual tokenizer's networks in place, for `encode`, `decode` and training alike; returns how many pieces.

    Convolutional networks are compiled whole: between their layers torch then keeps channels last, and a group norm with its swish is
    one kernel that reads and writes in the networks' own type (by itself, under autocast, it writes fp32). Transformers are compiled
    layer by layer. Any number of images is served once a second one was seen. Quantizers run as before: the search for the nearest code
    is made of large products already.
    """
    parts: list[nn.Module] = [
        m for m in tokenizer.modules() if isinstance(m, (ConvolutionalEncoder, ConvolutionalDecoder))
    ]
    inside = {id(m) for part in parts for m in part.modules()}
    parts += [layer for layer in repeated_layers(tokenizer) if id(layer) not in inside]
    allow_graphs(parts)
    for part in parts:
        part.compile(dynamic=None)
    return len(parts)
