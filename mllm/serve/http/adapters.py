"""Which adapters answer under which model names, and how does one come and go while the server runs?"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from mllm.errors import ConfigError
from mllm.serve.adapters import BESIDE_HEADS, read_adapter
from mllm.serve.http.errors import Refused
from mllm.serve.http.stats import ask_workers

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_SECONDS = 120.0
"""For every worker to read an adapter."""


class ServedAdapters:
    """Adapters by name. Each has a number that no other load has: by it the engine knows the visual ones, and the beginnings of prompts are
    cached under it, since vLLM's own cache would mistake an adapter for an earlier one of its name.

    names: of those that are there from the start, in the order of their numbers (from 1); visual: numbers of those that change
    encoders or the connector; heads: whether heads answer too, which look through the encoders without an adapter.
    """

    def __init__(self, names: list[str], visual: Mapping[str, int], *, heads: bool = False):
        self._heads = heads
        self._numbers = {name: number for number, name in enumerate(names, start=1)}
        self._visual = set(visual.values())
        self._next = len(names) + 1
        self._running: Counter[int] = Counter()
        self._former: set[str] = set()

    def number(self, model: object) -> int:
        """Of the adapter that answers as ``model``; 0 for the model itself."""
        return self._numbers.get(model, 0) if isinstance(model, str) else 0

    def visual(self, model: object) -> int:
        """`number`, where the adapter changes encoders or the connector; else 0."""
        number = self.number(model)
        return number if number in self._visual else 0

    def was_another(self, model: object) -> bool:
        """Whether an adapter has the name of an earlier one, whose beginnings of prompts may still be cached under it."""
        return self.number(model) > 0 and model in self._former

    @contextmanager
    def used(self, number: int) -> Iterator[None]:
        """A request runs that needs an adapter."""
        self._running[number] += 1
        try:
            yield
        finally:
            self._running[number] -= 1

    async def load(self, data: Mapping[str, Any], engine: Any, hand_on: Callable[[], Awaitable[int]]) -> None:
        """Let vLLM load the adapter of an operator's request (``hand_on``, which gives the answer's status), and its visual part
        ourselves. Raises `Refused` for one that would be applied in part only."""
        folder, name = data.get("lora_path"), data.get("lora_name")
        if not isinstance(folder, str) or not isinstance(name, str):
            await hand_on()  # vLLM says what is missing
            return
        try:
            adapter = await asyncio.to_thread(read_adapter, folder)
        except ConfigError as error:
            raise Refused(400, str(error)[:400]) from None
        if adapter.visual and self._heads:
            raise Refused(400, f"{folder}: {BESIDE_HEADS}")
        number, self._next = self._next, self._next + 1
        if adapter.visual:
            await self._read(engine(), number, folder)
            self._visual.add(number)
        before = self._numbers.get(name)
        if before is not None:
            self._former.add(name)
        if await hand_on() != 200:
            await self._forget(engine, number)
            return
        self._numbers[name] = number
        if before is not None:
            await self._forget(engine, before)

    async def unload(self, data: Mapping[str, Any], engine: Any, hand_on: Callable[[], Awaitable[int]]) -> None:
        """Let vLLM unload an adapter, and forget its visual part."""
        name = data.get("lora_name")
        if await hand_on() == 200 and isinstance(name, str):
            self._former.add(name)
            await self._forget(engine, self._numbers.pop(name, 0))

    async def _read(self, engine: Any, number: int, folder: str) -> None:
        try:
            await ask_workers(engine, "add_visual_adapter", _SECONDS, (number, folder))
        except Exception as error:
            raise Refused(
                400, f"{folder}: its weights on encoders or connector cannot be used ({error})"[:400]
            ) from None

    async def _forget(self, engine: Any, number: int) -> None:
        """Once nobody asks for it any more: a request that runs keeps its adapter."""
        if number not in self._visual:
            return
        while self._running[number]:
            await asyncio.sleep(0.05)
        self._visual.discard(number)
        await ask_workers(engine(), "remove_visual_adapter", _SECONDS, (number,))
