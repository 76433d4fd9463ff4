"""Which parts of a model are worth it: what do separately trained arms score on the same questions, and how sure is the difference?"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
from pydantic import Field, model_validator

from mllm import assets
from mllm.config import StrictModel, read_yaml, validate
from mllm.errors import ConfigError, DataError
from mllm.eval.metrics import build_metric
from mllm.eval.predictions import iterate_predictions, prediction_path
from mllm.eval.report.results import score_fields
from mllm.eval.report.statistics import Comparison, mean_estimate, paired_comparison
from mllm.eval.spool import Names
from mllm.eval.studies.study import Study, Table, number, p_text, spread
from mllm.eval.task import load_task

FLOORS = ("gray", "shuffled", "prior")
WHERE = ("all", "seen", "unseen")


class ArmSpec(StrictModel):
    """One way of building the model."""

    what: str
    seeds: list[int] = Field(default=[0], min_length=1)
    overrides: list[str] = Field(default_factory=list)
    """Changes to the recipe, ``key.sub=value``."""
    recipe: str | None = None
    """Its own recipe; default: the study's."""
    checkpoint: str | None = None
    """A model that is asked as it is: nothing is trained."""
    generator: str = "hf"
    """Who answers for it (`mllm eval run --generator`)."""
    blind: bool = False
    """Also asked with gray and with other questions' pictures (first seed)."""
    size: float | None = Field(default=None, gt=0)
    """Where it stands on the study's curve: a number of training questions, of steps."""

    @model_validator(mode="after")
    def _trained_or_not(self) -> ArmSpec:
        if self.checkpoint is not None and (self.recipe is not None or self.overrides):
            raise ValueError("checkpoint: a model that is asked as it is has neither recipe nor overrides")
        return self


class ExpectedSpec(StrictModel):
    """What was written down before anything was trained."""

    better: str
    than: str
    where: str = "all"
    within: float = Field(default=0.0, ge=0)
    """Points by which ``better`` may be worse and the expectation still come true: 1.0 says "costs at most a point"."""
    floor: float = Field(default=0.0, ge=0, le=100)
    """What guessing scores, in percent: of two arms that are both at or below it, nothing is told. What either arm scores without the right
    picture, where that is measured (`ArmSpec.blind`), counts too."""
    why: str = ""


class ArmsSpec(StrictModel):
    """A study of several arms: one recipe, changed; one task."""

    name: str
    description: str
    recipe: str
    task: str
    split_by: str | None = None
    """A value of the task's ``meta`` whose kinds are shown apart."""
    seen: list[str] = Field(default_factory=list)
    """Its kinds that were trained on; the others are ``unseen``."""
    size_is: str = "size"
    """What the arms' sizes are, below the curve."""
    arms: dict[str, ArmSpec] = Field(min_length=1)
    expected: list[ExpectedSpec] = Field(default_factory=list)

    @model_validator(mode="after")
    def _known(self) -> ArmsSpec:
        for entry in self.expected:
            if missing := {entry.better, entry.than} - set(self.arms):
                raise ValueError(f"expected: there is no arm {sorted(missing)[0]!r}; arms are {', '.join(self.arms)}")
            if entry.where not in WHERE:
                raise ValueError(f"expected.where is {entry.where!r}; one of {', '.join(WHERE)}")
        return self


class Labels:
    """A name of each of many questions, each different one kept once."""

    def __init__(self) -> None:
        self._codes, self._known = array("i"), dict[str, int]()

    def append(self, name: str) -> None:
        """The next question's."""
        self._codes.append(self._known.setdefault(name, len(self._known)))

    def reorder(self, order: np.ndarray) -> None:
        """Put the questions into another order."""
        self._codes = array("i", np.frombuffer(self._codes, dtype=np.int32)[order].tobytes())

    @property
    def codes(self) -> np.ndarray:
        """``(n,)``: equal where the names are."""
        return np.frombuffer(self._codes, dtype=np.int32)

    @property
    def names(self) -> list[str]:
        """The different ones."""
        return list(self._known)

    def are(self, name: str) -> np.ndarray:
        """``(n,)``: whose name this is."""
        return self.codes == self._known.get(name, -1)


