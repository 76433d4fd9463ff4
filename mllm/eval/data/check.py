"""Is every task's data there, before a model is loaded for the first of them?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mllm.errors import MllmError, UnavailableError
from mllm.eval.data.sources import find_sources, whereabouts
from mllm.eval.task import SourceSpec, TaskSpec, data_folder
from mllm.hub import hub_reason
from mllm.install import install_hint


def check_data(specs: Sequence[TaskSpec], data: Mapping[str, str | Path] | None = None) -> None:
    """Raises `UnavailableError` that names every task whose files are not there, which files it wants and where they
    come from. A hub dataset counts as there when its description can be had, from the hub or its local cache."""
    problems: dict[str, str] = {}
    hub: list[tuple[TaskSpec, SourceSpec]] = []
    for spec in specs:
        try:
            place = data_folder(spec, data)
            found = find_sources(spec, place)
        except MllmError as error:
            problems[spec.name] = str(error)
            continue
        if place is None:
            hub.append((spec, found[0].source))
    with ThreadPoolExecutor(8) as pool:
        for (spec, source), problem in zip(hub, pool.map(lambda pair: _unreachable(pair[1]), hub)):
            if problem is not None:
                problems[spec.name] = f"{spec.name}: {source.hub} could not be loaded ({problem}). {whereabouts(spec)}"
    if len(problems) == 1:
        raise UnavailableError(next(iter(problems.values())))
    if problems:
        lines = "\n".join(f"- {problems[spec.name]}" for spec in specs if spec.name in problems)
        raise UnavailableError(f"the data of {len(problems)} of {len(specs)} tasks is not there\n{lines}")


def _unreachable(source: SourceSpec) -> str | None:
    """Why a hub dataset cannot be had; None when it can."""
    try:
        import datasets
    except ImportError:
        return f"reading from the hub needs datasets: {install_hint('eval')}"
    try:
        datasets.load_dataset_builder(str(source.hub), (source.configs or [None])[0], revision=source.revision)
    except Exception as error:
        return hub_reason(error, source.hub)
    return None
