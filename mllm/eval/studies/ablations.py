"""How do several checkpoints fare without an encoder, side by side, and what of it remains when a model is trained without it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.errors import ConfigError
from mllm.eval.report.statistics import holm
from mllm.eval.run import run_eval
from mllm.eval.settings import EvalSettings
from mllm.eval.studies.compare import TaskComparison, compare_predictions
from mllm.eval.studies.study import Study, Table, number, p_text, save_study, spread
from mllm.eval.task import expand_tasks

if TYPE_CHECKING:
    from mllm.eval.studies.ablate import Ablation


@dataclass(frozen=True)
class Control:
    """A model that was trained without an encoder. of: the checkpoint's name it is a control of."""

    of: str
    encoder: str
    checkpoint: str


def named_checkpoints(places: Sequence[str]) -> dict[str, str]:
    """``name=CKPT`` entries, or checkpoints called by their run (the folder above where that is ``final``). Raises `ConfigError` for
    two of one name."""
    found: dict[str, str] = {}
    for entry in places:
        name, separator, place = entry.partition("=")
        path = Path(place if separator else entry)
        title = name if separator else (path.parent.name if path.name == "final" else path.name)
        if title in found:
            raise ConfigError(f"two checkpoints are called {title!r} ({found[title]}, {path}); name them: name=CKPT")
        found[title] = str(path)
    return found


def read_controls(entries: Sequence[str], checkpoints: Mapping[str, str]) -> list[Control]:
    """``ENCODER=CKPT`` with one checkpoint, ``NAME:ENCODER=CKPT`` with several. Raises `ConfigError`."""
    controls = []
    for entry in entries:
        where, separator, checkpoint = entry.partition("=")
        of, colon, encoder = where.rpartition(":")
        if not colon and len(checkpoints) == 1:
            of = next(iter(checkpoints))
        if not separator or not encoder or not checkpoint or of not in checkpoints:
            raise ConfigError(
                f"--control {entry}: expected NAME:ENCODER=CKPT with a NAME of {', '.join(checkpoints)} (ENCODER=CKPT where there is "
                "one checkpoint): a model that was trained without that encoder"
            )
        controls.append(Control(of, encoder, checkpoint))
    return controls


def run_ablations(
    checkpoints: Mapping[str, str],
    tasks: Sequence[str],
    output_dir: str | Path,
    *,
    controls: Sequence[Control] = (),
    **options: Any,
) -> Study:
    """Every checkpoint's ablation, then every control on the same samples; ``ablations.json`` and ``ablations.md`` go to
    ``output_dir``, predictions below it. options: those of `run_ablation`. Raises what it raises, and `ConfigError` for a control of
    an encoder that the checkpoint has not."""
    from mllm.eval.studies.ablation_report import ablate_checkpoint

    folder, seed = Path(output_dir), options.get("seed", 0)
    found: dict[str, Ablation] = {}
    for name, checkpoint in checkpoints.items():
        found[name] = ablate_checkpoint(checkpoint, tasks, folder / name, **options)
        known = {cost.encoder for cost in found[name].costs}
        if strange := [c.encoder for c in controls if c.of == name and c.encoder not in known]:
            raise ConfigError(
                f"--control {name}:{strange[0]}: not among the ablated encoders {', '.join(sorted(known))}"
            )
    kept = {key: options[key] for key in ("limit", "batch_size", "dtype", "device", "resume", "progress")}
    compared: dict[tuple[str, str], list[TaskComparison]] = {}
    for control in controls:
        place = folder / control.of / f"{control.encoder}-retrained"
        settings = EvalSettings(output_dir=place, data_dirs=options.get("data") or {}, **kept)
        run_eval(control.checkpoint, expand_tasks(tasks), settings)
        compared[control.of, control.encoder] = compare_predictions(folder / control.of / "intact", place, seed=seed)
    study = side_by_side(found, compared, controls)
    save_study(study, folder)
    return study


def side_by_side(
    found: Mapping[str, Ablation],
    compared: Mapping[tuple[str, str], Sequence[TaskComparison]],
    controls: Sequence[Control] = (),
) -> Study:
    """One table over all checkpoints: changes by encoder and way of masking, then those of controls trained without the encoder."""
    from mllm.eval.studies.ablate import WARNING

    changes = []
    for name, ablation in found.items():
        changes += [
            (name, e.encoder, f"masked: {e.mode}", e.task, e.metric, e.intact, e.masked, e.comparison) for e in ablation.effects
        ]  # fmt: skip
    for (name, encoder), entries in compared.items():
        changes += [
            (name, encoder, "retrained without", c.task, c.metric, c.value_a, c.value_b, c.comparison) for c in entries
        ]  # fmt: skip
    changes.sort(key=lambda row: (row[3], row[1], row[2] == "retrained without", row[2]))
    adjusted = holm([row[-1].p_value for row in changes])
    rows = [
        (
            task, encoder, way, name, metric.removesuffix(" v1"), number(intact), number(without), f"{c.difference:+.2f}",
            spread(c.low, c.high, sign=True), p_text(p), str(c.num_samples),
        )
        for (name, encoder, way, task, metric, intact, without, c), p in zip(changes, adjusted)
    ]  # fmt: skip
    headings = ("task", "encoder", "how", "checkpoint", "metric", "with", "without", "change", "95 %", "p (Holm)", "n")
    notes = [
        WARNING,
        "Change: without minus with on the same samples, with its 95 % interval; p after Holm over the whole table.",
    ]
    notes += [f"Control of {c.of} trained without {c.encoder}: {c.checkpoint}." for c in controls]
    if not controls:
        notes.append(
            "No control was trained without an encoder: --control NAME:ENCODER=CKPT puts one beside the masking."
        )
    data = {
        "checkpoints": {name: asdict(one) for name, one in found.items()},
        "controls": [asdict(c) for c in controls],
    }
    return Study(
        "ablations",
        "Encoders of several checkpoints",
        notes,
        [Table("Score without an encoder", headings, rows, 5)],
        data,
    )