@dataclass(frozen=True)
class Cost:
    """What one picture, or a clip of the most frames, costs an arm before the answer is written: visual tokens, 10⁹ operations forward of
    encoders and connector and of the language model over those tokens; millions of parameters; and the clip's frames (0: a picture)."""

    tokens: int
    vision: float
    language: float
    millions: float
    frames: int = 0


@dataclass(frozen=True)
class Answers:
    """One run's scored questions, in the order of their ids: 0 or 1, the cluster, the category, the kind it is split by. Some 50 bytes
    a question."""

    ids: Names
    values: np.ndarray
    clusters: Labels
    categories: Labels
    kinds: Labels


def load_arms(name: str) -> ArmsSpec:
    """A study by name or path. Raises `ConfigError` with the path to the key."""
    path = assets.find("eval/arms", name, kind="study of arms")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level")
    data.setdefault("name", path.stem)
    return validate(ArmsSpec, data, where=path.name)


def read_answers(spec: ArmsSpec, path: Path) -> Answers:
    """A prediction file, scored by the task's headline metric."""
    metric = build_metric(load_task(spec.task).metrics[0])
    ids, values, clusters, categories, kinds = Names(), array("d"), Labels(), Labels(), Labels()
    for row in iterate_predictions(path):
        entry = score_fields(row, [metric])["scores"][metric.label]
        ids.append(row["id"])
        values.append(float(entry.get("value") or 0.0))
        clusters.append(str(row.get("cluster") or row["id"]))
        categories.append(str(row.get("category")))
        kinds.append(str(row["meta"].get(spec.split_by)) if spec.split_by else "")
    if not ids:
        raise DataError(f"{path}: holds no answers")
    order = np.array(sorted(range(len(ids)), key=list(ids).__getitem__))
    for labels in (clusters, categories, kinds):
        labels.reorder(order)
    return Answers(Names(ids[place] for place in order.tolist()), np.array(values)[order], clusters, categories, kinds)


def run_folder(output: Path, arm: str, seed: int) -> Path:
    """Where an arm's run of one seed lies."""
    return output / f"{arm}-{seed}"


def finished(spec: ArmsSpec, output: Path) -> dict[str, dict[int, Answers]]:
    """Arm → seed → answers, of the runs that are evaluated whole."""
    found: dict[str, dict[int, Answers]] = {}
    for name, arm in spec.arms.items():
        for seed in arm.seeds:
            folder = run_folder(output, name, seed) / "eval"
            if (folder / "results.json").is_file():
                found.setdefault(name, {})[seed] = read_answers(spec, prediction_path(folder, spec.task, None))
    return found


def compare_arms(
    first: Mapping[int, Answers], second: Mapping[int, Answers], keep: np.ndarray, *, seed: int = 0
) -> Comparison:
    """First minus second on the questions ``keep``, each question's score averaged over the seeds that both have; in points, with
    a bootstrap paired by question and clustered. Raises `DataError` where the questions differ."""
    shared = sorted(set(first) & set(second))
    one, other = (np.mean([answers[s].values for s in shared], axis=0) for answers in (first, second))
    sample = first[shared[0]]
    theirs = second[shared[0]].ids
    if len(sample.ids) != len(theirs) or not all(map(str.__eq__, sample.ids, theirs)):
        raise DataError("the arms were asked different questions; evaluate them with the same settings")
    return paired_comparison(100 * other[keep], 100 * one[keep], clusters=sample.clusters.codes[keep], seed=seed)


def arms_study(spec: ArmsSpec, output: Path, costs: Mapping[str, Cost] | None = None) -> Study:
    """What the finished runs show; costs: of the arms for which they are known. Raises `DataError` where none is finished."""
    arms = finished(spec, output)
    if not arms:
        raise DataError(f"{output}: no arm is trained and evaluated yet")
    sample = next(iter(next(iter(arms.values())).values()))
    _check_same_questions(arms, sample)
    parts = _parts(spec, sample)
    floors = _floors(spec, output)
    tables = [
        _scores(spec, arms, floors, parts),
        *_expectations(spec, arms, floors, parts),
        *_by_category(spec, arms, parts),
    ]
    tables += _costs(spec, costs or {}, arms)
    notes = [
        f"{spec.description}. Task {spec.task}: {len(sample.ids)} questions, {len(sample.clusters.names)} clusters; headline metric "
        f"{build_metric(load_task(spec.task).metrics[0]).label}, percent.",
        "What is expected was written in the study's file before any arm was trained; intervals are 95 %, differences by a paired "
        "cluster bootstrap over questions averaged over seeds.",
    ]
    absent = [f"{n}-{s}" for n, arm in spec.arms.items() for s in arm.seeds if s not in arms.get(n, {})]
    if absent:
        notes.append(f"Not run yet: {', '.join(absent)}.")
    data = {
        "arms": {n: {s: _means(a, parts) for s, a in seeds.items()} for n, seeds in arms.items()},
        "costs": {name: asdict(cost) for name, cost in (costs or {}).items()},
        "floors": {name: _means(answers, parts) for name, answers in floors.items()},
    }
    return Study("arms", f"Study of arms: {spec.name}", notes, tables, data)


