"""Does an answer depend on the batch it was given in?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mllm.errors import ConfigError
from mllm.eval.asking import load_items
from mllm.eval.data.loading import TaskData, load_data
from mllm.eval.generators.base import Generator
from mllm.eval.task import TaskSpec, load_tasks
from mllm.types import Request


def check_batch(
    make_generator: Callable[[int], Generator],
    tasks: Sequence[str | TaskSpec],
    *,
    batch_sizes: Sequence[int] = (2, 5, 16),
    num_items: int = 16,
    data: Mapping[str, str | Path] | None = None,
) -> list[dict[str, Any]]:
    """Ask some items alone and in batches; one entry per differing answer: task, id, batch_size, alone, batched. An
    empty list is what to hope for. make_generator: batch size → generator."""
    differences: list[dict[str, Any]] = []
    for spec in load_tasks(tasks):
        loaded = load_data(spec, data=data, limit=num_items)
        alone = _plain_answers(make_generator(1), loaded)
        for size in batch_sizes:
            batched = _plain_answers(make_generator(size), loaded)
            differences.extend(
                {"task": spec.name, "id": name, "batch_size": size, "alone": text, "batched": batched[name]}
                for name, text in alone.items()
                if batched[name] != text
            )
    return differences


def _plain_answers(generator: Generator, data: TaskData) -> dict[str, str]:
    options = data.task.generation.options()

    def requests() -> Iterable[Request]:
        for loaded in load_items(data.items, None, whole=getattr(generator, "takes_video", False)):
            if loaded.unusable is None:
                yield Request(loaded.item.id, loaded.item.turns, loaded.images, dict(options))

    return {response.id: response.text if response.error is None else f"error: {response.error}"
            for response in generator.generate(requests())}  # fmt: skip


class BatchedGenerator(Generator, Protocol):
    """A generator that answers so many requests at once."""

    batch_size: int | None


def check_generator(
    model: BatchedGenerator, tasks: Sequence[str | TaskSpec], data: Mapping[str, str | Path] | None
) -> list[dict[str, Any]]:
    """`check_batch` of a generator that has a ``batch_size``. Raises `ConfigError` for one that has none."""
    before = getattr(model, "batch_size", None)
    if before is None:
        raise ConfigError(f"generator {model.name} has no batch size of its own; check_batch needs the hf generator")

    def sized(batch_size: int) -> Generator:
        model.batch_size = batch_size
        return model

    try:
        return check_batch(sized, tasks, data=data)
    finally:
        model.batch_size = before
