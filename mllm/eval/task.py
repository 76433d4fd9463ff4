"""What is a benchmark: where its files are, how a row becomes a question, and how answers are scored?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mllm import assets
from mllm.config import StrictModel, apply_overrides, read_yaml, validate
from mllm.errors import ConfigError, MllmError
from mllm.eval.data.templates import check_expression, check_template
from mllm.eval.metrics import Metric, build_metric


class FileSpec(StrictModel):
    """One data file (``*`` allowed), relative to the benchmark's folder."""

    path: str
    fields: dict[str, Any] = Field(default_factory=dict)
    """Fields that every row of this file gets."""


class JoinSpec(StrictModel):
    """A second file (hub: another config) whose rows complete those of the first, by an equal key."""

    path: str
    by: str
    """Field of the first file."""
    key: str | None = None
    """Field of the second file; default: the same name."""
    records: str | None = None
    split: str | None = None
    """hub: the second config's split; default: the first one's."""


class ColumnsSpec(StrictModel):
    """How a row becomes a sample: Jinja expressions over the row's fields (``row['odd name']`` for names that are no
    identifiers), plus ``_index`` (row number), ``_file`` (file stem), ``_key`` (key of a mapping's entry), ``_folder`` (the
    benchmark's)."""

    question: str
    answers: str | None = None
    """None: this source hides the answers; predictions are written, nothing is scored."""
    images: str = "image"
    id: str = "_index"
    options: str | None = None
    cluster: str | None = None
    """What repeats over samples (image, video, scene): standard errors are clustered by it."""
    category: str | None = None
    meta: dict[str, str] = Field(default_factory=dict)
    """Further values a metric, the prompt or the report uses."""

    @model_validator(mode="after")
    def _expressions(self) -> ColumnsSpec:
        for name, text in {
            **self.model_dump(exclude={"meta"}),
            **{f"meta.{k}": v for k, v in self.meta.items()},
        }.items():
            if text is not None:
                check_expression(text, name)
        return self


class SourceSpec(StrictModel):
    """One file layout the benchmark comes in. The first source whose files are all in the folder is read."""

    name: str
    format: Literal["json", "jsonl", "tsv", "csv", "parquet", "mme", "refer", "reasonseg", "hub"]
    """mme: MME's folders of pictures and question files. reasonseg: a JSON file of shapes and sentences beside each picture.
    refer: a ``refs(…).p`` file with ``instances.json`` beside it.
    hub: a hub dataset, from its parquet files in the folder when they are there, else downloaded through ``datasets``."""
    files: list[FileSpec] = Field(default_factory=list)
    needs: list[str] = Field(default_factory=list)
    """Other files or folders (``*`` allowed) that must be there, where two layouts name their question files alike."""
    records: str | None = None
    """json: dotted path to the list (or mapping) of rows inside the file."""
    join: JoinSpec | None = None
    where: str | None = None
    """Jinja expression; rows for which it is false are not part of the benchmark."""
    unique: str | None = None
    """Jinja expression; of rows that give it the same value the first is part of the benchmark (one row per picture)."""
    explode: str | dict[str, list[str]] | None = None
    """A field that holds a list: one row per entry, which stands in its place. Or ``{name: [field, field, …]}``: one row for each of
    these fields, whose value has that name. ``_part`` numbers the rows from 0."""
    lists: dict[str, str] = Field(default_factory=dict)
    """Name → text file; its lines are a list that ``where`` can ask (``_file in test_ids``)."""
    image_key: str | None = None
    """tsv: where ``image`` holds another row's key instead of a picture (short text), that row's picture is used; this
    is the key's field."""
    hub: str | None = None
    """Hub dataset id; with another format, where the files come from."""
    configs: list[str] = Field(default_factory=list)
    split: str | None = None
    revision: str | None = None
    columns: ColumnsSpec

    @field_validator("files", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return (
            [{"path": entry} if isinstance(entry, str) else entry for entry in value]
            if isinstance(value, list)
            else value
        )

    @model_validator(mode="after")
    def _complete(self) -> SourceSpec:
        if isinstance(self.explode, dict) and len(self.explode) != 1:
            raise ValueError(
                f"explode names {len(self.explode)} fields; expected one, with the fields it takes its values from"
            )
        if self.format == "hub" and not (self.hub and self.split):
            raise ValueError("format hub needs hub (dataset id) and split")
        if self.format not in ("hub", "mme") and not self.files:
            raise ValueError(f"format {self.format} needs files")
        for name in ("where", "unique"):
            if (text := getattr(self, name)) is not None:
                check_expression(text, name)
        return self


class GenerationSpec(StrictModel):
    """Generation settings by their Hugging Face names; greedy unless said otherwise."""

    max_new_tokens: int = Field(default=32, ge=1)
    do_sample: bool = False
    temperature: float | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    num_beams: int = Field(default=1, ge=1)
    stop: list[str] = Field(default_factory=list)
    """The reply ends before the first of these."""
    seed: int | None = None
    masks: bool = False
    """The answer is what the model marks: a JSON object of its ``text`` and its ``masks`` as run lengths (`mask_iou` reads it). For
    generators that mark (hf, a model with a segmentation head)."""

    edits: bool = False
    """The answer is the picture as the question changes it: a JSON object of the ``text`` and the ``picture``, a PNG in base64 (`edit_rule`
    reads it). For generators that edit (hf, a model with a segmentation head and one that draws)."""

    def options(self) -> dict[str, Any]:
        """The settings that differ from saying nothing, as a request carries them."""
        chosen = {"max_new_tokens": self.max_new_tokens, "do_sample": self.do_sample}
        optional = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "stop": self.stop or None}
        beams = {"num_beams": self.num_beams} if self.num_beams != 1 else {}
        beams |= {"masks": True} if self.masks else {}
        beams |= {"edits": True} if self.edits else {}
        return chosen | beams | {name: value for name, value in optional.items() if value is not None}


