"""Which experts help on a sample? The file of measured losses, and the labels that follow from it.

One jsonl file per dataset: a header (data, its fingerprint, experts, margin, top_k), then one line per row with the loss without
and with each expert. MoVA (arXiv 2404.13046) labels its routing data by the same comparison; its labels and code are not public.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mllm.config import StrictModel
from mllm.data.lookup import load_mixture
from mllm.data.mixture import Mixture
from mllm.data.sources import Source, open_source
from mllm.data.spec import SOURCES, DatasetSpec
from mllm.errors import ConfigError, DataError
from mllm.processing.images import image_hash
from mllm.types import Sample

FORMAT = "routing_labels"
NONE = "none"
"""Key of the loss without any expert."""


class LabelRule(StrictModel):
    """How losses become labels."""

    targets: Literal["hard", "soft"] = "hard"
    """hard: the helpful experts, sharing the weight equally. soft: ``softmax(-loss / temperature)`` over all experts."""
    margin: float = Field(default=0.05, ge=0)
    """An expert helps when it lowers the loss (nats per learned token) by more than this."""
    top_k: int | None = Field(default=None, ge=1)
    """Most experts in a label; default: the router's own ``top_k``."""
    temperature: float = Field(default=0.2, gt=0)


def helpful_experts(losses: Mapping[str, float], *, margin: float, top_k: int) -> list[str]:
    """Experts whose loss is more than ``margin`` below the one without any, best first, at most ``top_k``."""
    limit = losses[NONE] - margin
    better = sorted((loss, name) for name, loss in losses.items() if name != NONE and loss < limit)
    return [name for _, name in better[:top_k]]


def target_weights(losses: Mapping[str, float], experts: Sequence[str], rule: LabelRule, top_k: int) -> list[float]:
    """What a gate learns for one row, over ``experts``, sum 1. Where no expert helps: all alike, so that a threshold above 1 / E
    runs none."""
    helpful = helpful_experts(losses, margin=rule.margin, top_k=top_k)
    if not helpful:
        return [1 / len(experts)] * len(experts)
    if rule.targets == "hard":
        return [1 / len(helpful) if name in helpful else 0.0 for name in experts]
    best = min(losses[name] for name in experts)
    shares = [math.exp(-(losses[name] - best) / rule.temperature) for name in experts]
    return [share / sum(shares) for share in shares]


def labels_path(source: Source) -> Path:
    """Where a dataset's labels lie: beside its file, else in ``runs/routing``."""
    path = getattr(source, "path", None) or getattr(source, "_path", None)
    if isinstance(path, Path) and path.is_file():
        return path.with_name(f"{path.name}.routing.jsonl")
    return Path("runs/routing") / f"{source.name}.routing.jsonl"


def content_of(sample: Sample) -> str:
    """A hash of what a sample says and shows: what its losses are of. Raises `DataError` for a picture that cannot be read."""
    digest = hashlib.sha256(json.dumps([asdict(turn) for turn in sample.turns], sort_keys=True, default=str).encode())
    for position, image in enumerate(sample.images):
        digest.update(image_hash(image, where=f"sample {sample.id!r} of {sample.dataset}, image {position}").encode())
    return digest.hexdigest()[:16]


class LabelFile:
    """A label file, read. rows: row number → its line."""

    def __init__(self, path: Path):
        self.path = path
        self.header, self.rows = read_lines(path)
        if self.header is None:
            raise DataError(
                f"{path}: not a file of routing labels (its first line is no header); make it with mllm route label"
            )

    @property
    def experts(self) -> list[str]:
        return list(self.header["experts"])  # type: ignore[index]

    def check(self, source: Source, experts: Sequence[str]) -> None:
        """Raises `DataError` when the labels belong to other data or other experts."""
        header: dict[str, Any] = self.header  # type: ignore[assignment]
        if header["fingerprint"] != source.fingerprint:
            raise DataError(
                f"{self.path} was made for another version of {source.name}; delete it and run mllm route label again"
            )
        if list(experts) != self.experts:
            raise DataError(
                f"{self.path} holds losses of the experts {', '.join(self.experts)}, the model has {', '.join(experts)}; delete it and "
                "run mllm route label again"
            )


def read_lines(path: Path) -> tuple[dict[str, Any] | None, dict[int, dict[str, Any]]]:
    """(header, row number → line) of a label file; a last line cut short by a kill is left out."""
    header: dict[str, Any] | None = None
    rows: dict[int, dict[str, Any]] = {}
    if not path.is_file():
        return None, {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if number == 0:
            header = entry if isinstance(entry, dict) and "experts" in entry and "row" not in entry else None
        elif isinstance(entry, dict) and "row" in entry:
            rows[int(entry["row"])] = entry
    return header, rows


@SOURCES.register(FORMAT)
class LabelledSource(Source):
    """The rows of a dataset that have routing losses; ``path`` is the label file, whose header declares the dataset itself.

    ``meta["routing"]`` holds a row's losses, ``meta["experts"]`` the experts that help: a supervised stage (``data: {format:
    routing_labels, path: …}``) then runs those, whatever the router says.
    """

    def __init__(self, spec: DatasetSpec):
        super().__init__(spec)
        assert spec.path is not None
        self.labels = LabelFile(Path(spec.path))
        header: dict[str, Any] = self.labels.header  # type: ignore[assignment]
        self.inner = open_source(DatasetSpec.model_validate(header["dataset"]))
        self.labels.check(self.inner, self.labels.experts)
        self._rows = sorted(row for row, entry in self.labels.rows.items() if entry.get("losses") is not None)
        if not self._rows:
            raise DataError(f"{self.labels.path}: no row has routing losses")

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.labels.path.read_bytes()).hexdigest()[:16]

    def sample(self, index: int) -> Sample:
        row = self._rows[index]
        sample = self.inner[row]
        entry = self.labels.rows[row]
        if entry.get("content") is not None and content_of(sample) != entry["content"]:
            raise DataError(
                f"{self.labels.path}, row {row}: the text or a picture of sample {sample.id!r} is not the one its routing losses "
                "were measured on; run mllm route label again"
            )
        sample.meta = {**sample.meta, "routing": entry["losses"]}
        if entry.get("experts") is not None:
            sample.meta["experts"] = entry["experts"]
        return sample


def labelled(data: Any, folder: Path | None = None) -> dict[str, Any]:
    """A stage's ``data`` with every dataset replaced by its labelled rows, as plain data. folder: where the label files are,
    named by dataset; None: beside the data. Raises `ConfigError` for one that has none."""
    mixture = load_mixture(data)
    items = []
    for item in mixture.datasets:
        spec = item.dataset
        assert isinstance(spec, DatasetSpec)
        path = folder / f"{spec.name}.jsonl" if folder is not None else labels_path(open_source(spec))
        if not path.is_file():
            raise ConfigError(
                f"dataset {spec.name}: no routing labels at {path}; run mllm route label <checkpoint> {spec.name} first"
            )
        new = DatasetSpec(
            name=spec.name, format=FORMAT, path=str(path), licence=spec.licence, commercial=spec.commercial
        )
        items.append(item.model_copy(update={"dataset": new}))
    return mixture.model_copy(update={"datasets": items}).model_dump(mode="json")


def open_sources(data: Any) -> list[tuple[Source, int]]:
    """The datasets that ``data`` means, each with the number of its first rows to use."""
    mixture = Mixture(data, shuffle=False)
    return list(zip(mixture.sources, mixture.num_rows))
