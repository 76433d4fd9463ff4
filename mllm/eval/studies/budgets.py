"""How does a model's score fall with the visual tokens that a picture may take?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mllm.errors import ConfigError, DataError
from mllm.eval.data.loading import TaskData, load_data
from mllm.eval.data.pictures import Picture
from mllm.eval.generators.hf import HFGenerator, processor_hash, weights_hash
from mllm.eval.run import evaluate_data
from mllm.eval.studies.study import Study, Table, number, save_study, spread
from mllm.eval.task import TaskSpec, load_tasks
from mllm.models.budgets import at_tokens, most_tokens, what_gives_way

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.processing.processor import MllmProcessor


def run_budgets(
    model: MllmForConditionalGeneration,
    processor: MllmProcessor,
    tasks: Sequence[str | TaskSpec],
    folder: str | Path,
    *,
    tokens: Sequence[int] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    data: Mapping[str, str | Path] | None = None,
    resume: bool = True,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Study:
    """Ask every question at each budget, by one model whose weights stay as they are. Answers lie in ``<folder>/budgets/<tokens>/`` and
    are kept on a second call; ``budgets.json`` and ``budgets.md`` in ``folder``, from where a model card takes its table.

    tokens: most visual tokens of a picture, each; default: all that it takes, a half, a quarter and an eighth. Raises `ConfigError` for a
    model that gives one number only, and for a budget that no choice of the model's meets.
    """
    way, most = what_gives_way(model.config), most_tokens(model.config)
    budgets = sorted(set(tokens or [max(most // part, 1) for part in (1, 2, 4, 8)]), reverse=True)
    if budgets[-1] < 1:
        raise ConfigError(f"tokens: {budgets[-1]}: expected at least 1")
    for budget in budgets:  # one that cannot be met is found before anything is asked
        with at_tokens(model, processor, budget):
            pass
    tell, weights, rows, details = say or (lambda text: None), weights_hash(model), [], []
    for spec in load_tasks(tasks):
        loaded = load_data(spec, data=data, limit=limit)
        for number_, budget in enumerate(budgets, 1):
            tell(f"[{number_}/{len(budgets)}] {spec.name}: at most {budget} visual tokens a picture")
            with at_tokens(model, processor, budget) as largest:
                key = f"{weights}:{processor_hash(processor)}:{budget}"
                generator = HFGenerator(model, processor, batch_size=batch_size, model_hash=key)
                place = Path(folder) / "budgets" / str(budget)
                result = evaluate_data(generator, loaded, place, resume=resume, progress=progress)
                mean = _mean_tokens(processor, loaded)
            score = result.metrics[0]
            sure = spread(score.low, score.high)
            rows.append((
                spec.name, f"{budget}", number(mean, 1), f"{largest}", number(score.value), sure, str(score.num_scored)
            ))  # fmt: skip
            details.append({"task": spec.name, "budget": budget, "tokens": mean, "most": largest, "rule": score.label,
                            "score": score.value, "low": score.low, "high": score.high, "num_samples": score.num_scored})  # fmt: skip
    notes = [
        f"One checkpoint, its weights as they are; what changes: {way}. "
        "What it was trained at decides how it reads at the others: a dataset's `visual_tokens` trains at several.",
        "Tokens: visual tokens of a question's pictures, the mean over this benchmark; most: of the picture that takes most.",
    ]
    headings = ("task", "budget", "tokens", "most", "score", "95 %", "n")
    study = Study(
        "budgets", "Score against visual tokens", notes, [Table("Budgets", headings, rows)], {"budgets": details}
    )
    save_study(study, folder)
    return study


def _mean_tokens(processor: MllmProcessor, data: TaskData) -> float:
    """Visual tokens of a question's pictures; of those that can be read, and NaN for a task of videos."""
    counts = []
    for item in data.items:
        with suppress(DataError):  # unusable rows are named where they are asked
            pictures = [p for p in item.pictures if isinstance(p, Picture)]
            if len(pictures) == len(item.pictures):
                layouts = processor.image_layouts([p.read() for p in pictures], where=item.id)
                counts.append(sum(layout.num_tokens for layout in layouts))
    return sum(counts) / len(counts) if counts else float("nan")
