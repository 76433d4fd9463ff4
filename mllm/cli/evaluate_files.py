"""``mllm eval leaderboard / scores / export / import``: results side by side and in other forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments
from mllm.cli.evaluate_studies import Data, folders, there


def export(
    predictions: Annotated[Path, typer.Argument(help="A predictions .jsonl of a run.")],
    output: Annotated[
        Path, typer.Argument(help="The file to write: .jsonl for lmms-eval, .tsv or .csv for VLMEvalKit.")
    ],
    form: Annotated[str, typer.Option("--as", help="lmms-eval (samples lines) or vlmevalkit (a table).")] = "lmms-eval",
) -> None:
    """Write a run's answers as lmms-eval's samples or as VLMEvalKit's table, to be scored there.

    [dim]mllm eval export runs/my/eval/mmvp.jsonl mmvp.tsv --as vlmevalkit[/]
    """
    arguments.one_of(form, ("lmms-eval", "vlmevalkit"), "--as")
    there(predictions, "a predictions .jsonl of a run")
    from mllm.eval.harnesses.answer_files import export_answers

    count = export_answers(predictions, output, form)  # type: ignore[arg-type]
    typer.echo(f"{output}: {count} answers")


def import_file(
    answers: Annotated[Path, typer.Argument(help="lmms-eval's samples .jsonl, or VLMEvalKit's table as .tsv or .csv.")],
    task: Annotated[str, typer.Option(help="Which of our tasks they answer; see `mllm list tasks`.")],
    output: Annotated[Path, typer.Option(help="Folder for our prediction file.")],
    data: Data = None,
    model: Annotated[str, typer.Option(help="What to call the model.")] = "imported",
) -> None:
    """Score another harness's answers by our rules. Questions, answers and targets must match one to one.

    [dim]mllm eval import samples_mmvp.jsonl --task mmvp --data mmvp=/data/MMVP --output runs/theirs/eval[/]
    """
    arguments.tasks([task])
    there(answers, "lmms-eval's samples .jsonl or VLMEvalKit's table")
    from mllm.eval.harnesses.answer_files import import_answers
    from mllm.eval.report.show import print_results

    result = import_answers(answers, task, output, data=folders(data), model=model)
    print_results({result.task: result})


def leaderboard(
    runs: Annotated[list[str], typer.Argument(help="Predictions folders, as FOLDER or name=FOLDER; two or more.")],
    output: Annotated[Path, typer.Option(help="Folder for leaderboard.html, .md, .json and .tex.")] = Path(
        "runs/leaderboard"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Many checkpoints side by side: scores with intervals, every two compared on the same samples (Holm over all), by category
    and by difficulty.

    [dim]mllm eval leaderboard clip=runs/a/eval both=runs/b/eval dino=runs/c/eval[/]
    """
    for entry in runs:
        name, separator, place = entry.partition("=")
        arguments.folder_of(
            Path(place if separator else name).expanduser(), "a run's predictions, as FOLDER or name=FOLDER"
        )
    from mllm.eval.studies.leaderboard import leaderboard as make
    from mllm.eval.studies.leaderboard import named_runs
    from mllm.eval.studies.study import print_study

    print_study(make(named_runs(runs), output, seed=seed))
    typer.echo(str(output / "leaderboard.html"))


def scores(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, with its results.json.")],
    form: Annotated[str, typer.Option("--as", help="csv, latex, model-index (a model card's head) or json.")] = "csv",
    name: Annotated[str, typer.Option(help="What to call the model.")] = "model",
) -> None:
    """A run's scores as CSV, a LaTeX table, a model card's `model-index`, or JSON, on the console.

    [dim]mllm eval scores runs/my/eval --as latex --name "ours" > table.tex[/]
    """
    arguments.one_of(form, ("csv", "latex", "model-index", "json"), "--as")
    there(folder, "a run's folder, with its results.json")
    from mllm.eval.report.exports import export_results, read_results

    typer.echo(export_results(read_results(folder), form, name=name), nl=False)


def add_to(group: typer.Typer) -> None:
    """Register these verbs in ``mllm eval``."""
    group.command("leaderboard")(leaderboard)
    group.command("scores")(scores)
    group.command("export")(export)
    group.command("import")(import_file)
