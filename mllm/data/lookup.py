"""Which datasets does a name, a file or an inline mixture mean?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm import assets
from mllm.config import read_yaml, validate
from mllm.data.recognise import is_data, recognise
from mllm.data.shards.names import is_sharded
from mllm.data.spec import DatasetSpec, MixtureItem, MixtureSpec
from mllm.errors import ConfigError, UnknownName


def load_dataset(name: str) -> DatasetSpec:
    """A dataset by the name or path of its YAML, or data themselves (`mllm.data.recognise`). Raises `ConfigError` with the path
    to the key."""
    if _is_data(name):
        return recognise(name)
    path = assets.find("data/datasets", name, kind="dataset")
    data = read_yaml(path)
    if isinstance(data, dict):
        data.setdefault("name", path.stem)
    return validate(DatasetSpec, data, where=path.name)


def load_mixture(data: str | Mapping[str, Any] | list[Any] | MixtureSpec, *, where: str = "data") -> MixtureSpec:
    """A mixture from what a stage's ``data`` may be: a mixture's or dataset's name, data themselves (a file, a folder, a hub
    id), a list of these or of items, an inline mixture (``datasets: …``) or dataset (``format: …``).

    Every dataset in the result is a full `DatasetSpec`.
    """
    if isinstance(data, MixtureSpec):
        mixture = data
    elif isinstance(data, str):
        mixture = _named(data)
    elif isinstance(data, Mapping):
        if "datasets" in data:
            mixture = validate(MixtureSpec, data, where=where)
        elif "format" in data:
            mixture = MixtureSpec(datasets=[MixtureItem(dataset=validate(DatasetSpec, data, where=where))])
        elif "dataset" in data:
            mixture = MixtureSpec(datasets=[validate(MixtureItem, data, where=where)])
        else:
            raise ConfigError(
                f"{where}: expected datasets: [...] (a mixture) or format: … (a dataset), got keys {sorted(data)}"
            )
    elif isinstance(data, list):
        items = [{"dataset": item} if isinstance(item, str) else item for item in data]
        mixture = validate(MixtureSpec, {"datasets": items}, where=where)
    else:
        raise ConfigError(f"{where}: expected a name, a mapping or a list, got {type(data).__name__}")
    items = []
    for item in mixture.datasets:
        spec = load_dataset(item.dataset) if isinstance(item.dataset, str) else item.dataset
        items.append(
            item.model_copy(update={"dataset": spec if spec.name else spec.model_copy(update={"name": _stem(spec)})})
        )
    return mixture.model_copy(update={"datasets": items})


def _named(name: str) -> MixtureSpec:
    if name.endswith((".yaml", ".yml")):
        content = read_yaml(path := assets.find("data/mixtures", name, kind="mixture"))
        if isinstance(content, dict) and "datasets" in content:
            content.setdefault("name", path.stem)
            return validate(MixtureSpec, content, where=path.name)
        return MixtureSpec(name=path.stem, datasets=[MixtureItem(dataset=load_dataset(name))])
    mixtures, datasets = assets.available("data/mixtures"), assets.available("data/datasets")
    if name in mixtures:
        content = read_yaml(mixtures[name])
        if isinstance(content, dict):
            content.setdefault("name", name)
        return validate(MixtureSpec, content, where=mixtures[name].name)
    if name in datasets:
        return MixtureSpec(name=name, datasets=[MixtureItem(dataset=name)])
    if _is_data(name):
        return MixtureSpec(datasets=[MixtureItem(dataset=load_dataset(name))])
    raise UnknownName("mixture or dataset", name, [*mixtures, *datasets])


def _is_data(name: str) -> bool:
    if is_sharded(name) and not Path(name).is_dir() and not name.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"{name}: shards need a declaration, which says how they are read: {{format: llava, path: '{name}', rows: …}} (or format "
            "sharegpt, messages, columns)"
        )
    return name not in assets.available("data/datasets") and is_data(name)


def _stem(spec: DatasetSpec) -> str:
    return Path(spec.path).stem if spec.path else str(spec.hub).replace("/", "--")
