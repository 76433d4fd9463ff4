"""``mllm demo``: draw data, train a dual-encoder model, evaluate it, show two answers; no download."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.cli import arguments

NEXT = """next:
  mllm chat {run}/final --image {image}
  mllm eval run {run}/final --tasks demo_charts --data demo_charts={run}/data/charts --blind
  mllm recipes cp demo my_recipe.yaml     # change an encoder, a connector, a rate: one line each
  mllm recipes ls                         # the published models' recipes
"""


def demo(
    output: Annotated[Path, typer.Option(help="Folder for data, checkpoints and the report.")] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Recipe changes, key.sub=value.", show_default=False)
    ] = None,
    charts: Annotated[int, typer.Option(help="Training charts to draw.")] = 4000,
    processes: Annotated[int, typer.Option(help="Training processes.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Evaluate only N samples of each test set.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted demo.")] = False,
) -> None:
    """Train, evaluate and question a small dual-encoder model on charts and digits, on this machine's CPU, in minutes."""
    started = time.perf_counter()
    from rich.console import Console

    from mllm.recipe import load_recipe

    changes = [f"output={output}", f"model.language_model.tokenizer={output / 'tokenizer'}", *(overrides or [])]
    recipe = load_recipe("demo", changes)
    for value, option in ((charts, "--charts"), (processes, "--processes"), (limit, "--limit")):
        arguments.at_least(value, 1, option)
    from mllm.demo.charts_and_digits import prepare_demo, read_from, train_tokenizer
    from mllm.train.run import run_recipe

    recipe = read_from(recipe, output / "data")
    console = Console()
    console.rule("1  data: charts from real and random tables, handwritten digits")
    prepare_demo(output / "data", num_charts=charts, seed=0)
    train_tokenizer(output / "data", output / "tokenizer")

    console.rule("2  training: two stages, two encoders, a language model from scratch")
    final = run_recipe(recipe, processes=processes, resume=resume)

    console.rule("3  evaluation on held-out charts and digits, with and without the picture")
    from mllm.eval.run import run_eval
    from mllm.eval.settings import EvalSettings

    results = run_eval(
        str(final),
        ["demo_charts", "demo_digits"],
        EvalSettings(
            output_dir=output / "eval",
            batch_size=64,
            blind=True,
            limit=limit,
            resume=False,
            data_dirs={"demo_charts": str(output / "data" / "charts"), "demo_digits": str(output / "data" / "digits")},
        ),
    )
    scores = {name.removeprefix("demo_"): _scores(result) for name, result in results.items()}
    report: dict[str, Any] = {**scores, "seconds": round(time.perf_counter() - started, 1)}
    path = output / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")

    console.rule("4  two questions")
    shown = answer_two(final, output)
    for row in shown:
        console.print(
            f"[bold]{row['image']}[/]\n  {row['question']}\n  → {row['answer']}   [dim](target: {row['target']})[/]"
        )
    page = write_page(output, scores, results, shown)
    console.rule("result")
    for name, values in scores.items():
        console.print(_score_line(name, values))
    console.print(f"{report['seconds']:.0f} s · {path} · {page}")
    console.print(NEXT.format(run=output, image=shown[0]["image"]), highlight=False, soft_wrap=True)


def _scores(result: Any) -> dict[str, float | None]:
    """The score, and what is reached without the right picture, in percent; None: not measured."""
    ways = {"score": result, "blank": result.blind, "shuffled": result.shuffled, "prior": result.prior}
    return {name: None if way is None else round(100 * way.score, 2) for name, way in ways.items()}


def _score_line(task: str, scores: Mapping[str, float | None]) -> str:
    """A task's line on the terminal: the claim stands against the highest floor, and only when every floor was measured."""
    floors = {name: value for name, value in scores.items() if name != "score"}
    each = ", ".join(f"{name} {'not measured' if value is None else f'{value:.1f}'}" for name, value in floors.items())
    known = [value for value in floors.values() if value is not None]
    most = f"at most {max(known):.1f} %" if len(known) == len(floors) else "not all measured"
    return f"{task}: {scores['score']:.1f} %   without the right picture {most} ({each})"


def answer_two(checkpoint: Any, output: Path) -> list[dict[str, Any]]:
    """Ask the model about one held-out chart and one digit; the rows."""
    from mllm.eval.metrics import build_metric
    from mllm.models.chat import ChatSession

    session = ChatSession.load(str(checkpoint), dtype="float32")
    rows = []
    for kind, index, metric in (("charts", 3, "relaxed_strict"), ("digits", 7, "exact_match")):
        lines = (output / "data" / kind / "test.jsonl").read_text().splitlines()
        row = json.loads(lines[index])
        image = output / "data" / kind / row["image"]
        session.reset()
        session.add_image(image)
        answer = session.ask(row["question"], max_new_tokens=16)
        right = build_metric(metric).score(answer, row["answer"], {}).value == 1
        rows.append(
            {"image": image, "question": row["question"], "answer": answer, "target": row["answer"], "right": right}
        )
    return rows


def write_page(
    output: Path, scores: Mapping[str, Mapping[str, float | None]], results: Any, shown: list[dict[str, Any]]
) -> Path:
    """``demo.html``: scores, loss, right and wrong answers, links to what was written."""
    from mllm.demo.page import demo_page
    from mllm.train.observe.tracking import read_metrics

    rows = [*shown, *(row for result in results.values() for row in _examples(result, output / "eval" / "thumbnails"))]
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


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(demo)
