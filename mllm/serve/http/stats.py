"""How long did each encoder run, on how many images, and which experts looked at a picture? What vLLM itself does not tell of our
models."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from mllm.types import Routing


class EncoderClock:
    """Counts images and time of every encoder and the connector, by hooks; on CUDA with events, so nothing waits.

    An expert's image count is how often the routing chose it.
    """

    def __init__(self) -> None:
        self.images: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._open: dict[str, Any] = {}
        self._pending: list[tuple[str, Any, Any]] = []

    def watch(self, name: str, module: nn.Module) -> None:
        """Measure a module whose first argument is a batch of images, or their features by encoder."""
        self.images[name], self.seconds[name] = 0, 0.0

        def before(_: nn.Module, args: tuple) -> None:
            self._open[name] = _now()

        def after(_: nn.Module, args: tuple, output: Any) -> None:
            started = self._open.pop(name, None)
            if started is None:
                return
            self.images[name] += _images_of(args)
            if isinstance(started, float):
                self.seconds[name] += time.perf_counter() - started
                return
            self._pending.append((name, started, _now()))
            if len(self._pending) > 1000:
                self._settle(wait=False)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def read(self) -> dict[str, dict[str, float]]:
        """Part → images and seconds since the start."""
        self._settle(wait=True)
        return {name: {"images": self.images[name], "seconds": round(self.seconds[name], 4)} for name in self.images}

    def _settle(self, *, wait: bool) -> None:
        kept = []
        for name, started, ended in self._pending:
            if wait:
                ended.synchronize()
            if ended.query():
                self.seconds[name] += started.elapsed_time(ended) / 1000
            else:
                kept.append((name, started, ended))
        self._pending = kept


class Choices:
    """Which experts a router inside the engine chose for a picture: the newest ``size``, by `picture_key`."""

    def __init__(self, size: int = 4096):
        self.size = size
        self._chosen: OrderedDict[int, list[str]] = OrderedDict()

    def keep(self, keys: list[int], routing: Routing) -> None:
        """Remember the routing ``(B, E)`` of B pictures; a key of 0 is of none."""
        for key, row in zip(keys, routing.weights.ne(0).tolist(), strict=True):
            if key:
                self._chosen[key] = [name for name, runs in zip(routing.experts, row) if runs]
                self._chosen.move_to_end(key)
        while len(self._chosen) > self.size:
            self._chosen.popitem(last=False)

    def of(self, keys: list[int]) -> dict[int, list[str]]:
        """Those of these pictures that are known."""
        return {key: self._chosen[key] for key in keys if key in self._chosen}


def picture_key(file: bytes, question: str, adapter: int = 0) -> int:
    """A number for a picture's file, what was asked about it (`mllm.processing.questions.question_text`) and the visual adapter that looks
    at it; never 0."""
    digest = hashlib.blake2b(file, digest_size=32, salt=str(adapter).encode() if adapter else b"").digest()
    number = hashlib.blake2b(question.encode("utf-8", "replace"), key=digest, digest_size=8).digest()
    return int.from_bytes(number, "big", signed=True) or 1


class VisualStatistics:
    """Extension of vLLM's worker (``--worker-extension-cls``): answers ``collective_rpc("visual_statistics")``,
    ``collective_rpc("chosen_experts", args=(keys,))`` and ``collective_rpc("head_answers", args=(request,))``."""

    def visual_statistics(self) -> dict[str, dict[str, float]]:
        """Part → images and seconds; empty for a model without a clock."""
        clock = getattr(self.get_model(), "clock", None)  # type: ignore[attr-defined]
        return clock.read() if clock is not None else {}

    def chosen_experts(self, keys: list[int]) -> list[list[Any]]:
        """``[key, experts]`` of the pictures that are known here."""
        choices = getattr(self.get_model(), "choices", None)  # type: ignore[attr-defined]
        return [list(pair) for pair in choices.of(keys).items()] if choices is not None else []

    def head_answers(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """What the model's heads say of one answer (`HeadsInEngine.answer`); None where it was not written here."""
        model = self.get_model()  # type: ignore[attr-defined]
        heads = getattr(model, "heads_in_engine", None)
        folder = self.model_config.model  # type: ignore[attr-defined]
        return None if heads is None else heads.answer(model, folder, request)

    def add_visual_adapter(self, number: int, folder: str) -> None:
        """Read an adapter's weights on encoders and connector."""
        self.get_model().add_adapter(number, folder)  # type: ignore[attr-defined]

    def remove_visual_adapter(self, number: int) -> None:
        """Forget them."""
        self.get_model().remove_adapter(number)  # type: ignore[attr-defined]


async def read_statistics(client: Any, *, timeout: float = 10.0) -> list[dict[str, dict[str, float]]]:
    """`VisualStatistics` of every worker of every engine. client: vLLM's ``AsyncLLM``."""
    return await ask_workers(client, "visual_statistics", timeout)


async def read_choices(client: Any, keys: list[int], *, timeout: float = 2.0) -> list[list[str]] | None:
    """Which experts looked at each picture; None where that is not known of all. client: vLLM's ``AsyncLLM``."""
    known = {
        key: chosen
        for worker in await ask_workers(client, "chosen_experts", timeout, (keys,))
        for key, chosen in worker
    }
    return [known[key] for key in keys] if all(key in known for key in keys) else None


async def read_heads(client: Any, request: dict[str, Any], *, timeout: float = 60.0) -> dict[str, Any] | None:
    """What the heads say of an answer, of the worker that wrote it; None where none knows it. client: vLLM's ``AsyncLLM``."""
    found = await ask_workers(client, "head_answers", timeout, (request,))
    return next((one for one in found if one is not None), None)


async def ask_workers(client: Any, method: str, timeout: float, args: tuple = ()) -> list[Any]:
    """What a method of `VisualStatistics` gives on every worker of every engine. client: vLLM's ``AsyncLLM``."""
    core: Any = getattr(client, "engine_core", None)
    engines = list(getattr(core, "core_engines", ()))
    if len(engines) < 2 or not hasattr(core, "_call_utility_async"):
        return await client.collective_rpc(method, timeout=timeout, args=args)
    # Of data-parallel engines vLLM's own call asks all and hands on the first one's answer.
    call = ("collective_rpc", method, timeout, args, None)
    answers = await asyncio.gather(*(core._call_utility_async(*call, engine=engine) for engine in engines))
    return [worker for workers in answers for worker in workers]


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _images_of(args: tuple) -> int:
    """How many images a call is about: an encoder gets their pixels, the connector ``(features, routing, text, layouts)``."""
    first = args[0]
    if not isinstance(first, dict):
        return len(first)
    layouts = args[3] if len(args) > 3 else None
    return len(next(iter(first.values())).tokens) if layouts is None else len(layouts)
