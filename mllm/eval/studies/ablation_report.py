"""How is an ablation of a checkpoint run from its folder, kept and shown?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError
from mllm.eval.studies.ablate import MODES, Ablation, Mode, ablate
from mllm.eval.studies.study import Study, Table, number, p_text, save_study, spread
from mllm.eval.task import expand_tasks

_WAYS = {
    "drop": "its features are zeros",
    "shuffle": "it sees another picture of the benchmark",
    "mean": "it gives its mean over the benchmark's pictures",
}


def run_ablation(
    checkpoint: str,
    tasks: Sequence[str],
    output_dir: str | Path,
    *,
    encoders: Sequence[str] | None = None,
    modes: Sequence[Mode] = MODES,
    limit: int | None = None,
    batch_size: int = 8,
    data: Mapping[str, str | Path] | None = None,
    seed: int = 0,
    dtype: str = "float32",
    device: str | None = None,
    resume: bool = True,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Study:
    """Ablate a checkpoint's encoders and experts; predictions go to ``output_dir/ablation/``, ``ablation.json`` and
    ``ablation.md`` to ``output_dir``. resume: keep the answers that stand there. Raises what `ablate` raises."""
    folder = Path(output_dir)
    found = ablate_checkpoint(
        checkpoint, tasks, folder / "ablation", encoders=encoders, modes=modes, limit=limit, batch_size=batch_size, data=data,
        seed=seed, dtype=dtype, device=device, resume=resume, progress=progress, say=say,
    )  # fmt: skip
    study = ablation_study(found)
    save_study(study, folder)
    return study


def ablate_checkpoint(
    checkpoint: str,
    tasks: Sequence[str],
    folder: Path,
    *,
    data: Mapping[str, str | Path] | None,
    dtype: str,
    device: str | None,
    **options: Any,
) -> Ablation:
    """`ablate` for a checkpoint's folder or hub id, with its tasks by name or suite."""
    from mllm.eval.checkpoint import load_model

    names = expand_tasks(tasks)
    if unknown := sorted(set(data or {}) - set(names)):
        raise ConfigError(f"data for {', '.join(unknown)}: not among the tasks {', '.join(names)}")
    model, processor = load_model(checkpoint, dtype=dtype, device=device)
    return ablate(model, processor, names, folder, data=data, **options)


def ablation_study(ablation: Ablation) -> Study:
    """The ablation as tables: score changes, costs, routing by category."""
    idle = [cost.encoder for cost in ablation.costs if not cost.share_of_images]
    modes = list(dict.fromkeys(effect.mode for effect in ablation.effects))
    notes = [ablation.warning, "Masked by: " + "; ".join(f"{mode}, {_WAYS[mode]}" for mode in modes) + "."]
    notes.append(
        "Change: masked minus intact on the same samples, with its 95 % interval; p after Holm over the whole table."
    )
    notes.append(
        "Effective rank: exp of the entropy of the normalised singular values of the features before the connector, "
        "at most the width."
    )
    if idle:
        notes.append(f"Never run on these samples, so masking changes nothing: {', '.join(idle)}.")
    effects = [
        (
            e.encoder, e.mode, e.task, e.metric.removesuffix(" v1"), number(e.intact), number(e.masked),
            f"{e.comparison.difference:+.2f}", spread(e.comparison.low, e.comparison.high, sign=True),
            p_text(e.adjusted), str(e.comparison.num_samples),
        )
        for e in ablation.effects
    ]  # fmt: skip
    costs = [
        (
            c.encoder, number(c.milliseconds), _few(c.gflops), number(c.effective_rank, 1), str(c.width),
            f"{100 * c.share_of_images:.0f} %",
        )
        for c in ablation.costs
    ]  # fmt: skip
    headings = ("encoder", "masked by", "task", "metric", "intact", "masked", "change", "95 %", "p (Holm)", "n")
    tables = [
        Table("Score without an encoder", headings, effects, 4),
        Table(
            "What an encoder costs and gives",
            ("encoder", "ms / image", "GFLOPs / image", "effective rank", "width", "runs on images"),
            costs,
        ),
    ]
    for task, categories in ablation.routing.items():
        if categories:
            experts = list(next(iter(categories.values())))
            rows = [(name, *(_bar(weights[x]) for x in experts)) for name, weights in sorted(categories.items())]
            caption = f"Routing on {task}: mean weight of each expert by category"
            tables.append(Table(caption, ("category", *experts), rows, 1 + len(experts)))
    return Study("ablation", "Encoder ablation", notes, tables, asdict(ablation))


def _few(value: float) -> str:
    """Three significant digits, without an exponent for what encoders cost."""
    return "–" if value != value else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _bar(weight: float) -> str:
    """A weight and its bar, ten cells for 1."""
    full = round(10 * min(max(weight, 0.0), 1.0))
    return f"{weight:.2f} {'█' * full}{'·' * (10 - full)}"