def curve_lines(spec: ArmsSpec, output: Path) -> dict[str, list[tuple[float, float]]]:
    """Which questions (all, seen, unseen) → (an arm's size, its score in percent, mean over seeds), by size; of finished arms that have a
    size."""
    arms = {name: seeds for name, seeds in finished(spec, output).items() if spec.arms[name].size is not None}
    found: dict[str, list[tuple[float, float]]] = {}
    for name in sorted(arms, key=lambda one: spec.arms[one].size or 0.0):
        seeds = arms[name]
        parts = _parts(spec, next(iter(seeds.values())))
        values = np.mean([answers.values for answers in seeds.values()], axis=0)
        for part in [part for part in WHERE if part in parts]:
            point = (float(spec.arms[name].size or 0.0), 100 * float(values[parts[part]].mean()))
            found.setdefault(part, []).append(point)
    return found


def _check_same_questions(arms: Mapping[str, Mapping[int, Answers]], sample: Answers) -> None:
    """Raises `DataError` naming the first run that was asked other questions than ``sample``."""
    for name, seeds in arms.items():
        for seed, answers in seeds.items():
            if len(answers.ids) != len(sample.ids) or not all(map(str.__eq__, answers.ids, sample.ids)):
                raise DataError(
                    f"the arms were asked different questions: {name}-{seed} has {len(answers.ids)} answers, the first run "
                    f"{len(sample.ids)}; evaluate them with the same settings (--limit), or remove that run's folder eval"
                )


def _parts(spec: ArmsSpec, sample: Answers) -> dict[str, np.ndarray]:
    """Name → which questions: all, each kind, and those seen and unseen in training."""
    parts = {"all": np.ones(len(sample.ids), bool)}
    if spec.split_by is not None:
        parts |= {
            kind: sample.kinds.are(kind) for kind in [*spec.seen, *sorted(set(sample.kinds.names) - set(spec.seen))]
        }
        seen = np.any([sample.kinds.are(kind) for kind in spec.seen], axis=0) | np.zeros(len(sample.ids), bool)
        parts |= {"seen": seen, "unseen": ~seen}
    return {name: keep for name, keep in parts.items() if keep.any()}


