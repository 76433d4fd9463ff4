"""What does a router choose, on which data, does it agree with the labels, and what does that save?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from mllm.data.routing_labels import LabelFile, labels_path
from mllm.data.sources import Source
from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.models.routing import ask_gate, ask_language_model, limit_routing, routing_records
from mllm.processing.chat import routing_inputs
from mllm.processing.protocol import Processor
from mllm.processing.questions import pad_questions
from mllm.train.observe.flops import flop_model
from mllm.train.stages.routing.stage import base_pixels
from mllm.types import Routing

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

KIND_KEYS = ("kind", "category", "question_type", "type")


@dataclass(frozen=True)
class RoutedRow:
    """One sample's routing. probabilities: mean over its pictures; experts: those that would run; label: what its losses say,
    None without labels."""

    dataset: str
    kind: str
    id: str
    probabilities: dict[str, float]
    experts: tuple[str, ...]
    label: tuple[str, ...] | None = None


@dataclass
class Cost:
    """Operations of one picture through the vision part, in FLOPs."""

    encoders: dict[str, float]
    connector: float

    def of(self, always: Sequence[str], experts: Sequence[str]) -> float:
        """With these experts."""
        return self.connector + sum(self.encoders[name] for name in (*always, *experts))


@dataclass
class RouteReport:
    """Rows of one or several datasets, and what they add up to."""

    pool: tuple[str, ...]
    always: tuple[str, ...]
    cost: Cost
    rows: list[RoutedRow] = field(default_factory=list)
    num_unusable: int = 0

    def groups(self) -> dict[tuple[str, str], list[RoutedRow]]:
        """Rows by dataset and kind, each dataset's total (kind ``""``) first."""
        found: dict[tuple[str, str], list[RoutedRow]] = defaultdict(list)
        for row in self.rows:
            found[row.dataset, ""].append(row)
            if row.kind:
                found[row.dataset, row.kind].append(row)
        return dict(sorted(found.items()))

    def summary(self, rows: Sequence[RoutedRow]) -> dict[str, Any]:
        """Share of the samples by expert, experts per sample, agreement with labels, and cost against running all experts."""
        count = max(len(rows), 1)
        used = Counter(name for row in rows for name in row.experts)
        everything = self.cost.of(self.always, self.pool)
        spent = sum(self.cost.of(self.always, row.experts) for row in rows) / count
        judged = [row for row in rows if row.label is not None]
        helped = [row for row in judged if row.label]
        return {
            "samples": len(rows),
            "use": {name: used[name] / count for name in self.pool},
            "none": sum(not row.experts for row in rows) / count,
            "experts_per_sample": sum(used.values()) / count,
            "probability": {name: sum(row.probabilities[name] for row in rows) / count for name in self.pool},
            "labelled": len(judged),
            "agreement": sum(set(row.experts) == set(row.label or ()) for row in judged) / len(judged)
            if judged
            else None,
            "right_expert": sum(bool(set(row.experts) & set(row.label or ())) for row in helped) / len(helped)
            if helped
            else None,
            "gflops": spent / 1e9,
            "gflops_all": everything / 1e9,
            "saved": 1 - spent / everything if everything else 0.0,
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the whole, and every dataset and kind."""
        groups = [
            {"dataset": dataset, "kind": kind or None, **self.summary(rows)}
            for (dataset, kind), rows in self.groups().items()
        ]
        return {
            "experts": list(self.pool),
            "unusable": self.num_unusable,
            "total": self.summary(self.rows),
            "groups": groups,
        }

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title="routing", title_justify="left")
        heads = ["dataset", "kind", "samples", *self.pool, "none", "experts", "agrees", "right", "GFLOP", "saved"]
        for index, head in enumerate(heads):
            table.add_column(head, justify="left" if index < 2 else "right")
        for (dataset, kind), rows in [*self.groups().items(), (("all", ""), self.rows)]:
            table.add_row(dataset, kind, *self._cells(self.summary(rows)))
        return table

    def _cells(self, found: dict[str, Any]) -> list[str]:
        def share(value: float | None) -> str:
            return "-" if value is None else f"{value:.1%}"

        return [
            str(found["samples"]),
            *(share(found["use"][name]) for name in self.pool),
            share(found["none"]),
            f"{found['experts_per_sample']:.2f}",
            share(found["agreement"]),
            share(found["right_expert"]),
            f"{found['gflops']:.3g}",
            share(found["saved"]),
        ]


def routing_report(
    model: MllmForConditionalGeneration,
    processor: Processor,
    sources: Sequence[tuple[Source, int]],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    expert_budget: int | None = None,
    expert_threshold: float | None = None,
) -> RouteReport:
    """Route the samples of these datasets (with the number of rows to take of each) without running any expert. Labels beside
    the data are compared with."""
    bank = getattr(model.model, "vision_tower", None)
    if bank is None or not bank.experts:
        raise ConfigError("this model has no router: there is nothing to report; it always runs all its encoders")
    flops = flop_model(model, ())
    report = RouteReport(bank.experts, tuple(bank.always_on), Cost(flops.encoders, flops.connector))
    model.eval()
    for source, rows in sources:
        count, path = min(rows, limit or rows), labels_path(source)
        labels = LabelFile(path) if path.is_file() else None
        if labels is not None:
            labels.check(source, bank.experts)
        for start in range(0, count, batch_size):
            numbers = list(range(start, min(start + batch_size, count)))
            report.rows += _route_batch(
                model, processor, source, numbers, labels, report, expert_budget, expert_threshold
            )
    return report


def _route_batch(
    model: MllmForConditionalGeneration,
    processor: Processor,
    source: Source,
    numbers: list[int],
    labels: LabelFile | None,
    report: RouteReport,
    budget: int | None,
    threshold: float | None,
) -> Iterator[RoutedRow]:
    found = []
    for number in numbers:
        try:
            sample = source[number]
            if not sample.images:
                continue
            pixels = base_pixels(processor, sample.images, f"sample {sample.id!r} of {source.name}")
            found.append(
                (
                    number,
                    sample,
                    pixels,
                    routing_inputs(processor, sample.turns, len(sample.images))["router_input_ids"],
                )
            )
        except (DataError, AlignmentError):
            report.num_unusable += 1
    if not found:
        return
    device = next(model.parameters()).device
    parts = [processor.pixel_keys.by_encoder(part[2]) for part in found]
    pixels = {name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]}
    questions = pad_questions([[i for i in row if i >= 0] for part in found for row in part[3].tolist()]).to(device)
    routing = limit_routing(_ask(model, processor, pixels, questions), budget=budget, threshold=threshold)
    for (number, sample, _, _), record in zip(found, routing_records(routing, [len(part[1].images) for part in found])):
        assert record is not None
        entry = labels.rows.get(number) if labels is not None else None
        label = tuple(entry["experts"]) if entry is not None and entry.get("experts") is not None else None
        kind = next((str(sample.meta[key]) for key in KIND_KEYS if sample.meta.get(key) is not None), "")
        yield RoutedRow(source.name, kind, sample.id, record[0], tuple(record[1]), label)


@torch.no_grad()
def _ask(
    model: MllmForConditionalGeneration, processor: Processor, pixels: dict[str, torch.Tensor], questions: torch.Tensor
) -> Routing:
    bank = model.model.vision_tower
    if bank.router.asks_language_model:
        return ask_language_model(model, pixels, bank.encode_base(pixels), questions, processor.tokenizer)[0]
    return ask_gate(model, pixels, questions)


# Model card ----------------------------------------------------------------------------------------------------------

_BEGIN, _END = "<!-- routing: begin -->", "<!-- routing: end -->"


def write_card(folder: Path, text: str) -> Path:
    """Put Markdown into the model card (``README.md``) of a checkpoint, in the place of what stood there before; the rest of the
    card stays."""
    path = folder / "README.md"
    old = path.read_text(encoding="utf-8") if path.is_file() else f"# {folder.resolve().parent.name}\n"
    section = f"{_BEGIN}\n{text.strip()}\n{_END}"
    if _BEGIN in old and _END in old:
        before, _, rest = old.partition(_BEGIN)
        new = before + section + rest.partition(_END)[2]
    else:
        new = f"{old.rstrip()}\n\n{section}\n"
    path.write_text(new, encoding="utf-8")
    return path


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, others right."""
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
