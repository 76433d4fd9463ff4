"""What does each routing score and cost? The router against every expert alone, all of them, none, and another model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mllm.train.stages.routing.report import RouteReport, markdown_table, write_card
from mllm.types import Request, Response

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.processing.processor import MllmProcessor


class WithOptions:
    """A generator that adds settings to every request, and measures the time spent answering (not loading pictures)."""

    def __init__(self, inner: Any, name: str, options: dict[str, Any]):
        self.inner, self.name, self.options = inner, name, options
        self.seconds, self.answers = 0.0, 0

    def fingerprint(self) -> str:
        return f"{self.inner.fingerprint()}|{self.name}"

    def generate(self, requests: Iterable[Request]) -> Iterator[Response]:
        waited = 0.0

        def each_request() -> Iterator[Request]:
            nonlocal waited
            stream = iter(requests)
            while True:
                start = time.perf_counter()
                request = next(stream, None)
                waited += time.perf_counter() - start
                if request is None:
                    return
                yield replace(request, options={**request.options, **self.options})

        answers = self.inner.generate(each_request())
        while True:
            start, before = time.perf_counter(), waited
            response = next(answers, None)
            self.seconds += time.perf_counter() - start - (waited - before)
            if response is None:
                return
            self.answers += 1
            yield response


@dataclass(frozen=True)
class Scored:
    """One way of running a model. scores: task → 0 to 100; experts: run per picture; gflops: vision part, per picture."""

    name: str
    scores: dict[str, float]
    experts: float
    gflops: float
    milliseconds: float

    @property
    def mean(self) -> float:
        """Over the tasks."""
        return sum(self.scores.values()) / len(self.scores)


def score_routings(
    model: MllmForConditionalGeneration,
    processor: MllmProcessor,
    tasks: Sequence[str],
    folder: Path,
    *,
    report: RouteReport,
    limit: int | None,
    batch_size: int,
    baseline: str | None,
    card: Path | None,
    dtype: str,
    device: str | None,
) -> list[dict[str, Any]]:
    """Evaluate the tasks once per way of running; prints a table, and puts it into the model card."""
    from mllm.eval.checkpoint import load_model
    from mllm.eval.generators.hf import HFGenerator
    from mllm.train.observe.flops import flop_model

    inner = HFGenerator(model, processor, batch_size=batch_size, name="hf")
    bank = model.model.vision_tower
    free = {"tokenizer": processor.tokenizer} if bank.router.asks_language_model else {}
    ways: list[tuple[str, dict[str, Any]]] = [("routed", free), ("all experts", {"experts": list(bank.experts)})]
    ways += [(f"{name} alone", {"experts": [name]}) for name in bank.experts]
    if len(bank.experts) > 2:
        ways += [
            (f"all but {name}", {"experts": [other for other in bank.experts if other != name]})
            for name in bank.experts
        ]
    ways.append(("no expert", {"experts": []}))
    results = []
    for name, options in ways:
        bank.num_encoded.clear()
        scores, seconds, answers = _evaluate(inner, name, options, tasks, folder, limit)
        pictures = max(bank.num_encoded[bank.always_on[0]] if bank.always_on else answers, 1)
        run = {expert: bank.num_encoded[expert] / pictures for expert in bank.experts}
        vision = report.cost.of(report.always, ()) + sum(run[e] * report.cost.encoders[e] for e in bank.experts)
        results.append(Scored(name, scores, sum(run.values()), vision / 1e9, 1000 * seconds / max(answers, 1)))
    if baseline is not None:
        other, reader = load_model(baseline, dtype=dtype, device=device)
        generator = HFGenerator(other, reader, batch_size=batch_size, name="baseline")
        scores, seconds, answers = _evaluate(generator, "single encoder", {}, tasks, folder, limit)
        flops = flop_model(other, ())
        vision = flops.connector + sum(flops.encoders.values())
        results.append(Scored("single encoder", scores, 0.0, vision / 1e9, 1000 * seconds / max(answers, 1)))
    Console().print(_table(results))
    if card is not None:
        write_card(card, card_text(report, results))
    return [{**vars(result), "mean": result.mean} for result in results]


def _evaluate(
    inner: Any, name: str, options: dict[str, Any], tasks: Sequence[str], folder: Path, limit: int | None
) -> tuple[dict[str, float], float, int]:
    from mllm.eval.run import evaluate

    generator = WithOptions(inner, name, options)
    found = evaluate(generator, tasks, folder / name.replace(" ", "_"), limit=limit, resume=False, thumbnails=0)
    return {task: 100 * result.score for task, result in found.items()}, generator.seconds, generator.answers


_HEADS = ("mean", "experts per picture", "vision GFLOP per picture", "ms per sample")


def _cells(result: Scored) -> list[str]:
    scores = [f"{score:.1f}" for score in result.scores.values()]
    return [
        result.name,
        *scores,
        f"{result.mean:.1f}",
        f"{result.experts:.2f}",
        f"{result.gflops:.3g}",
        f"{result.milliseconds:.1f}",
    ]


def _table(results: Sequence[Scored]) -> Table:
    table = Table(title="scores and costs", title_justify="left")
    for index, head in enumerate(["", *results[0].scores, *_HEADS]):
        table.add_column(head, justify="left" if index == 0 else "right")
    for result in results:
        table.add_row(*_cells(result))
    return table


def card_text(report: RouteReport, results: Sequence[Scored]) -> str:
    """The model card's section: what is routed, what is chosen, score against cost."""
    whole = report.summary(report.rows)
    chosen = ", ".join(f"{name} {share:.0%}" for name, share in whole["use"].items())
    lines = [
        "## Routing",
        f"Always on: {', '.join(report.always) or 'nothing'}. Experts: {', '.join(report.pool)}. On {whole['samples']} samples the router "
        f"runs {whole['experts_per_sample']:.2f} experts per sample ({chosen}) and saves {whole['saved']:.0%} of the vision part's "
        "operations against running all.",
        "",
        markdown_table(["", *results[0].scores, *_HEADS], [_cells(result) for result in results]),
    ]
    return "\n".join(lines)
