"""How do encoders run without the CPU launching every kernel? One set of CUDA graphs per encoder, by batch size."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import UnavailableError
from mllm.models.compilation import allow_graphs, repeated_layers
from mllm.types import VisionFeatures

MAX_BATCH = 32
"""Above this many images the GPU is busy for longer than the CPU needs to launch the kernels."""
_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, MAX_BATCH)
"""At most a quarter of a batch is padding."""


class EncoderGraphs:
    """CUDA graphs of an encoder bank: each encoder has its own, so that routed experts run on their images alone.

    ``install()`` puts them in front of the encoders' ``forward``: hooks, weights and names stay as they are. A batch is
    padded to the next captured size; a larger one, stored codes in place of pixels, or a call that asks for attention maps
    or gives scenes, runs as before. So does an encoder that cannot be captured, or whose graph gives other features.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], max_images: int):
        """max_images: the most images that one step of the engine encodes."""
        self.encoders = with_weights(encoders)
        self.sizes = sizes_up_to(max_images)
        self.graphs: dict[str, dict[int, _Graph]] = {name: {} for name in self.encoders}

    def install(self, required: bool = True) -> dict[str, str]:
        """Capture every encoder at every size, on the device and in the dtype of its weights.

        required: an encoder that cannot be captured raises `UnavailableError`; else it runs as before. Returns those that
        do, each with the reason.
        """
        pool = torch.cuda.graph_pool_handle()
        left: dict[str, str] = {}
        for name, encoder in self.encoders.items():
            forward = encoder.forward
            reason = self._capture_all(name, forward, blank_pixels(encoder, self.sizes[-1]), pool)
            if reason is None:
                encoder.forward = partial(self._run, name, forward)
                continue
            self.graphs[name].clear()
            left[name] = reason
            if required:
                raise UnavailableError(f"encoder {name!r} {reason}; serve without cudagraph_mm_encoder")
        return left

    def _capture_all(self, name: str, forward: Any, pixels: Tensor, pool: Any) -> str | None:
        """Fill ``graphs[name]``; why not, where it cannot be done."""
        for size in reversed(self.sizes):  # the largest first: the others fit into its memory
            try:
                self.graphs[name][size] = _capture(forward, pixels[:size], pool)
            except Exception as error:  # whatever it is, the encoder can run as before
                return f"cannot be captured in a CUDA graph ({(str(error).splitlines() or [type(error).__name__])[0]})"
        noise = torch.randn_like(pixels)
        replayed, run = self.graphs[name][self.sizes[-1]](noise), forward(noise)
        pairs = [(replayed.tokens, run.tokens), (replayed.prefix, run.prefix)]
        if not all(one is None or repeats(one, other) for one, other in pairs):
            return "gives other features from a CUDA graph: what it does depends on the pixels"
        return None

    def _run(self, name: str, forward: Any, pixels: Tensor, **options: Any) -> VisionFeatures:
        count = len(pixels)
        has_options = any(value is not None and value is not False for value in options.values())
        captured = self.graphs[name]
        if (
            has_options
            or not 0 < count <= self.sizes[-1]
            or pixels.shape[1:] != captured[self.sizes[-1]].pixels.shape[1:]
            or not pixels.is_floating_point()
        ):
            return forward(pixels, **options)
        return captured[self.sizes[bisect_left(self.sizes, count)]](pixels)


class _Graph:
    """One captured batch size: where its pixels go and where its features come out."""

    def __init__(self, graph: Any, pixels: Tensor, features: VisionFeatures):
        self.graph, self.pixels, self.features = graph, pixels, features

    def __call__(self, pixels: Tensor) -> VisionFeatures:
        count = len(pixels)
        self.pixels[:count].copy_(pixels)
        self.graph.replay()
        prefix = self.features.prefix
        # Copies: the next replay writes over what this one gave.
        return replace(
            self.features,
            tokens=self.features.tokens[:count].clone(),
            prefix=None if prefix is None else prefix[:count].clone(),
        )


def _capture(forward: Any, pixels: Tensor, pool: Any) -> _Graph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward(pixels)  # libraries choose their kernels, and layers are compiled, before anything is recorded
        with _no_waiting():
            forward(pixels)
    torch.cuda.current_stream().wait_stream(side)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            features = forward(pixels)
    finally:
        torch.cuda.set_stream(stream)  # where a capture breaks off, PyTorch leaves its own in place
    return _Graph(graph, pixels, features)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Whatever makes the CPU wait for the GPU raises inside. A capture would break off there, and PyTorch then keeps the allocator, and
    the random generator in some versions, as if it went on: the engine's own sampling can fail much later."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # PyTorch says that it does not see every such operation
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def repeats(replayed: Tensor, run: Tensor) -> bool:
    """Whether a graph's features are those of the run itself, up to what kernels chosen anew may round."""
    run, replayed = run.float(), replayed.float()
    return bool((run - replayed).norm() <= 0.02 * run.norm())


def compile_encoders(encoders: Mapping[str, nn.Module]) -> int:
    """Compile the encoders' repeated layers in place, for any batch size; returns how many layers."""
    layers = [layer for encoder in encoders.values() for layer in repeated_layers(encoder)]
    allow_graphs(layers)
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


@torch.inference_mode()  # as requests run: tensors made outside it are another case for the compiler
def run_blank(encoders: Mapping[str, nn.Module], sizes: Iterable[int]) -> None:
    """Run every encoder that has weights on ``size`` blank images, for every size."""
    for encoder in with_weights(encoders).values():
        for size in sizes:
            encoder.forward(blank_pixels(encoder, size))  # past the hooks, which count images


def with_weights(encoders: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The encoders that have some; raw patches take no time."""
    return {name: encoder for name, encoder in encoders.items() if next(encoder.parameters(), None) is not None}


def blank_pixels(encoder: nn.Module, size: int) -> Tensor:
    """``(size, 3, H, W)`` zeros as an encoder takes them, on the device and in the dtype of its weights."""
    described: Any = encoder
    image = described.describe(described.config).image
    weight = next(encoder.parameters())
    return torch.zeros(size, 3, image.height, image.width, device=weight.device, dtype=weight.dtype)


def sizes_up_to(max_images: int) -> list[int]:
    """Batch sizes to capture where a step encodes at most ``max_images``."""
    top = max(1, min(max_images, MAX_BATCH))
    return [size for size in _SIZES if size < top] + [top]