def _means(answers: Answers, parts: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {
        name: round(100 * float(answers.values[keep].mean()), 2)
        for name, keep in parts.items()
        if len(keep) == len(answers.ids)
    }


def _floors(spec: ArmsSpec, output: Path) -> dict[str, Answers]:
    found = {}
    for name, arm in spec.arms.items():
        folder = run_folder(output, name, arm.seeds[0]) / "eval"
        for floor in FLOORS if arm.blind else ():
            path = prediction_path(folder, spec.task, floor)
            if path.is_file() and (folder / "results.json").is_file():
                found[f"{name}, {floor}"] = read_answers(spec, path)
    return found


def _scores(
    spec: ArmsSpec,
    arms: Mapping[str, Mapping[int, Answers]],
    floors: Mapping[str, Answers],
    parts: Mapping[str, np.ndarray],
) -> Table:
    rows = []
    for name, seeds in arms.items():
        values = np.mean([answers.values for answers in seeds.values()], axis=0)
        sample = next(iter(seeds.values()))
        overall = mean_estimate(100 * values, clusters=sample.clusters.codes)
        cells = [number(100 * float(values[keep].mean()), 1) for keep in parts.values()]
        rows.append((name, spec.arms[name].what, str(len(seeds)), *cells, spread(overall.low, overall.high, digits=1)))
    for name, answers in floors.items():
        means = _means(answers, parts)
        rows.append(
            (name, "without the right picture", "1", *(number(means.get(p, float("nan")), 1) for p in parts), "–")
        )
    return Table("Scores", ("arm", "what", "seeds", *parts, "all, 95 %"), rows, num_text=2)


def _expectations(
    spec: ArmsSpec,
    arms: Mapping[str, Mapping[int, Answers]],
    floors: Mapping[str, Answers],
    parts: Mapping[str, np.ndarray],
) -> list[Table]:
    rows = []
    for entry in spec.expected:
        if not set(arms.get(entry.better, {})) & set(arms.get(entry.than, {})) or entry.where not in parts:
            continue
        result = compare_arms(arms[entry.better], arms[entry.than], parts[entry.where])
        least = -entry.within
        verdict = "yes" if result.low > least else "no, the other way" if result.high < least else "not shown"
        verdict = _at_the_floor(entry, arms, floors, parts[entry.where]) or verdict
        interval = spread(result.low, result.high, digits=1, sign=True)
        rows.append(
            (
                f"{entry.better} > {entry.than}" + (f" − {entry.within:g}" if entry.within else ""),
                entry.where,
                verdict,
                f"{result.difference:+.1f}",
                interval,
                p_text(result.p_value),
            )
        )
    headings = ("expected", "where", "came out", "difference", "95 %", "p")
    return [Table("Expected beforehand, and what came out (points)", headings, rows, num_text=3)] if rows else []


def _at_the_floor(
    entry: ExpectedSpec, arms: Mapping[str, Mapping[int, Answers]], floors: Mapping[str, Answers], keep: np.ndarray
) -> str | None:
    """Why two arms tell nothing of an expectation on the questions ``keep``: neither scores more than guessing. None where one does."""
    shared = sorted(set(arms[entry.better]) & set(arms[entry.than]))
    one, other = (
        100 * float(np.mean([arms[name][seed].values[keep] for seed in shared])) for name in (entry.better, entry.than)
    )
    of_both = [f"{name}, {floor}" for name in (entry.better, entry.than) for floor in FLOORS]
    measured = [100 * float(floors[name].values[keep].mean()) for name in of_both if _as_long(floors.get(name), keep)]
    floor = max(entry.floor, *measured) if measured else entry.floor
    if max(one, other) > floor:
        return None
    both = f"both at {one:.1f}" if f"{one:.1f}" == f"{other:.1f}" else f"{one:.1f} and {other:.1f}"
    return f"not told: {both}, guessing scores {floor:.1f}" if floor else f"not told: {both}"


def _as_long(answers: Answers | None, keep: np.ndarray) -> TypeGuard[Answers]:
    return answers is not None and len(answers.ids) == len(keep)


def _by_category(
    spec: ArmsSpec, arms: Mapping[str, Mapping[int, Answers]], parts: Mapping[str, np.ndarray]
) -> list[Table]:
    """Nothing where the task's questions are of one kind."""
    where = "unseen" if "unseen" in parts else "all"
    sample = next(iter(next(iter(arms.values())).values()))
    categories = sorted(sample.categories.names)
    if len(categories) < 2:
        return []
    rows = []
    for name, seeds in arms.items():
        values = np.mean([answers.values for answers in seeds.values()], axis=0)
        chosen = [parts[where] & sample.categories.are(category) for category in categories]
        rows.append((name, *(number(100 * float(values[keep].mean()), 1) if keep.any() else "–" for keep in chosen)))
    return [Table(f"By kind of question ({where})", ("arm", *categories), rows)]


def _costs(spec: ArmsSpec, costs: Mapping[str, Cost], arms: Mapping[str, Mapping[int, Answers]]) -> list[Table]:
    shown = {name: cost for name, cost in costs.items() if name in arms}
    clips = any(cost.frames for cost in shown.values())
    rows = []
    for name, c in shown.items():
        frames = [str(c.frames or 1)] if clips else []
        numbers = (str(c.tokens), f"{c.vision:.1f}", f"{c.language:.1f}", f"{c.millions:.1f}")
        rows.append((name, spec.arms[name].what, *frames, *numbers))
    frames = ["frames"] if clips else []
    headings = ("arm", "what", *frames, "visual tokens", "encoders and connector", "language model", "parameters, M")
    what = "one clip of the most frames" if clips else "one picture"
    caption = f"Cost of {what} (GFLOPs forward, a multiply-add is two)"
    return [Table(caption, headings, rows, num_text=2)] if rows else []