class TaskSpec(StrictModel):
    """One benchmark."""

    name: str
    version: int = Field(ge=1)
    """Raised with every change that can change a number."""
    description: str
    paper: str = ""
    licence: str = "not stated"
    """Of the questions, as their authors' repository or page says; ``not stated`` where neither does."""
    size: int | None = None
    """Samples in the whole benchmark, where known; a run on fewer says so."""
    folder: str | None = None
    """Folder under ``$MLLM_DATA``; default: the task's name."""
    train: str | None = None
    """jsonl of the training split in the same folder (conversations, or ``question``, ``answer`` and ``kind``): a blind run
    counts the commonest answers there."""
    data_dir: str | None = None
    """Default place of the files, relative to the working directory."""
    sources: list[SourceSpec] = Field(min_length=1)
    prompt: str
    """Jinja template over ``question options choices category`` and the meta values; ``choices`` are the lettered
    options."""
    system: str | None = None
    image_tag: str | None = None
    """Text that stands for image n in the prompt, with ``{}`` for n from 1; pictures go there. None: pictures come
    first."""
    image_size: bool = False
    """Tell the metric the first picture's ``width`` and ``height`` (boxes need them)."""
    frames: int | None = None
    """Video benchmarks: frames shown per video (logged, because it moves scores)."""
    generation: GenerationSpec = Field(default_factory=GenerationSpec)
    metrics: list[str | dict[str, Any]] = Field(min_length=1)
    """The first gives the headline."""
    judge: str | None = None
    """Name of the judge's prompt under ``eval/judges`` that the published score goes by; `mllm eval judge` asks it, a run
    never does."""
    group: str | None = None
    """Meta value whose samples belong together in the score (MME's picture, MMBench's question): a limit keeps them
    whole."""
    note: str = ""
    """What a reader of the number must know."""

    @field_validator("prompt")
    @classmethod
    def _template(cls, value: str) -> str:
        check_template(value)
        return value

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, value: list[Any]) -> list[Any]:
        try:
            labels = [build_metric(entry).label for entry in value]
        except MllmError as error:
            raise ValueError(str(error)) from None
        if len(set(labels)) != len(labels):
            raise ValueError(f"a metric is listed twice: {labels}")
        return value

    def build_metrics(self) -> list[Metric]:
        """The metrics in order; the first is the headline."""
        return [build_metric(entry) for entry in self.metrics]


class SuiteSpec(StrictModel):
    """A named list of tasks."""

    name: str
    description: str
    tasks: list[str] = Field(min_length=1)
    """``*`` stands for every benchmark there is: all tasks but those whose data this project makes (``data_dir``)."""


def load_task(name: str, overrides: Sequence[str] = ()) -> TaskSpec:
    """A task by name or path, with ``key.sub=value`` overrides. Raises `ConfigError` with the path to the key."""
    path = assets.find("eval/tasks", name, kind="task")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level")
    data.setdefault("name", path.stem)
    return validate(TaskSpec, apply_overrides(data, overrides), where=path.name)


def load_suite(name: str) -> SuiteSpec:
    """A suite by name or path."""
    path = assets.find("eval/suites", name, kind="suite")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level")
    data.setdefault("name", path.stem)
    return validate(SuiteSpec, data, where=path.name)


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Task names with every suite's name replaced by its tasks, each once, in order."""
    suites = assets.available("eval/suites")
    expanded: list[str] = []
    for name in names:
        known = assets.available("eval/tasks")
        members = load_suite(name).tasks if name in suites and name not in known else [name]
        for member in members:
            expanded.extend(_benchmarks() if member == "*" else [member])
    return list(dict.fromkeys(expanded))


def _benchmarks() -> list[str]:
    """Every task whose data come from elsewhere and whose answers are text: masks are given by few checkpoints (suite segmentation)."""
    specs = [load_task(name) for name in sorted(assets.available("eval/tasks"))]
    texts = [spec for spec in specs if not (spec.generation.masks or spec.generation.edits)]
    return [spec.name for spec in texts if spec.data_dir is None]


def load_tasks(tasks: Sequence[str | TaskSpec]) -> list[TaskSpec]:
    """Tasks of names, suites, paths and ready specs, in order, each once. Raises `ConfigError` for two that differ under one
    name: their answers would lie in one file."""
    specs: dict[str, TaskSpec] = {}
    for task in tasks:
        for spec in [task] if isinstance(task, TaskSpec) else [load_task(name) for name in expand_tasks([task])]:
            if specs.setdefault(spec.name, spec) != spec:
                raise ConfigError(
                    f"two tasks are called {spec.name!r} and differ; give one of them another name: in its file"
                )
    return list(specs.values())


def data_folder(task: TaskSpec, data: Mapping[str, str | Path] | None = None) -> Path | None:
    """Where the task's files are: ``data[task]``, then ``$MLLM_DATA/<folder>`` if that exists, then the task's own
    default if that exists; None when nowhere. Raises `ConfigError` when ``data`` names a place that does not exist."""
    import os

    given = (data or {}).get(task.name)
    if given is not None:
        path = Path(given).expanduser()
        if not path.exists():
            raise ConfigError(f"--data {task.name}={given}: no such file or folder")
        return path
    places = []
    if root := os.environ.get("MLLM_DATA"):
        places.append(Path(root).expanduser() / (task.folder or task.name))
    if task.data_dir:
        places.append(Path(task.data_dir).expanduser())
    return next((place for place in places if place.exists()), None)
